// The stages of a layer one by one from C++17: handles as unique_ptr, statuses as exceptions on this side of the boundary, tensors as strided views of one
// allocation in bf16. The result has to have the bits of the whole layer in one call.
//
//   c++ -std=c++17 layer.cpp $(PKG_CONFIG_PATH=/tmp/moe/lib/pkgconfig pkg-config --cflags --libs moe-kernels) -Wl,-rpath,/tmp/moe/lib -o layer && ./layer
//
// Exits with 0 when every check holds.
#include <moe_kernels.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr std::size_t T = 7, H = 32, I = 24, E = 5, K = 2;

void must(moe_status status) {
  if (status != MOE_OK) throw std::runtime_error(std::string(moe_status_name(status)) + ": " + moe_last_error());
}

void check(bool holds, const char *what) {
  if (!holds) throw std::runtime_error(std::string("wrong: ") + what);
}

// A handle that destroys itself.
template <typename H_, moe_status (*destroy)(H_ *)>
struct Destroy {
  void operator()(H_ *handle) const { destroy(handle); }
};
using Cpu = std::unique_ptr<moe_cpu, Destroy<moe_cpu, moe_cpu_destroy>>;
using Router = std::unique_ptr<moe_router, Destroy<moe_router, moe_router_destroy>>;
using Routing = std::unique_ptr<moe_routing, Destroy<moe_routing, moe_routing_destroy>>;
using Layer = std::unique_ptr<moe_layer, Destroy<moe_layer, moe_layer_destroy>>;
using Experts = std::unique_ptr<moe_experts, Destroy<moe_experts, moe_experts_destroy>>;

// A struct of the interface, zero but for its size.
template <typename S>
S sized() {
  S s{};
  s.struct_size = sizeof s;
  return s;
}

// bf16 by truncation: good enough for made-up numbers.
std::vector<std::uint16_t> numbers(std::size_t n, std::uint64_t seed) {
  std::vector<std::uint16_t> out(n);
  for (auto &v : out) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    const float f = static_cast<float>(seed >> 40) / 16777216.0f - 0.5f;
    std::uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    v = static_cast<std::uint16_t>(bits >> 16);
  }
  return out;
}

// `rows` x `cols` of an array from element `first` on.
moe_matrix matrix(const std::vector<std::uint16_t> &from, std::size_t first, std::size_t rows, std::size_t cols,
                  std::size_t row_stride, std::size_t col_stride) {
  moe_matrix m{};
  m.data = from.data() + first;
  m.bytes = (from.size() - first) * sizeof(std::uint16_t);
  m.rows = rows;
  m.cols = cols;
  m.row_stride = static_cast<std::ptrdiff_t>(row_stride);
  m.col_stride = static_cast<std::ptrdiff_t>(col_stride);
  m.dtype = MOE_DTYPE_BF16;
  return m;
}

moe_matrix matrix(const std::vector<float> &from, std::size_t rows, std::size_t cols) {
  moe_matrix m{};
  m.data = from.data();
  m.bytes = from.size() * sizeof(float);
  m.rows = rows;
  m.cols = cols;
  m.row_stride = static_cast<std::ptrdiff_t>(cols);
  m.col_stride = 1;
  m.dtype = MOE_DTYPE_F32;
  return m;
}

template <typename V>
moe_matrix_mut output(std::vector<V> &to, std::size_t rows, std::size_t cols) {
  moe_matrix_mut m{};
  m.data = to.data();
  m.bytes = to.size() * sizeof(V);
  m.rows = rows;
  m.cols = cols;
  m.row_stride = static_cast<std::ptrdiff_t>(cols);
  m.dtype = sizeof(V) == sizeof(float) ? MOE_DTYPE_F32 : MOE_DTYPE_BF16;
  return m;
}

Cpu make_cpu(std::size_t threads) {
  auto options = sized<moe_cpu_options>();
  options.threads = threads;
  moe_cpu *cpu = nullptr;
  must(moe_cpu_create(&options, &cpu));
  return Cpu(cpu);
}

Router make_router() {
  auto config = sized<moe_router_config>();
  must(moe_router_config_family(&config, "gpt_oss", E, K));
  moe_router *router = nullptr;
  must(moe_router_create(&config, &router));
  return Router(router);
}

// gpt-oss's layout: gate_up [H, 2I] with alternating columns, down [I, H], all experts in one allocation each, biases in f32.
Experts make_experts(const moe_cpu *cpu) {
  const auto gate_up = numbers(E * H * 2 * I, 11), down = numbers(E * I * H, 12);
  const std::vector<float> bias(I, 0.125f), down_bias(H, -0.25f);
  auto activation = sized<moe_activation>();
  activation.function = MOE_ACT_SILU;
  activation.gated = 1;
  activation.clamp = MOE_CLAMP_GPT_OSS;
  activation.limit = 7.0f;
  activation.alpha = 1.702f;
  moe_experts *experts = nullptr;
  must(moe_experts_create(cpu, H, I, &activation, MOE_DTYPE_BF16, &experts));
  Experts owned(experts);
  for (std::size_t e = 0; e < E; ++e) {
    // Transposed views: in memory in-features first.
    const auto gu = matrix(gate_up, e * H * 2 * I, 2 * I, H, 1, 2 * I);
    const auto d = matrix(down, e * I * H, H, I, 1, H);
    auto w = sized<moe_expert_weights>();
    w.layout = MOE_LAYOUT_INTERLEAVED;
    w.gate_up = &gu;
    w.down = &d;
    w.gate_bias = w.up_bias = bias.data();
    w.gate_bias_len = w.up_bias_len = I;
    w.down_bias = down_bias.data();
    w.down_bias_len = H;
    must(moe_experts_push(cpu, experts, &w));
  }
  return owned;  // gate_up and down go: the weights were packed
}

