/*
 * A layer on the GPU through the C interface, in the program's own context, stream and memory; the result is compared with the same layer on the CPU.
 *
 * The program finds the driver by itself (dlopen), so that it needs no toolkit to compile and starts on a machine without a GPU.
 *
 *   scripts/install-capi.sh /tmp/moe --features cuda
 *   cc -std=c11 cuda_layer.c $(PKG_CONFIG_PATH=/tmp/moe/lib/pkgconfig pkg-config --cflags --libs moe-kernels) -ldl -Wl,-rpath,/tmp/moe/lib -o cuda_layer && ./cuda_layer
 *
 * Exits with 0 when every check holds, and with 77 where there is no GPU to run on.
 */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <moe_kernels.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { T = 7, H = 48, I = 32, E = 8, K = 2 };

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

/* The driver's interface, as far as a program with memory and a stream needs it. Versions of names (_v2) are those of its header. */
typedef int (*init_fn)(unsigned);
typedef int (*device_get_fn)(int *, int);
typedef int (*retain_fn)(void **, int);
typedef int (*set_current_fn)(void *);
typedef int (*alloc_fn)(moe_device_ptr *, size_t);
typedef int (*free_fn)(moe_device_ptr);
typedef int (*to_device_fn)(moe_device_ptr, const void *, size_t);
typedef int (*to_host_fn)(void *, moe_device_ptr, size_t);
typedef int (*stream_create_fn)(void **, unsigned);
typedef int (*stream_fn)(void *);
typedef int (*release_fn)(int);

static struct {
  init_fn init;
  device_get_fn device_get;
  retain_fn retain;
  release_fn release;
  set_current_fn set_current;
  alloc_fn alloc;
  free_fn free;
  to_device_fn to_device;
  to_host_fn to_host;
  stream_create_fn stream_create;
  stream_fn stream_synchronize, stream_destroy;
} cu;

/* A function of the driver. ISO C has no conversion from dlsym's result; POSIX says that the bits are the same. */
static void find(void *library, const char *name, void *function) {
  void *address = dlsym(library, name);
  if (address == NULL) {
    fprintf(stderr, "the driver has no %s\n", name);
    exit(1);
  }
  memcpy(function, &address, sizeof address);
}

static void load_driver(void) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW);
  check(library != NULL, "libcuda.so.1 is there, since the library found it");
  find(library, "cuInit", &cu.init);
  find(library, "cuDeviceGet", &cu.device_get);
  find(library, "cuDevicePrimaryCtxRetain", &cu.retain);
  find(library, "cuDevicePrimaryCtxRelease_v2", &cu.release);
  find(library, "cuCtxSetCurrent", &cu.set_current);
  find(library, "cuMemAlloc_v2", &cu.alloc);
  find(library, "cuMemFree_v2", &cu.free);
  find(library, "cuMemcpyHtoD_v2", &cu.to_device);
  find(library, "cuMemcpyDtoH_v2", &cu.to_host);
  find(library, "cuStreamCreate", &cu.stream_create);
  find(library, "cuStreamSynchronize", &cu.stream_synchronize);
  find(library, "cuStreamDestroy_v2", &cu.stream_destroy);
}

