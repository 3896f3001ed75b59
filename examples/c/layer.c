/*
 * A layer through the C interface, step by step: the numbers are made up, the result is compared with plain loops, and wrong calls are refused.
 *
 *   scripts/install-capi.sh /tmp/moe
 *   cc -std=c11 layer.c $(PKG_CONFIG_PATH=/tmp/moe/lib/pkgconfig pkg-config --cflags --libs moe-kernels) -lm -Wl,-rpath,/tmp/moe/lib -o layer && ./layer
 *
 * Exits with 0 when every check holds.
 */
#include <math.h>
#include <moe_kernels.h>
#include <stdio.h>
#include <stdlib.h>

enum { T = 5, H = 24, I = 16, E = 6, K = 2 };

static void must(moe_status status, const char *what) {
  if (status != MOE_OK) {
    fprintf(stderr, "%s: %s: %s\n", what, moe_status_name(status), moe_last_error());
    exit(1);
  }
}

static void check(int holds, const char *what) {
  if (!holds) {
    fprintf(stderr, "wrong: %s (last error: %s)\n", what, moe_last_error());
    exit(1);
  }
}

/* Numbers in -0.5 .. 0.5 that are the same in every run. */
static void fill(float *to, size_t n, unsigned seed) {
  uint64_t state = seed;
  for (size_t i = 0; i < n; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    to[i] = (float)(state >> 40) / 16777216.0f - 0.5f;
  }
}

/* A row-major view without gaps. */
static moe_matrix view(const float *data, size_t rows, size_t cols) {
  moe_matrix m = {data, rows * cols * sizeof *data, rows, cols, (ptrdiff_t)cols, 1, MOE_DTYPE_F32, 0};
  return m;
}

/* What the layer has to give for one token: softmax over E, the K best, their weights divided by their sum, SwiGLU experts. */
static void reference(const float *x, const float *gate, const float *gate_up, const float *down, double *y) {
  double p[E], sum = 0, weight_sum = 0;
  int best[K];
  for (int e = 0; e < E; ++e) {
    double z = 0;
    for (int j = 0; j < H; ++j) z += (double)gate[e * H + j] * x[j];
    sum += p[e] = exp(z);
  }
  for (int k = 0; k < K; ++k) {
    best[k] = -1;
    for (int e = 0; e < E; ++e) {
      int taken = 0;
      for (int l = 0; l < k; ++l) taken |= best[l] == e;
      if (!taken && (best[k] < 0 || p[e] > p[best[k]])) best[k] = e;
    }
    weight_sum += p[best[k]] / sum;
  }
  for (int j = 0; j < H; ++j) y[j] = 0;
  for (int k = 0; k < K; ++k) {
    const float *gu = gate_up + (size_t)best[k] * 2 * I * H, *d = down + (size_t)best[k] * H * I;
    double h[I];
    for (int i = 0; i < I; ++i) {
      double g = 0, u = 0;
      for (int j = 0; j < H; ++j) {
        g += (double)gu[i * H + j] * x[j];
        u += (double)gu[(I + i) * H + j] * x[j];
      }
      h[i] = g / (1 + exp(-g)) * u;
    }
    for (int j = 0; j < H; ++j) {
      double sum_i = 0;
      for (int i = 0; i < I; ++i) sum_i += (double)d[j * I + i] * h[i];
      y[j] += p[best[k]] / sum / weight_sum * sum_i;
    }
  }
}