// route, both products, combine.
std::vector<float> by_stages(const moe_cpu *cpu, const moe_router *router, const moe_experts *experts, const moe_matrix &x,
                             const moe_matrix &logits) {
  moe_routing *made = nullptr;
  must(moe_routing_create(&made));
  const Routing routing(made);
  auto input = sized<moe_route_input>();
  input.logits = &logits;
  must(moe_route(cpu, router, &input, made));

  auto routed = sized<moe_routing_view>();
  auto sorted = sized<moe_permutation_view>();
  must(moe_routing_get(made, &routed));
  must(moe_routing_get_permutation(made, &sorted));

  auto groups = sized<moe_groups>();
  groups.offsets = sorted.offsets;
  groups.counts = sorted.counts;
  groups.experts = sorted.num_experts;
  groups.pair_of_row = sorted.pair_of_row;
  groups.pair_of_row_len = sorted.num_rows;
  groups.slots = routed.slots;

  std::vector<std::uint16_t> h(sorted.num_rows * I);
  std::vector<float> ys(sorted.num_rows * H), y(T * H);
  std::vector<std::uint8_t> scratch(moe_scratch_bytes(cpu));
  const auto h_out = output(h, sorted.num_rows, I);
  const auto ys_out = output(ys, sorted.num_rows, H);
  must(moe_experts_forward(cpu, experts, &x, &groups, &h_out, &ys_out, scratch.data(), scratch.size()));

  const auto ys_in = matrix(ys, sorted.num_rows, H);
  const auto out = output(y, T, H);
  auto combine = sized<moe_combine_args>();
  combine.ys = &ys_in;
  combine.weights = routed.weights;
  combine.weights_len = T * K;
  combine.row_of_pair = sorted.row_of_pair;
  combine.row_of_pair_len = sorted.num_pairs;
  combine.slots = routed.slots;
  combine.routed_scale = 1.0f;
  combine.out = &out;
  must(moe_combine(cpu, &combine));
  return y;
}

std::vector<float> by_layer(const moe_cpu *cpu, const moe_layer *layer, const moe_matrix &x, const moe_matrix &logits) {
  moe_routing *made = nullptr;
  must(moe_routing_create(&made));
  const Routing routing(made);
  std::size_t bytes = 0;
  must(moe_layer_workspace_size(cpu, layer, T, &bytes));
  std::vector<std::uint8_t> workspace(bytes);
  std::vector<float> y(T * H);
  const auto out = output(y, T, H);
  auto call = sized<moe_forward>();
  call.x = &x;
  call.y = &out;
  call.logits = &logits;
  call.workspace = workspace.data();
  call.workspace_bytes = bytes;
  must(moe_layer_forward(cpu, layer, made, &call));
  return y;
}

void run() {
  const Cpu two = make_cpu(2), one = make_cpu(0);
  const Router router = make_router();
  Experts experts = make_experts(two.get());
  // Tokens are columns H .. 2H of a wider tensor.
  const auto wide = numbers(T * 3 * H, 13);
  const auto x = matrix(wide, H, T, H, 3 * H, 1);
  const auto logit_numbers = numbers(T * E, 14);
  const auto logits = matrix(logit_numbers, 0, T, E, E, 1);

  const auto staged = by_stages(two.get(), router.get(), experts.get(), x, logits);

  moe_experts *given = experts.release();
  moe_layer *made = nullptr;
  const moe_status status = moe_layer_create(router.get(), &given, &made);
  experts.reset(given);  // still ours if the call failed
  must(status);
  const Layer layer(made);
  const auto whole = by_layer(two.get(), layer.get(), x, logits);
  const auto serial = by_layer(one.get(), layer.get(), x, logits);

  const auto same = [](const std::vector<float> &a, const std::vector<float> &b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  };
  check(same(staged, whole), "the stages give the layer's bits");
  check(same(serial, whole), "one thread gives the bits of two");
  check(whole[0] != 0.0f, "there is something in them");

  auto bad = logits;
  bad.cols = E + 1;
  try {
    by_layer(one.get(), layer.get(), x, bad);
    check(false, "logits that reach beyond their memory are refused");
  } catch (const std::runtime_error &why) {
    std::printf("refused: %s\n", why.what());
  }
  std::printf("stages and layer agree bit for bit on %s\n", moe_cpu_isa(two.get()));
}

}  // namespace

int main() {
  try {
    run();
  } catch (const std::exception &why) {
    std::fprintf(stderr, "%s\n", why.what());
    return 1;
  }
  return 0;
}