static void driver(int result, const char *what) {
  if (result != 0) {
    fprintf(stderr, "%s: CUresult %d\n", what, result);
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

/* Device memory; everything that was allocated goes at the end. */
static moe_device_ptr allocated[16];
static size_t allocations;

static moe_device_ptr room(size_t bytes) {
  check(allocations < sizeof allocated / sizeof *allocated, "few allocations");
  driver(cu.alloc(&allocated[allocations], bytes), "cuMemAlloc");
  return allocated[allocations++];
}

static moe_device_ptr upload(const float *from, size_t n) {
  moe_device_ptr to = room(n * sizeof *from);
  driver(cu.to_device(to, from, n * sizeof *from), "cuMemcpyHtoD");
  return to;
}

static moe_matrix view(const float *data, size_t rows, size_t cols) {
  moe_matrix m = {data, rows * cols * sizeof *data, rows, cols, (ptrdiff_t)cols, 1, MOE_DTYPE_F32, 0};
  return m;
}

static moe_device_matrix device_view(moe_device_ptr data, size_t rows, size_t cols) {
  moe_device_matrix m = {data, rows * cols * sizeof(float), rows, cols, (ptrdiff_t)cols, MOE_DTYPE_F32, 0};
  return m;
}

static moe_device_weights device_weights(moe_device_ptr data, size_t rows, size_t cols) {
  moe_device_weights w = {data, E * rows * cols * sizeof(float), E, rows, cols, (ptrdiff_t)(rows * cols), (ptrdiff_t)cols, MOE_DTYPE_F32, 0};
  return w;
}

static float x[T * H], gate[E * H], gate_up[E * 2 * I * H], down[E * H * I], residual[T * H], on_cpu[T * H], on_gpu[T * H];

/* The same layer on the CPU: on_cpu = layer(x) + residual. */
static void run_cpu(const moe_router *router, const moe_activation *swiglu) {
  moe_cpu *cpu = NULL;
  moe_experts *experts = NULL;
  moe_layer *layer = NULL;
  moe_routing *routing = NULL;
  must(moe_cpu_create(NULL, &cpu), "cpu");
  must(moe_experts_create(cpu, H, I, swiglu, MOE_DTYPE_F32, &experts), "experts");
  for (size_t e = 0; e < E; ++e) {
    moe_matrix gu = view(gate_up + e * 2 * I * H, 2 * I, H), d = view(down + e * H * I, H, I);
    moe_expert_weights w = {.struct_size = sizeof w};
    w.layout = MOE_LAYOUT_FUSED;
    w.gate_up = &gu;
    w.down = &d;
    must(moe_experts_push(cpu, experts, &w), "expert");
  }
  must(moe_layer_create(router, &experts, &layer), "layer");
  moe_matrix gate_view = view(gate, E, H), x_view = view(x, T, H), residual_view = view(residual, T, H);
  moe_matrix_mut y_view = {on_cpu, sizeof on_cpu, T, H, H, MOE_DTYPE_F32, 0};
  must(moe_layer_set_gate(cpu, layer, &gate_view, NULL, 0, NULL, NULL), "gate");
  must(moe_routing_create(&routing), "routing");
  size_t bytes = 0;
  must(moe_layer_workspace_size(cpu, layer, T, &bytes), "workspace size");
  unsigned char *workspace = malloc(bytes);
  check(workspace != NULL, "malloc");
  moe_forward call = {.struct_size = sizeof call};
  call.x = &x_view;
  call.y = &y_view;
  call.residual = &residual_view;
  call.workspace = workspace;
  call.workspace_bytes = bytes;
  must(moe_layer_forward(cpu, layer, routing, &call), "forward on the CPU");
  free(workspace);
  must(moe_routing_destroy(routing), "routing");
  must(moe_layer_destroy(layer), "layer");
  must(moe_cpu_destroy(cpu), "cpu");
}

int main(void) {
  check(moe_abi_version() == MOE_ABI_VERSION, "library and header are of one version");
  if (!moe_cuda_is_available()) {
    printf("not run: %s\n", moe_last_error());
    return 77;
  }
  fill(x, T * H, 1);
  fill(gate, E * H, 2);
  fill(gate_up, E * 2 * I * H, 3);
  fill(down, E * H * I, 4);
  fill(residual, T * H, 5);

  /* The program's context, stream and memory. An engine has these already. */
  int device = 0;
  void *context = NULL, *stream = NULL;
  load_driver();
  driver(cu.init(0), "cuInit");
  driver(cu.device_get(&device, 0), "cuDeviceGet");
  driver(cu.retain(&context, device), "cuDevicePrimaryCtxRetain");
  driver(cu.set_current(context), "cuCtxSetCurrent");
  driver(cu.stream_create(&stream, 1), "cuStreamCreate"); /* 1: does not wait for the default stream */
  moe_cuda_device found = {.struct_size = sizeof found};
  must(moe_cuda_device_query(&found), "device");
  printf("moe-kernels %s on compute capability %u.%u, %u multiprocessors\n", moe_version(), found.compute_major, found.compute_minor, found.sm_count);

  /* One router for both sides; the layer on the GPU is a description, and its weights stay where they are. */
  moe_router *router = NULL;
  moe_router_config config = {.struct_size = sizeof config};
  must(moe_router_config_family(&config, "qwen3_moe", E, K), "config");
  must(moe_router_create(&config, &router), "router");
  moe_activation swiglu = {sizeof swiglu, MOE_ACT_SILU, 1, MOE_CLAMP_NONE, 0, 0};
  moe_cuda_layer *layer = NULL;
  moe_cuda_layer_config shape = {.struct_size = sizeof shape};
  shape.hidden = H;
  shape.intermediate = I;
  shape.activation = &swiglu;
  shape.dtype = MOE_DTYPE_F32;
  must(moe_cuda_layer_create(router, &shape, &layer), "layer");
  run_cpu(router, &swiglu);

  moe_device_matrix x_view = device_view(upload(x, T * H), T, H);
  moe_device_matrix y_view = device_view(upload(residual, T * H), T, H); /* y = layer(x) + y, in place */
  moe_device_matrix gate_view = device_view(upload(gate, E * H), E, H);
  moe_device_weights gate_up_view = device_weights(upload(gate_up, E * 2 * I * H), 2 * I, H);
  moe_device_weights down_view = device_weights(upload(down, E * H * I), H, I);
  moe_cuda_expert_weights experts = {.struct_size = sizeof experts};
  experts.layout = MOE_LAYOUT_FUSED;
  experts.gate_up = &gate_up_view;
  experts.down = &down_view;
  moe_cuda_forward call = {.struct_size = sizeof call};
  must(moe_cuda_layer_workspace_size(layer, T, &call.workspace_bytes), "workspace size");
  call.workspace = room(call.workspace_bytes);
  call.x = &x_view;
  call.y = &y_view;
  call.residual = &y_view;
  call.gate = &gate_view;
  call.experts = &experts;

  /* Kernels are loaded here; the call itself only queues, and could be captured. Structs and handle may go once it has returned. */
  must(moe_cuda_layer_prepare(layer, &call), "prepare");
  must(moe_cuda_layer_forward(layer, stream, &call), "forward");
  driver(cu.stream_synchronize(stream), "cuStreamSynchronize");
  driver(cu.to_host(on_gpu, y_view.data, sizeof on_gpu), "cuMemcpyDtoH");
  check(memcmp(on_gpu, on_cpu, sizeof on_gpu) == 0, "f32 experts have the CPU's bits");
  puts("the GPU's result has the bits of the CPU's");

  /* What is wrong is refused in words before anything is queued. */
  call.workspace_bytes -= 1;
  check(moe_cuda_layer_forward(layer, stream, &call) == MOE_ERROR_BUFFER_TOO_SMALL, "a short workspace is refused");
  printf("refused: %s\n", moe_last_error());
  call.workspace_bytes += 1;
  x_view.data = y_view.data;
  check(moe_cuda_layer_forward(layer, stream, &call) == MOE_ERROR_OVERLAP, "an output over the input is refused");
  printf("refused: %s\n", moe_last_error());
  driver(cu.stream_synchronize(stream), "cuStreamSynchronize");
  driver(cu.to_host(on_gpu, y_view.data, sizeof on_gpu), "cuMemcpyDtoH");
  check(memcmp(on_gpu, on_cpu, sizeof on_gpu) == 0, "nothing was written");

  must(moe_cuda_layer_destroy(layer), "layer");
  must(moe_router_destroy(router), "router");
  while (allocations > 0) driver(cu.free(allocated[--allocations]), "cuMemFree");
  driver(cu.stream_destroy(stream), "cuStreamDestroy");
  driver(cu.release(device), "cuDevicePrimaryCtxRelease");
  puts("all checks hold");
  return 0;
}