int main(void) {
  static float x[T * H], y[T * H], gate[E * H], gate_up[E * 2 * I * H], down[E * H * I];
  fill(x, T * H, 1);
  fill(gate, E * H, 2);
  fill(gate_up, E * 2 * I * H, 3);
  fill(down, E * H * I, 4);

  check(moe_abi_version() == MOE_ABI_VERSION, "library and header are of one version");

  /* Two threads of the handle's own; without options a call would run on the thread that makes it. */
  moe_cpu *cpu = NULL;
  moe_cpu_options options = {sizeof options, 2, NULL};
  must(moe_cpu_create(&options, &cpu), "cpu");
  printf("moe-kernels %s, %s, %zu threads\n", moe_version(), moe_cpu_isa(cpu), moe_cpu_threads(cpu));

  moe_router *router = NULL;
  moe_router_config config = {.struct_size = sizeof config};
  must(moe_router_config_family(&config, "qwen3_moe", E, K), "config");
  must(moe_router_create(&config, &router), "router");

  /* Weights are packed expert by expert; the caller's may go then. */
  moe_experts *experts = NULL;
  moe_activation swiglu = {sizeof swiglu, MOE_ACT_SILU, 1, MOE_CLAMP_NONE, 0, 0};
  must(moe_experts_create(cpu, H, I, &swiglu, MOE_DTYPE_F32, &experts), "experts");
  for (size_t e = 0; e < E; ++e) {
    moe_matrix gu = view(gate_up + e * 2 * I * H, 2 * I, H), d = view(down + e * H * I, H, I);
    moe_expert_weights w = {.struct_size = sizeof w};
    w.layout = MOE_LAYOUT_FUSED;
    w.gate_up = &gu;
    w.down = &d;
    must(moe_experts_push(cpu, experts, &w), "expert");
  }

  moe_layer *layer = NULL;
  must(moe_layer_create(router, &experts, &layer), "layer");
  check(experts == NULL, "the layer has taken the experts over");
  moe_matrix gate_view = view(gate, E, H);
  must(moe_layer_set_gate(cpu, layer, &gate_view, NULL, 0, NULL, NULL), "gate");

  /* All memory of a call is the caller's, and nothing is allocated in it. */
  moe_routing *routing = NULL;
  must(moe_routing_create(&routing), "routing");
  must(moe_routing_reserve(cpu, routing, router, T), "room");
  size_t bytes = 0;
  must(moe_layer_workspace_size(cpu, layer, T, &bytes), "workspace size");
  unsigned char *workspace = malloc(bytes);
  check(workspace != NULL, "malloc");

  moe_matrix x_view = view(x, T, H);
  moe_matrix_mut y_view = {y, sizeof y, T, H, H, MOE_DTYPE_F32, 0};
  moe_forward call = {.struct_size = sizeof call};
  call.x = &x_view;
  call.y = &y_view;
  call.workspace = workspace;
  call.workspace_bytes = bytes;
  must(moe_layer_forward(cpu, layer, routing, &call), "forward");

  double worst = 0;
  for (int t = 0; t < T; ++t) {
    double expected[H];
    reference(x + t * H, gate, gate_up, down, expected);
    for (int j = 0; j < H; ++j) worst = fmax(worst, fabs(y[t * H + j] - expected[j]));
  }
  printf("largest difference from plain loops in double: %.1e\n", worst);
  check(worst < 1e-6, "the layer agrees with plain loops");

  /* Where the tokens went. */
  moe_routing_view routed = {.struct_size = sizeof routed};
  moe_permutation_view sorted = {.struct_size = sizeof sorted};
  must(moe_routing_get(routing, &routed), "routing");
  must(moe_routing_get_permutation(routing, &sorted), "permutation");
  for (size_t t = 0; t < routed.tokens; ++t)
    printf("token %zu: experts %d and %d, weights %.3f and %.3f\n", t, (int)routed.ids[t * K], (int)routed.ids[t * K + 1],
           (double)routed.weights[t * K], (double)routed.weights[t * K + 1]);
  check(sorted.offsets[E] == T * K && sorted.num_rows == T * K, "every pair has its row");

  /* What is wrong is refused in words, and nothing is written. */
  float canary = y[0];
  x_view.row_stride = -H;
  check(moe_layer_forward(cpu, layer, routing, &call) == MOE_ERROR_VALUE, "a negative stride is refused");
  printf("refused: %s\n", moe_last_error());
  x_view.row_stride = H;
  call.x = NULL;
  check(moe_layer_forward(cpu, layer, routing, &call) == MOE_ERROR_NULL, "NULL is refused");
  x_view.data = y;
  call.x = &x_view;
  check(moe_layer_forward(cpu, layer, routing, &call) == MOE_ERROR_OVERLAP, "an output over the input is refused");
  printf("refused: %s\n", moe_last_error());
  x_view.data = x;
  call.workspace_bytes = bytes - 1;
  check(moe_layer_forward(cpu, layer, routing, &call) == MOE_ERROR_BUFFER_TOO_SMALL, "a short workspace is refused");
  check(y[0] == canary, "nothing was written");

  free(workspace);
  must(moe_routing_destroy(routing), "routing");
  must(moe_layer_destroy(layer), "layer");
  must(moe_router_destroy(router), "router");
  must(moe_cpu_destroy(cpu), "cpu");
  puts("all checks hold");
  return 0;
}
