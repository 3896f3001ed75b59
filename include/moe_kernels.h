/*
 * moe-kernels: kernels for mixture-of-experts layers. The C interface.
 *
 * Made from src/ffi by scripts/make_header.sh; not to be edited.
 *
 * - Every function returns a status: MOE_OK, or MOE_ERROR_* with a text from moe_last_error() that names the argument. After an error nothing has been written (but to
 *   workspaces and scratch). The few getters without a status return 0 or "" for a handle that is none.
 * - Pointers are checked for NULL and alignment, sizes for overflow, views against the bytes that they may use, ids and offsets against their ranges. What cannot be
 *   checked: that memory is there for as many bytes as the caller says, and that a handle was not destroyed.
 * - Memory that a call writes must not overlap any other memory of the call, gaps between rows included. Memory that it reads may. All of it is borrowed until the call
 *   returns; weights are copied when they are pushed.
 * - Structs begin with struct_size; set it to sizeof. Zero the rest: `moe_forward f = {.struct_size = sizeof f};`. New fields come at the end and mean nothing when zero.
 *   moe_matrix and moe_matrix_mut have none: they stay as they are.
 * - Handles may be used from any thread. As const, by several calls at a time; a call that would change a handle in use gets MOE_ERROR_BUSY.
 * - Sizes and strides count elements, but for names that end in bytes. T tokens, H hidden, I intermediate, E experts, K experts of a token, R logits of a token.
 * - The same input gives the same bits on every instruction set and for any number of threads. docs/gpu.md says which bits a GPU shares.
 * - Functions moe_cuda_* queue on a stream of the context that is current on the calling thread, and return: nothing is allocated, waited for or read back. Memory of the
 *   GPU is borrowed until the stream has run what they queued. They check all of the above; what they cannot check is that an address is memory of the GPU and of this
 *   context, and that it is there for as many bytes as the caller says. Without a driver, and in a library without the GPU backend, they return MOE_ERROR_UNSUPPORTED.
 * - No function throws, unwinds or calls exit. Memory that cannot be had is a status where a call's sizes are large; where the system has none left for small
 *   things, the process ends.
 */

#ifndef MOE_KERNELS_H
#define MOE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

// The version of this interface. It rises when a function or the meaning of a field changes; added functions, fields and constants leave it.
#define MOE_ABI_VERSION 1

// moe_router_config.null_kind: no experts without weights.
#define MOE_NULL_NONE 0
// Experts that return their input.
#define MOE_NULL_IDENTITY 1
// Experts that return nothing.
#define MOE_NULL_ZERO 2

// moe_router_config.score: exp(z - max) / sum.
#define MOE_SCORE_SOFTMAX 0
// 1 / (1 + exp(-z))
#define MOE_SCORE_SIGMOID 1
// sqrt(ln(1 + exp(z)))
#define MOE_SCORE_SQRT_SOFTPLUS 2
// z
#define MOE_SCORE_IDENTITY 3

// moe_router_config.selection: the K best.
#define MOE_SELECT_TOP_K 0
// Ids come with the call.
#define MOE_SELECT_GIVEN 1
// PhiMoE's sparsemixer, K = 2, with jitter_eps.
#define MOE_SELECT_SPARSE_MIXER 2
// Product keys (Doge): 2 * sqrt(E) logits.
#define MOE_SELECT_PRODUCT_KEYS 3
// Each expert takes its best tokens_per_expert tokens.
#define MOE_SELECT_EXPERT_CHOICE 4
// Every expert.
#define MOE_SELECT_DENSE 5

// moe_router_config.rank_by: the score (plus correction bias).
#define MOE_RANK_SCORE 0
// The logit (plus correction bias).
#define MOE_RANK_LOGIT 1

// moe_router_config.group_score: a group's best value.
#define MOE_GROUP_MAX 0
// The sum of a group's best two.
#define MOE_GROUP_TOP2_SUM 1

// moe_router_config.masked_fill: experts of other groups rank below everything.
#define MOE_FILL_NEG_INF 0
// They count as 0.
#define MOE_FILL_ZERO 1

// moe_router_config.weights: the selected expert's score.
#define MOE_WEIGHTS_SCORE 0
// Softmax over the selected logits.
#define MOE_WEIGHTS_SOFTMAX_SELECTED 1
// Sigmoids normalised together with those of the joint_shared last logits.
#define MOE_WEIGHTS_JOINT_WITH_SHARED 2

// moe_router_config.renorm: none.
#define MOE_RENORM_NONE 0
// Divided by their sum.
#define MOE_RENORM_SUM 1
// Divided by their sum plus renorm_value.
#define MOE_RENORM_SUM_PLUS_EPS 2
// Divided by their sum, but by no less than renorm_value.
#define MOE_RENORM_SUM_CLAMP_MIN 3
// Divided by their p-norm, p = renorm_value.
#define MOE_RENORM_P_NORM 4
// Marks a pair without a row and a row without a pair (padding).
#define MOE_NONE UINT32_MAX

// moe_activation.function: z.
#define MOE_ACT_IDENTITY 0
// z * sigmoid(z)
#define MOE_ACT_SILU 1
// z / 2 * (1 + erf(z / sqrt 2))
#define MOE_ACT_GELU 2
// GELU by tanh
#define MOE_ACT_GELU_TANH 3
// max(z, 0)
#define MOE_ACT_RELU 4
// max(z, 0)^2
#define MOE_ACT_RELU2 5

// moe_activation.clamp: none.
#define MOE_CLAMP_NONE 0
// act(min(g, limit)) * clamp(u, +-limit)
#define MOE_CLAMP_PRE 1
// min(act(g), limit) * clamp(u, +-limit)
#define MOE_CLAMP_POST 2
// gpt-oss: (u + 1) * g * sigmoid(alpha * g) after clamping g to limit and u to +-limit.
#define MOE_CLAMP_GPT_OSS 3
// cap(g) * sigmoid(g) * cap(u), cap(z) = c * tanh(z / c) with c = limit for g and alpha for u; a cap of 0 leaves its side alone.
#define MOE_CLAMP_SOFTCAP 4

// moe_expert_weights.layout: up [I, H] and, where experts are gated, gate [I, H].
#define MOE_LAYOUT_SEPARATE 0
// gate_up [2I, H]: gate rows, then up rows. With exchanged strides: [H, 2I], gate columns first (Llama 4).
#define MOE_LAYOUT_FUSED 1
// gate_up [2I, H]: rows alternate, gate first. With exchanged strides: gpt-oss.
#define MOE_LAYOUT_INTERLEAVED 2

// moe_combine_args.shared_kind: a + s.
#define MOE_SHARED_ADD 0
// a + sigmoid(gate) * s
#define MOE_SHARED_SIGMOID_GATE 1
// (a + s) / 2
#define MOE_SHARED_AVERAGE 2

// moe_layer_set_shared: y + sum of S(x).
#define MOE_JOIN_ADD 0
// y + sigmoid(x * gate) * sum of S(x), gate [1, H].
#define MOE_JOIN_SIGMOID_GATE 1
// (y + sum of S(x)) / 2
#define MOE_JOIN_AVERAGE 2
// y + sum of gamma * S(x) with the router's joint shared weights.
#define MOE_JOIN_ROUTER_WEIGHTED 3

// moe_cuda_layer_config.numerics, moe_cuda_gemm_args.numerics: f16 and bf16 on tensor cores, f32 exactly.
#define MOE_CUDA_TENSOR_CORES 0
// The same, with f32 on tensor cores, rounded to TF32.
#define MOE_CUDA_TF32 1
// Every format by chains of f32 fused multiply-adds: the CPU's bits.
#define MOE_CUDA_EXACT 2

// An instruction set and threads. Calls that take it as const may run at the same time in several threads and share its pool.
typedef struct moe_cpu moe_cpu;

// A layer on the GPU: plain data on the host, of no context, without weights. Calls take it as const and may run at the same time in several threads, each with a workspace
// of its own. Work that is queued does not need it any more.
typedef struct moe_cuda_layer moe_cuda_layer;

// All experts of a layer, packed (copied) for one instruction set.
typedef struct moe_experts moe_experts;

// A layer: router, gate, experts, and what a family adds. Calls that take it as const may run at the same time in several threads, each with its own moe_routing.
typedef struct moe_layer moe_layer;

// Equally shaped matrices [N, K], one for each expert, packed (copied) for one instruction set.
typedef struct moe_matrices moe_matrices;

// A permutation and its scratch, to be used again and again.
typedef struct moe_permutation moe_permutation;

// A checked router with its small tensors.
typedef struct moe_router moe_router;

// Ids, weights and permutation of a call, with its scratch. One call at a time may use it; reuse it, so that calls allocate nothing.
typedef struct moe_routing moe_routing;

// What a call came to: MOE_OK, or one of MOE_ERROR_*. After an error (but for MOE_ERROR_INTERNAL and MOE_ERROR_DRIVER) nothing has been written, and
// moe_last_error() names the argument.
typedef int32_t moe_status;

// How to make a moe_cpu. Zeros (with struct_size) are the defaults.
typedef struct {
  // sizeof(moe_cpu_options)
  size_t struct_size;
  // 0 or 1: each call runs on the thread that makes it. N > 1: the handle owns N threads, started here and ended by moe_cpu_destroy; the calling thread waits.
  size_t threads;
  // "scalar", "avx2", "avx512" or "neon"; NULL for the best of this CPU. All give the same bits.
  const char *isa;
} moe_cpu_options;

// What a router does with its logits. Fill it with moe_router_config_init or moe_router_config_family, then change fields.
//
// In order: z * logit_multiplier, softcap; scores; K ids by score or logit (plus correction bias), within groups; weights, renormalised, * scale, * per-expert scale;
// capacity. Flags are 0 or 1.
typedef struct {
  // sizeof(moe_router_config)
  size_t struct_size;
  // E: experts that have weights.
  size_t num_experts;
  // K: experts of a token; ignored by MOE_SELECT_DENSE and MOE_SELECT_EXPERT_CHOICE, whose slots are E.
  size_t top_k;
  // Experts without weights, ids E, E + 1, ...; of kind null_kind.
  size_t num_null;
  // Last logits, which score shared experts; with MOE_WEIGHTS_JOINT_WITH_SHARED only.
  size_t joint_shared;
  // Groups of experts of which topk_group are kept; 0 for no such limit.
  size_t n_group;
  // Groups kept.
  size_t topk_group;
  // For MOE_SELECT_EXPERT_CHOICE.
  size_t tokens_per_expert;
  // Pairs that an expert accepts in one scope, if has_capacity.
  size_t capacity;
  // Tokens of a scope; 0 for all tokens of the call.
  size_t scope_tokens;
  // Seed of noisy top-k, if has_noise_seed.
  uint64_t noise_seed;
  // MOE_NULL_*
  uint32_t null_kind;
  // MOE_SCORE_*
  uint32_t score;
  // MOE_SELECT_*
  uint32_t selection;
  // MOE_RANK_*
  uint32_t rank_by;
  // MOE_GROUP_*
  uint32_t group_score;
  // MOE_FILL_*
  uint32_t masked_fill;
  // MOE_WEIGHTS_*
  uint32_t weights;
  // MOE_RENORM_*
  uint32_t renorm;
  // Whether experts have limited room.
  uint32_t has_capacity;
  // Serve tokens by their best score, not by position.
  uint32_t batch_prioritized;
  // Renormalise before dropping.
  uint32_t normalize_before_drop;
  // Whether noise is added to the logits.
  uint32_t has_noise_seed;
  // For MOE_SELECT_PRODUCT_KEYS: Doge's reading of the logits as two stacked matrices.
  uint32_t stacked_keys;
  // Factor on every logit; 1 changes nothing.
  float logit_multiplier;
  // c * tanh(z / c) when above 0.
  float logit_softcap;
  // For MOE_SELECT_SPARSE_MIXER.
  float jitter_eps;
  // The number that MOE_RENORM_* speaks of.
  float renorm_value;
  // Factor on every weight; 1 changes nothing.
  float scale;
} moe_router_config;

// A number format: one of MOE_DTYPE_*. 0 is none, so that a forgotten field is an error.
typedef uint32_t moe_dtype;

// A matrix that is read: element (i, j) is data[i * row_stride + j * col_stride], strides counted in elements.
//
// Strides are 0 or more (0 repeats a row or column); exchange them, and rows with cols, for the transpose. data is aligned to its elements, and may be NULL where
// there are none. Set reserved to 0.
typedef struct {
  // The first element.
  const void *data;
  // Bytes that may be read from data on; a matrix that would reach beyond is refused.
  size_t bytes;
  // Number of rows.
  size_t rows;
  // Number of columns.
  size_t cols;
  // Elements from one row to the next.
  ptrdiff_t row_stride;
  // Elements from one column to the next.
  ptrdiff_t col_stride;
  // MOE_DTYPE_*
  moe_dtype dtype;
  // 0
  uint32_t reserved;
} moe_matrix;

// What moe_route routes. Zeros (with struct_size) are the defaults of all but logits.
typedef struct {
  // sizeof(moe_route_input)
  size_t struct_size;
  // [T, R], any dtype; computed in f32.
  const moe_matrix *logits;
  // [T, R] for a router with a noise seed, else NULL.
  const moe_matrix *noise_logits;
  // [T, K] for MOE_SELECT_GIVEN, else NULL: below E + num_null, or -1.
  const int32_t *given_ids;
  // Elements of given_ids.
  size_t given_ids_len;
  // Position of the first token, for noise.
  uint64_t position;
  // Only pairs of experts first_local .. first_local + num_local get rows; num_local = 0 stands for all.
  size_t first_local;
  // See first_local.
  size_t num_local;
  // Each expert's rows begin at a multiple of this; 0 counts as 1.
  size_t row_alignment;
} moe_route_input;

// A routing that another router made.
typedef struct {
  // sizeof(moe_given_routing)
  size_t struct_size;
  // E
  size_t num_experts;
  // Pairs of a token.
  size_t slots;
  // Ids from E on.
  size_t num_null;
  // [T, slots]
  const int32_t *ids;
  // [T, slots]
  const float *weights;
  // T * slots: elements of ids and of weights.
  size_t num_pairs;
  // MOE_NULL_*
  uint32_t null_kind;
  // 0
  uint32_t reserved;
} moe_given_routing;

// A routing in its handle's memory: valid until the handle is used again or destroyed. Set struct_size.
typedef struct {
  // sizeof(moe_routing_view)
  size_t struct_size;
  // T
  size_t tokens;
  // Columns of ids and weights.
  size_t slots;
  // Columns of shared_weights.
  size_t joint_shared;
  // [T, slots]: an expert below E, a null expert from E on, -1 for none.
  const int32_t *ids;
  // [T, slots]: exactly what multiplies the expert.
  const float *weights;
  // [T, joint_shared]
  const float *shared_weights;
} moe_routing_view;

// A permutation in its handle's memory: valid until the handle is used again or destroyed. Set struct_size.
typedef struct {
  // sizeof(moe_permutation_view)
  size_t struct_size;
  // E
  size_t num_experts;
  // T * K, those without a row included.
  size_t num_pairs;
  // offsets[E], padding included.
  size_t num_rows;
  // [E + 1]: expert e has rows offsets[e] .. offsets[e + 1], padding included.
  const size_t *offsets;
  // [E]: rows of each expert without padding.
  const size_t *counts;
  // [num_rows]: the pair t * K + slot of a row; MOE_NONE for padding.
  const uint32_t *pair_of_row;
  // [num_pairs]: the row of a pair, or MOE_NONE.
  const uint32_t *row_of_pair;
} moe_permutation_view;

// The caller's arrays for ids and weights; NULL for those not wanted. Lengths in elements.
typedef struct {
  // sizeof(moe_routing_buffers)
  size_t struct_size;
  // [T, slots] or more
  int32_t *ids;
  // Elements of ids.
  size_t ids_len;
  // [T, slots] or more
  float *weights;
  // Elements of weights.
  size_t weights_len;
  // [T, joint_shared] or more
  float *shared_weights;
  // Elements of shared_weights.
  size_t shared_weights_len;
} moe_routing_buffers;

// The caller's arrays for a permutation; NULL for those not wanted, else at least as long as the view says. Lengths in elements.
typedef struct {
  // sizeof(moe_permutation_buffers)
  size_t struct_size;
  // [E + 1] or more
  size_t *offsets;
  // Elements of offsets.
  size_t offsets_len;
  // [E] or more
  size_t *counts;
  // Elements of counts.
  size_t counts_len;
  // [num_rows] or more
  uint32_t *pair_of_row;
  // Elements of pair_of_row.
  size_t pair_of_row_len;
  // [num_pairs] or more
  uint32_t *row_of_pair;
  // Elements of row_of_pair.
  size_t row_of_pair_len;
} moe_permutation_buffers;

// How to sort. Zeros (with struct_size) are the defaults.
typedef struct {
  // sizeof(moe_permute_options)
  size_t struct_size;
  // Each expert's rows begin at a multiple of this; 0 counts as 1.
  size_t block;
  // Pairs of experts first_local .. first_local + num_local get rows, others none; num_local = 0 stands for all experts.
  size_t first_local;
  // See first_local.
  size_t num_local;
  // Ids E .. E + num_null are allowed and get no rows.
  size_t num_null;
} moe_permute_options;

// A matrix that is written: element (i, j) is data[i * row_stride + j]. Rows may not overlap. What lies between rows is neither read nor written, but must not be
// part of the call's other memory.
typedef struct {
  // The first element.
  void *data;
  // Bytes that may be written from data on.
  size_t bytes;
  // Number of rows.
  size_t rows;
  // Number of columns.
  size_t cols;
  // Elements from one row to the next, at least cols where there are several rows.
  ptrdiff_t row_stride;
  // MOE_DTYPE_*
  moe_dtype dtype;
  // 0
  uint32_t reserved;
} moe_matrix_mut;

// Which rows belong to which expert, and where they come from.
typedef struct {
  // sizeof(moe_groups)
  size_t struct_size;
  // [experts + 1], ascending: where each expert's rows begin.
  const size_t *offsets;
  // [experts]: how many there are; offsets[e] + counts[e] <= offsets[e + 1].
  const size_t *counts;
  // As many as are packed.
  size_t experts;
  // For each row its pair t * slots + slot; NULL: row r is row r of x.
  const uint32_t *pair_of_row;
  // Elements of pair_of_row.
  size_t pair_of_row_len;
  // Pairs of a token.
  size_t slots;
  // [T * slots]: a factor on each pair's input; NULL for none.
  const float *input_scale;
  // Elements of input_scale.
  size_t input_scale_len;
} moe_groups;

// What happens between an expert's two products: act(gate) * up if gated, else act(up). SwiGLU: MOE_ACT_SILU, gated.
typedef struct {
  // sizeof(moe_activation)
  size_t struct_size;
  // MOE_ACT_*
  uint32_t function;
  // 1 for a gate and an up projection, 0 for one projection.
  uint32_t gated;
  // MOE_CLAMP_*
  uint32_t clamp;
  // The clamp's limit.
  float limit;
  // The clamp's second number.
  float alpha;
} moe_activation;

// One expert's weights as the caller has them: out-features first. Biases are f32, or NULL.
typedef struct {
  // sizeof(moe_expert_weights)
  size_t struct_size;
  // [I, H] (MOE_LAYOUT_SEPARATE, gated), else NULL.
  const moe_matrix *gate;
  // [I, H] (MOE_LAYOUT_SEPARATE), else NULL.
  const moe_matrix *up;
  // [2I, H] (the other layouts), else NULL.
  const moe_matrix *gate_up;
  // [H, I]
  const moe_matrix *down;
  // [I]
  const float *gate_bias;
  // Elements of gate_bias.
  size_t gate_bias_len;
  // [I]
  const float *up_bias;
  // Elements of up_bias.
  size_t up_bias_len;
  // [H]
  const float *down_bias;
  // Elements of down_bias.
  size_t down_bias_len;
  // MOE_LAYOUT_*
  uint32_t layout;
  // 0
  uint32_t reserved;
} moe_expert_weights;

// An RMS norm: x / sqrt(mean(x^2) + eps) * weight * multiplier.
typedef struct {
  // sizeof(moe_rms_norm)
  size_t struct_size;
  // [H], as it is applied.
  const float *weight;
  // H
  size_t len;
  // Under the root, 0 or more.
  float eps;
  // One more factor; 0 counts as 1.
  float multiplier;
} moe_rms_norm;

// The operands of moe_combine. NULL stands for a step that does not happen. For token t, in f32 and in this order:
//
// a = sum over slots of weights[t, slot] * ys[row_of_pair[t * slots + slot]]; a * routed_scale; shared experts; norm; + bias; + residual.
typedef struct {
  // sizeof(moe_combine_args)
  size_t struct_size;
  // [rows, H] f32, columns next to each other.
  const moe_matrix *ys;
  // [T * slots], or NULL for ones.
  const float *weights;
  // Elements of weights.
  size_t weights_len;
  // [T * slots]: rows of ys, or MOE_NONE.
  const uint32_t *row_of_pair;
  // Elements of row_of_pair.
  size_t row_of_pair_len;
  // Pairs of a token.
  size_t slots;
  // With identity experts: ids [T * slots], those from num_experts on return x.
  const int32_t *ids;
  // Elements of ids.
  size_t ids_len;
  // E, with identity experts.
  size_t num_experts;
  // [T, H], with identity experts.
  const moe_matrix *x;
  // [T, H] f32: the shared experts' output.
  const moe_matrix *shared;
  // [T] logits, for MOE_SHARED_SIGMOID_GATE.
  const float *shared_gate;
  // Elements of shared_gate.
  size_t shared_gate_len;
  // A norm over H.
  const moe_rms_norm *norm;
  // [H]
  const float *bias;
  // Elements of bias.
  size_t bias_len;
  // [T, H], any dtype.
  const moe_matrix *residual;
  // [T, H], any dtype.
  const moe_matrix_mut *out;
  // MOE_SHARED_*
  uint32_t shared_kind;
  // Factor on the sum; 1 changes nothing.
  float routed_scale;
} moe_combine_args;

// One call of a layer. Zeros (with struct_size) are the defaults of all but x, y and the workspace.
typedef struct {
  // sizeof(moe_forward)
  size_t struct_size;
  // [T, H], any dtype.
  const moe_matrix *x;
  // [T, H], any dtype; for moe_layer_route NULL.
  const moe_matrix_mut *y;
  // [T, R] logits of the caller; NULL: the layer's gate makes them.
  const moe_matrix *logits;
  // [T, K] for a router of MOE_SELECT_GIVEN, else NULL.
  const int32_t *given_ids;
  // Elements of given_ids.
  size_t given_ids_len;
  // Added to the result, [T, H], any dtype.
  const moe_matrix *residual;
  // Position of the first token, for noise.
  uint64_t position;
  // Memory to work in, of any content and alignment; see moe_layer_workspace_size.
  uint8_t *workspace;
  // Bytes of workspace.
  size_t workspace_bytes;
  // 1: the routing as it is (moe_routing_set_given, or an earlier call on these tokens).
  uint32_t use_routing;
  // 0
  uint32_t reserved;
} moe_forward;

// What the current context's device is. Set struct_size.
typedef struct {
  // sizeof(moe_cuda_device)
  size_t struct_size;
  // Major number of the compute capability: 9 for an H100.
  uint32_t compute_major;
  // Minor number.
  uint32_t compute_minor;
  // Multiprocessors.
  uint32_t sm_count;
  // Bytes of shared memory that one block may have.
  uint32_t shared_per_block;
  // Bytes of the L2 cache.
  uint64_t l2_bytes;
  // The CUDA version that the driver supports: 12040 for 12.4.
  uint32_t driver_version;
  // 0
  uint32_t reserved;
} moe_cuda_device;

// An address in a GPU's memory, 0 for none: a CUdeviceptr as it is, a pointer of the runtime API as (moe_device_ptr)(uintptr_t)p, a tensor's data_ptr(). An integer,
// so that nobody follows it on the host.
typedef uint64_t moe_device_ptr;

// A matrix in a GPU's memory, read or written: element (i, j) is data[i * row_stride + j].
//
// data is aligned to its elements, and may be 0 where there are none. 16-byte alignment of data and of the rows is fastest. Set reserved to 0.
typedef struct {
  // The first element.
  moe_device_ptr data;
  // Bytes that may be used from data on; a matrix that would reach beyond is refused.
  size_t bytes;
  // Number of rows.
  size_t rows;
  // Number of columns.
  size_t cols;
  // Elements from one row to the next, at least cols where there are several rows.
  ptrdiff_t row_stride;
  // MOE_DTYPE_*
  moe_dtype dtype;
  // 0
  uint32_t reserved;
} moe_device_matrix;

// Equally shaped matrices in a GPU's memory, one for each expert: element (e, i, j) is data[e * expert_stride + i * row_stride + j]. Out-features are rows.
typedef struct {
  // The first element.
  moe_device_ptr data;
  // Bytes that may be read from data on; weights that would reach beyond are refused.
  size_t bytes;
  // Number of matrices.
  size_t experts;
  // Rows of each.
  size_t rows;
  // Columns of each.
  size_t cols;
  // Elements from one matrix to the next, 0 or more.
  ptrdiff_t expert_stride;
  // Elements from one row to the next, at least cols where there are several rows.
  ptrdiff_t row_stride;
  // MOE_DTYPE_*
  moe_dtype dtype;
  // 0
  uint32_t reserved;
} moe_device_weights;

// The experts' weights in the GPU's memory, where the caller has them. Absent matrices are NULL. Biases may be of any dtype, one for a product.
typedef struct {
  // sizeof(moe_cuda_expert_weights)
  size_t struct_size;
  // [E, I, H] (MOE_LAYOUT_SEPARATE, gated), else NULL. E counts the experts that the layer holds.
  const moe_device_weights *gate;
  // [E, I, H] (MOE_LAYOUT_SEPARATE), else NULL.
  const moe_device_weights *up;
  // [E, 2I, H] (the other layouts), else NULL.
  const moe_device_weights *gate_up;
  // [E, H, I]
  const moe_device_weights *down;
  // [E, I] (MOE_LAYOUT_SEPARATE, gated)
  const moe_device_matrix *gate_bias;
  // [E, I] (MOE_LAYOUT_SEPARATE)
  const moe_device_matrix *up_bias;
  // [E, 2I] (the other layouts), laid out as gate_up is.
  const moe_device_matrix *gate_up_bias;
  // [E, H]
  const moe_device_matrix *down_bias;
  // MOE_LAYOUT_*
  uint32_t layout;
  // 0
  uint32_t reserved;
} moe_cuda_expert_weights;

// An RMS norm in the GPU's memory: x / sqrt(mean(x^2) + eps) * weight * multiplier.
typedef struct {
  // sizeof(moe_cuda_rms_norm)
  size_t struct_size;
  // [H] f32, as it is applied.
  moe_device_ptr weight;
  // H
  size_t len;
  // Under the root, 0 or more.
  float eps;
  // One more factor; 0 counts as 1.
  float multiplier;
} moe_cuda_rms_norm;

// One call of a layer on the GPU. The routing comes from exactly one of gate, logits, and ids with weights. Zeros (with struct_size) are the defaults of what
// else is not needed. Structs are read during the call; memory of the GPU is used until the stream has run what was queued.
typedef struct {
  // sizeof(moe_cuda_forward)
  size_t struct_size;
  // [T, H] of the layer's dtype.
  const moe_device_matrix *x;
  // [T, H], any dtype.
  const moe_device_matrix *y;
  // [R, H], any dtype: logits = x * gate^T + gate_bias, exact f32.
  const moe_device_matrix *gate;
  // [R] f32
  moe_device_ptr gate_bias;
  // Elements of gate_bias.
  size_t gate_bias_len;
  // [T, R], any dtype.
  const moe_device_matrix *logits;
  // [T, K] int32, as they are: the router is not asked. Ids that name no expert count as dropped.
  moe_device_ptr ids;
  // Elements of ids.
  size_t ids_len;
  // [T, K] f32, with ids.
  moe_device_ptr weights;
  // Elements of weights.
  size_t weights_len;
  // [T, K] int32 for a router of MOE_SELECT_GIVEN, with gate or logits.
  moe_device_ptr given_ids;
  // Elements of given_ids.
  size_t given_ids_len;
  // [E + num_null] f32, added to what the selection ranks; wanted when the router had one.
  moe_device_ptr correction_bias;
  // Elements of correction_bias.
  size_t correction_bias_len;
  // [E] f32, a factor on each expert's weights; wanted when the router had one.
  moe_device_ptr per_expert_scale;
  // Elements of per_expert_scale.
  size_t per_expert_scale_len;
  // [T, R] for a router with a noise seed, of the logits' dtype (f32 with gate).
  const moe_device_matrix *noise_logits;
  // Position of the first token, for noise.
  uint64_t position;
  // The experts.
  const moe_cuda_expert_weights *experts;
  // The shared expert, with E = 1, when and only when the layer has one.
  const moe_cuda_expert_weights *shared;
  // [1, H] for MOE_JOIN_SIGMOID_GATE, any dtype.
  const moe_device_matrix *shared_gate;
  // Normalises the output, after the shared expert.
  const moe_cuda_rms_norm *out_norm;
  // [H] f32, added after the norm.
  moe_device_ptr out_bias;
  // Elements of out_bias.
  size_t out_bias_len;
  // [T, H], any dtype, added last. May be y itself: the same data, stride and dtype.
  const moe_device_matrix *residual;
  // Memory to work in, of any content and alignment; see moe_cuda_layer_workspace_size. Calls that may run at the same time need one each.
  moe_device_ptr workspace;
  // Bytes of workspace.
  size_t workspace_bytes;
} moe_cuda_forward;

// What a layer on the GPU does. Zeros (with struct_size) are the defaults of all but hidden, intermediate, activation and dtype.
typedef struct {
  // sizeof(moe_cuda_layer_config)
  size_t struct_size;
  // H
  size_t hidden;
  // I
  size_t intermediate;
  // Between the experts' products.
  const moe_activation *activation;
  // The layer holds experts first_local .. first_local + num_local of the router's and skips the pairs of others (expert parallelism: outputs add up). Identity experts belong
  // to the layer that holds expert 0.
  size_t first_local;
  // See first_local; 0 stands for all experts.
  size_t num_local;
  // I of the expert that every token visits; 0: there is none. Several that only add up are one whose I is the sum of theirs.
  size_t shared_intermediate;
  // Its activation; NULL: that of the others.
  const moe_activation *shared_activation;
  // How it joins: MOE_JOIN_ADD, MOE_JOIN_SIGMOID_GATE or MOE_JOIN_AVERAGE.
  uint32_t shared_join;
  // MOE_DTYPE_* of x and of what is between the products. Weights in the same dtype go to tensor cores; others are computed exactly.
  moe_dtype dtype;
  // MOE_DTYPE_* of the experts' outputs until they are summed; 0: f32. 16 bits are half the traffic and one rounding more.
  moe_dtype ys_dtype;
  // MOE_CUDA_*
  uint32_t numerics;
  // 1: a token has the same bits whatever the number of tokens; the kernels for few rows, which sum in another order, are not used.
  uint32_t strict;
  // 1: a pair's weight multiplies the expert's input instead of its output (Llama 4).
  uint32_t weight_on_input;
  // A factor on the routed sum, before the shared expert; 0 counts as 1.
  float routed_scale;
  // 0
  uint32_t reserved;
} moe_cuda_layer_config;

// What moe_cuda_route reads and writes. Zeros (with struct_size) are the defaults of what the router does not want.
typedef struct {
  // sizeof(moe_cuda_route_args)
  size_t struct_size;
  // [T, R], any dtype; computed in f32.
  const moe_device_matrix *logits;
  // [T, R] of the same dtype for a router with a noise seed, else NULL.
  const moe_device_matrix *noise_logits;
  // [T, K] int32 for MOE_SELECT_GIVEN, else 0. An id that names no expert counts as dropped.
  moe_device_ptr given_ids;
  // Elements of given_ids.
  size_t given_ids_len;
  // [E + num_null] f32; wanted when the router has one on the host.
  moe_device_ptr correction_bias;
  // Elements of correction_bias.
  size_t correction_bias_len;
  // [E] f32; wanted when the router has one on the host.
  moe_device_ptr per_expert_scale;
  // Elements of per_expert_scale.
  size_t per_expert_scale_len;
  // Position of the first token, for noise.
  uint64_t position;
  // Out: [T, slots] int32 or more.
  moe_device_ptr ids;
  // Elements of ids.
  size_t ids_len;
  // Out: [T, slots] f32 or more.
  moe_device_ptr weights;
  // Elements of weights.
  size_t weights_len;
  // Out: [T, joint_shared] f32 or more, for such routers.
  moe_device_ptr shared_weights;
  // Elements of shared_weights.
  size_t shared_weights_len;
  // At a multiple of 8 bytes; see moe_cuda_route_workspace_size.
  moe_device_ptr workspace;
  // Bytes of workspace.
  size_t workspace_bytes;
} moe_cuda_route_args;

// What moe_cuda_permute reads and writes.
typedef struct {
  // sizeof(moe_cuda_permute_args)
  size_t struct_size;
  // E
  size_t num_experts;
  // How to sort, or NULL.
  const moe_permute_options *options;
  // [T * K] int32; ids that name no expert get no row.
  moe_device_ptr ids;
  // Elements of ids: the number of pairs.
  size_t ids_len;
  // Out: [E] int32 or more: rows of each expert without padding.
  moe_device_ptr counts;
  // Elements of counts.
  size_t counts_len;
  // Out: [E + 1] int32 or more: expert e has rows offsets[e] .. offsets[e + 1], padding included.
  moe_device_ptr offsets;
  // Elements of offsets.
  size_t offsets_len;
  // Out: [max_rows] uint32 or more, see moe_cuda_permute_sizes: the pair of a row; MOE_NONE for padding and, up to max_rows, from offsets[E] on.
  moe_device_ptr pair_of_row;
  // Elements of pair_of_row.
  size_t pair_of_row_len;
  // Out: [T * K] uint32 or more: the row of a pair, or MOE_NONE.
  moe_device_ptr row_of_pair;
  // Elements of row_of_pair.
  size_t row_of_pair_len;
  // At a multiple of 4 bytes; see moe_cuda_permute_sizes.
  moe_device_ptr workspace;
  // Bytes of workspace.
  size_t workspace_bytes;
} moe_cuda_permute_args;

// out[i] = src[index[i] / divisor], zeros where index[i] is MOE_NONE or leads beyond src.
//
// Tokens to rows: index = pair_of_row, divisor = K, used = the address of offsets[E]. Rows back to pairs: index = row_of_pair, divisor = 1. The grouped product gathers by itself.
typedef struct {
  // sizeof(moe_cuda_copy_args)
  size_t struct_size;
  // [src_rows, H]
  const moe_device_matrix *src;
  // [rows, H] of the same dtype.
  const moe_device_matrix *out;
  // [rows] uint32 or more.
  moe_device_ptr index;
  // Elements of index.
  size_t index_len;
  // One int32: rows of out from this one on are left as they are. 0: all are written.
  moe_device_ptr used;
  // What indices are divided by, at least 1.
  size_t divisor;
} moe_cuda_copy_args;

// out[r] = act(a[src(r)] * W[e]^T + bias[e]) for the rows r of each expert e, offsets[e] .. offsets[e] + counts[e]; src(r) = pair_of_row[r] / slots, or r without
// pair_of_row. Rows of no expert, such as padding, are left as they are.
typedef struct {
  // sizeof(moe_cuda_gemm_args)
  size_t struct_size;
  // [a_rows, K]
  const moe_device_matrix *a;
  // [rows] uint32 or more, from a sort; 0: row r of out is row r of a.
  moe_device_ptr pair_of_row;
  // Elements of pair_of_row.
  size_t pair_of_row_len;
  // Pairs of a token, with pair_of_row.
  size_t slots;
  // [a_rows * slots] f32, a factor on each pair's input, with pair_of_row; 0 for none.
  moe_device_ptr input_scale;
  // Elements of input_scale.
  size_t input_scale_len;
  // [E + 1] int32 or more; 0, and counts too: all rows are the first matrix's.
  moe_device_ptr offsets;
  // Elements of offsets.
  size_t offsets_len;
  // [E] int32 or more.
  moe_device_ptr counts;
  // Elements of counts.
  size_t counts_len;
  // [E, N, K], with a gated activation only.
  const moe_device_weights *gate;
  // [E, N, K]
  const moe_device_weights *up;
  // [E, N] or NULL.
  const moe_device_matrix *gate_bias;
  // [E, N] or NULL, of gate_bias's dtype.
  const moe_device_matrix *up_bias;
  // What happens to the sums; NULL: nothing.
  const moe_activation *activation;
  // [rows, N], any dtype.
  const moe_device_matrix *out;
  // MOE_CUDA_*
  uint32_t numerics;
  // 1: a row has the same bits whatever the number of rows.
  uint32_t strict;
} moe_cuda_gemm_args;

// The operands of moe_cuda_combine, those of moe_combine_args in the GPU's memory. For token t, in f32 and in this order:
//
// a = sum over slots of weights[t, slot] * ys[row_of_pair[t * slots + slot]]; a * routed_scale; shared experts; norm; + bias; + residual.
typedef struct {
  // sizeof(moe_cuda_combine_args)
  size_t struct_size;
  // [rows, H], any dtype.
  const moe_device_matrix *ys;
  // [T * slots] f32, or 0 for ones.
  moe_device_ptr weights;
  // Elements of weights.
  size_t weights_len;
  // [T * slots] uint32: rows of ys; MOE_NONE or beyond: passed over.
  moe_device_ptr row_of_pair;
  // Elements of row_of_pair.
  size_t row_of_pair_len;
  // Pairs of a token.
  size_t slots;
  // With identity experts: ids [T * slots] int32, those from num_experts on return x.
  moe_device_ptr ids;
  // Elements of ids.
  size_t ids_len;
  // E, with identity experts.
  size_t num_experts;
  // [T, H], with identity experts.
  const moe_device_matrix *x;
  // [T, H], any dtype: the shared experts' output.
  const moe_device_matrix *shared;
  // [T] f32 logits, for MOE_SHARED_SIGMOID_GATE.
  moe_device_ptr shared_gate;
  // Elements of shared_gate.
  size_t shared_gate_len;
  // A norm over H.
  const moe_cuda_rms_norm *norm;
  // [H] f32
  moe_device_ptr bias;
  // Elements of bias.
  size_t bias_len;
  // [T, H], any dtype. May be out itself: the same data, stride and dtype.
  const moe_device_matrix *residual;
  // [T, H], any dtype.
  const moe_device_matrix *out;
  // MOE_SHARED_*
  uint32_t shared_kind;
  // Factor on the sum; 1 changes nothing.
  float routed_scale;
} moe_cuda_combine_args;

// Done.
#define MOE_OK 0
// A matrix or array has the wrong number of rows, columns or elements.
#define MOE_ERROR_SHAPE 1
// A number is outside its range: a negative stride, an id that names no expert, a constant that means nothing.
#define MOE_ERROR_VALUE 2
// A buffer is too short.
#define MOE_ERROR_BUFFER_TOO_SMALL 3
// A product of sizes does not fit its type.
#define MOE_ERROR_OVERFLOW 4
// Weights were packed on another instruction set than the one that was asked to run.
#define MOE_ERROR_PACKED_FOR 5
// This CPU, this GPU or its driver, or this build, lacks what was asked for.
#define MOE_ERROR_UNSUPPORTED 6
// A name means nothing here.
#define MOE_ERROR_UNKNOWN_NAME 7
// A pointer is NULL that may not be.
#define MOE_ERROR_NULL 8
// A pointer is not a multiple of its element's size.
#define MOE_ERROR_MISALIGNED 9
// Memory that would be written overlaps other memory of the call.
#define MOE_ERROR_OVERLAP 10
// A struct's struct_size is none that this library knows.
#define MOE_ERROR_STRUCT_SIZE 11
// A handle is of another kind or was destroyed. Found by luck, not by promise: a destroyed handle's memory may hold anything.
#define MOE_ERROR_HANDLE 12
// A handle is in use by another call that changes it, or would be changed while in use.
#define MOE_ERROR_BUSY 13
// Memory (the GPU's included) or threads could not be had.
#define MOE_ERROR_OUT_OF_RESOURCES 14
// A bug in this library was caught; outputs of the call hold anything. Please report the text.
#define MOE_ERROR_INTERNAL 15
// The CUDA driver refused a call; the text has the call, the CUresult and its meaning. Earlier work of the stream that went wrong may show here, too.
#define MOE_ERROR_DRIVER 16
// IEEE binary32.
#define MOE_DTYPE_F32 1
// IEEE binary16.
#define MOE_DTYPE_F16 2
// bfloat16: the upper half of a binary32.
#define MOE_DTYPE_BF16 3

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The MOE_ABI_VERSION of the library, to be compared with the header's when a program starts.
uint32_t moe_abi_version(void);

// The library's version, such as "0.1.0". Never NULL; lives for ever.
const char *moe_version(void);

// The text of this thread's last error, in English and UTF-8; "" when there was none. Successful calls leave it. Valid until the next error of this thread;
// not to be freed.
const char *moe_last_error(void);

// A status in one word, such as "shape". Never NULL; lives for ever.
const char *moe_status_name(moe_status status);

// Makes a handle; options may be NULL. No other function of this library starts threads. The threads do not survive fork(): make the handle in the child.
//
// Errors: MOE_ERROR_UNKNOWN_NAME, MOE_ERROR_UNSUPPORTED (isa; threads > 1 in a library built without the feature `parallel`), MOE_ERROR_VALUE (threads > 4096),
// MOE_ERROR_OUT_OF_RESOURCES.
moe_status moe_cpu_create(const moe_cpu_options *options,
                          moe_cpu **out);

// Ends the handle and its threads. NULL is allowed. MOE_ERROR_BUSY while a call uses it.
moe_status moe_cpu_destroy(moe_cpu *cpu);

// The number of threads that calls run on; 0 for a handle that is none.
size_t moe_cpu_threads(const moe_cpu *cpu);

// The instruction set's name; "" for a handle that is none. Lives for ever.
const char *moe_cpu_isa(const moe_cpu *cpu);

// Bytes of scratch that the matrix products need on this handle; 0 for a handle that is none.
size_t moe_scratch_bytes(const moe_cpu *cpu);

// Fills a config: softmax over all, the K best by score, weights as they are. struct_size must be set.
moe_status moe_router_config_init(moe_router_config *config, size_t num_experts, size_t top_k);

// Fills a config with what a published family does. struct_size must be set.
//
// Names: mixtral, qwen3_moe, qwen2_moe, olmoe, deepseek_v2, gpt_oss, granite, deepseek_v3, glm4_moe, kimi_k2, minimax_m2, lfm2_moe, cohere2_sigmoid, kolibri1,
// llama4, ernie4_5, deepseek_v4. What differs between a family's models stays to be set: scale (1 here), and n_group, topk_group (1 here) of deepseek_v3.
//
// Errors: MOE_ERROR_UNKNOWN_NAME, MOE_ERROR_NULL, MOE_ERROR_STRUCT_SIZE.
moe_status moe_router_config_family(moe_router_config *config,
                                    const char *family,
                                    size_t num_experts,
                                    size_t top_k);

// Makes a router. Errors: MOE_ERROR_VALUE naming the field, and those of the struct.
moe_status moe_router_create(const moe_router_config *config, moe_router **out);

// Replaces the correction bias, bias[len], len = E + num_null: added to what the selection ranks, never to a weight. -inf is allowed.
//
// Errors: MOE_ERROR_SHAPE, MOE_ERROR_VALUE (NaN, +inf, a selection that ranks nothing).
moe_status moe_router_set_correction_bias(moe_router *router, const float *bias, size_t len);

// Multiplies the weight of expert e by scale[e], len = E, after everything else. Errors: MOE_ERROR_SHAPE, MOE_ERROR_VALUE.
moe_status moe_router_set_per_expert_scale(moe_router *router, const float *scale, size_t len);

// R: columns of the logits; 0 for a handle that is none.
size_t moe_router_num_logits(const moe_router *router);

// Columns of ids and weights: K, or E where every expert may serve a token; 0 for a handle that is none.
size_t moe_router_slots(const moe_router *router);

// Ends a handle. NULL is allowed. MOE_ERROR_BUSY while a call uses it.
moe_status moe_router_destroy(moe_router *router);

// Makes an empty routing, which grows when it is used.
moe_status moe_routing_create(moe_routing **out);

// Makes room, so that moe_route and moe_layer_forward of up to max_tokens tokens by this router allocate nothing. What the routing held is gone.
moe_status moe_routing_reserve(const moe_cpu *cpu,
                               moe_routing *routing,
                               const moe_router *router,
                               size_t max_tokens);

// Ends a handle. NULL is allowed. MOE_ERROR_BUSY while a call uses it.
moe_status moe_routing_destroy(moe_routing *routing);

// Routes T tokens: ids, weights and the permutation into routing. Ids are distinct and in range however bad the logits are.
//
// Errors: MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_OVERFLOW, and those of pointers; the routing is then unchanged.
moe_status moe_route(const moe_cpu *cpu, const moe_router *router, const moe_route_input *input, moe_routing *routing);

// Takes ids and weights from the caller: hash routing, or any framework's own router.
//
// Errors: MOE_ERROR_SHAPE, MOE_ERROR_VALUE for an id out of range, MOE_ERROR_OVERFLOW; the routing is then unchanged.
moe_status moe_routing_set_given(const moe_cpu *cpu, moe_routing *routing, const moe_given_routing *given);

// Shows ids and weights in the handle's own memory.
moe_status moe_routing_get(const moe_routing *routing, moe_routing_view *view);

// Shows the permutation in the handle's own memory.
moe_status moe_routing_get_permutation(const moe_routing *routing, moe_permutation_view *view);

// Copies ids and weights into the caller's arrays. Errors: MOE_ERROR_BUFFER_TOO_SMALL naming the array; nothing is written then.
moe_status moe_routing_read(const moe_routing *routing, const moe_routing_buffers *buffers);

// As moe_permutation_read, of a routing.
moe_status moe_routing_read_permutation(const moe_routing *routing, const moe_permutation_buffers *buffers);

// Makes an empty one; it grows when it sorts, and sorting as much again allocates nothing.
moe_status moe_permutation_create(moe_permutation **out);

// Ends a handle. NULL is allowed.
moe_status moe_permutation_destroy(moe_permutation *p);

// Sorts ids[num_pairs] (T * K) by expert, stably; -1 is a pair without expert. options may be NULL.
//
// Errors: MOE_ERROR_VALUE for an id below -1 or from E + num_null on, E = 0, locals outside 0..E; MOE_ERROR_OVERFLOW. The permutation is then what it was.
moe_status moe_permutation_sort(const moe_cpu *cpu,
                                moe_permutation *p,
                                const int32_t *ids,
                                size_t num_pairs,
                                size_t num_experts,
                                const moe_permute_options *options);

// Shows the permutation in the handle's own memory.
moe_status moe_permutation_get(const moe_permutation *p, moe_permutation_view *view);

// Copies the permutation into the caller's arrays. Errors: MOE_ERROR_BUFFER_TOO_SMALL naming the array; nothing is written then.
moe_status moe_permutation_read(const moe_permutation *p, const moe_permutation_buffers *buffers);

// out[row] = x[pair_of_row[row] / slots], zeros in padding rows. x [T, H], out [num_rows, H] of the same dtype; slots is K.
moe_status moe_permute_rows(const moe_cpu *cpu, const moe_permutation *p, const moe_matrix *x, size_t slots, const moe_matrix_mut *out);

// out[pair] = ys[row_of_pair[pair]], zeros for pairs without a row. ys [num_rows, H], out [num_pairs, H] of the same dtype.
moe_status moe_unpermute_rows(const moe_cpu *cpu, const moe_permutation *p, const moe_matrix *ys, const moe_matrix_mut *out);

// Makes an empty set of [n, k] matrices kept in dtype; gated = 1 for pairs of a gate and an up matrix.
//
// Errors: MOE_ERROR_VALUE for a zero size, an unknown dtype or flag; MOE_ERROR_OVERFLOW.
moe_status moe_matrices_create(const moe_cpu *cpu, size_t n, size_t k, moe_dtype format, uint32_t gated, moe_matrices **out);

// Ends a handle. NULL is allowed. MOE_ERROR_BUSY while a call uses it.
moe_status moe_matrices_destroy(moe_matrices *set);

// Packs one more expert: up [N, K], with gate [N, K] in a gated set and gate = NULL in a plain one; biases [N] f32 or NULL. Rounded to the set's dtype.
//
// Errors: MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_PACKED_FOR, MOE_ERROR_OUT_OF_RESOURCES; the set is unchanged then.
moe_status moe_matrices_push(const moe_cpu *cpu,
                             moe_matrices *set,
                             const moe_matrix *gate,
                             const moe_matrix *up,
                             const float *gate_bias,
                             const float *up_bias,
                             size_t bias_len);

// The number of experts in the set; 0 for a handle that is none.
size_t moe_matrices_len(const moe_matrices *set);

// The grouped product: out[r] = act(A[r] * W[e]^T + b[e]) for each row r of each expert e, A[r] = x[pair_of_row[r] / slots], or x[r].
//
// out is [rows, N] of any dtype, rows = offsets[experts]; padding rows are left as they are. activation: as the set is gated or not; NULL for a plain product. scratch: moe_scratch_bytes(cpu) bytes of any
// content and alignment.
//
// Errors: those of pointers, MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_PACKED_FOR; nothing is written then.
moe_status moe_grouped_gemm(const moe_cpu *cpu,
                            const moe_matrices *weights,
                            const moe_matrix *x,
                            const moe_groups *groups,
                            const moe_activation *act,
                            const moe_matrix_mut *out,
                            uint8_t *scratch,
                            size_t scratch_bytes);

// Makes an empty set of experts hidden -> intermediate -> hidden, with weights kept in dtype.
//
// Errors: MOE_ERROR_VALUE for a zero size, an activation or dtype that is none; MOE_ERROR_OVERFLOW.
moe_status moe_experts_create(const moe_cpu *cpu,
                              size_t hidden,
                              size_t intermediate,
                              const moe_activation *act,
                              moe_dtype format,
                              moe_experts **out);

// Ends a handle. NULL is allowed. MOE_ERROR_BUSY while a call uses it.
moe_status moe_experts_destroy(moe_experts *experts);

// Packs one more expert. Its weights may be freed afterwards. They are rounded to the set's dtype where theirs differs.
//
// Errors: those of pointers, MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_PACKED_FOR, MOE_ERROR_OUT_OF_RESOURCES; the set is unchanged then.
moe_status moe_experts_push(const moe_cpu *cpu, moe_experts *experts, const moe_expert_weights *weights);

// The number of experts in the set; 0 for a handle that is none.
size_t moe_experts_len(const moe_experts *experts);

// Bytes of the packed weights; 0 for a handle that is none.
size_t moe_experts_bytes(const moe_experts *experts);

// Both products: h = act(A * W_gate_up^T + b) [rows, I], ys = h * W_down^T + b [rows, H], for the rows of each expert. h is usually of x's dtype. scratch as in
// moe_grouped_gemm.
//
// Errors: those of pointers, MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_PACKED_FOR; nothing is written then.
moe_status moe_experts_forward(const moe_cpu *cpu,
                               const moe_experts *experts,
                               const moe_matrix *x,
                               const moe_groups *groups,
                               const moe_matrix_mut *h,
                               const moe_matrix_mut *ys,
                               uint8_t *scratch,
                               size_t scratch_bytes);

// Combines the experts' rows into out [T, H]. Allocates only for a norm.
//
// Errors: those of pointers, MOE_ERROR_SHAPE, MOE_ERROR_VALUE; nothing is written then.
moe_status moe_combine(const moe_cpu *cpu, const moe_combine_args *args);

// Makes a layer of a router (copied) and experts (taken over: *experts becomes NULL, and stays the caller's on error). Give it a gate unless every call brings logits
// or routing.
//
// Errors: MOE_ERROR_VALUE when there are no experts, or more than the router knows.
moe_status moe_layer_create(const moe_router *router,
                            moe_experts **experts,
                            moe_layer **out);

// As moe_layer_create, with experts that work in a latent space: w_in [L, H], w_out [H, L], kept in dtype; L is the experts' hidden size. norm [L] normalises the latent
// input, or is NULL.
moe_status moe_layer_create_latent(const moe_cpu *cpu,
                                   const moe_router *router,
                                   moe_experts **experts,
                                   const moe_matrix *w_in,
                                   const moe_matrix *w_out,
                                   moe_dtype format,
                                   const moe_rms_norm *norm,
                                   moe_layer **out);

// Ends a handle. NULL is allowed. MOE_ERROR_BUSY while a call uses it.
moe_status moe_layer_destroy(moe_layer *layer);

// Gives the layer its gate: logits = norm(x) * w^T + b in f32, w [R, H] of any dtype, bias[bias_len] = [R] or NULL; noise [R, H] for a router with a noise seed, else
// NULL; input_norm over H, or NULL.
//
// Errors: MOE_ERROR_SHAPE, MOE_ERROR_VALUE; the layer is unchanged then. So it is for all functions moe_layer_set_*.
moe_status moe_layer_set_gate(const moe_cpu *cpu,
                              moe_layer *layer,
                              const moe_matrix *w,
                              const float *gate_bias,
                              size_t bias_len,
                              const moe_matrix *noise,
                              const moe_rms_norm *input_norm);

// Adds experts that every token visits. experts are taken over: *experts becomes NULL, and stays the caller's on error. gate: [1, H] for MOE_JOIN_SIGMOID_GATE, else
// NULL.
moe_status moe_layer_set_shared(const moe_cpu *cpu,
                                moe_layer *layer,
                                moe_experts **experts,
                                uint32_t join,
                                const moe_matrix *gate);

// The layer holds experts first, first + 1, ... of the router's; pairs of others are skipped (expert parallelism: the layers' outputs add up).
moe_status moe_layer_set_first_expert(moe_layer *layer,
                                      size_t first);

// 1: a pair's weight multiplies the expert's input instead of its output (Llama 4). 0: the output.
moe_status moe_layer_set_weight_on_input(moe_layer *layer, uint32_t on);

// A finite factor on the routed sum, before shared experts.
moe_status moe_layer_set_routed_scale(moe_layer *layer, float scale);

// Normalises each expert's output before its weight; scale_first = 1: o * weight / sqrt(mean((o * weight)^2) + eps) (Muse Spark).
moe_status moe_layer_set_post_norm(moe_layer *layer, const moe_rms_norm *norm, uint32_t scale_first);

// Normalises the layer's output, after shared experts.
moe_status moe_layer_set_out_norm(moe_layer *layer, const moe_rms_norm *norm);

// Adds bias[len], len = H, to the output, after the norm.
moe_status moe_layer_set_out_bias(moe_layer *layer, const float *out_bias, size_t len);

// Replaces the router's correction bias, as after a step of training: bias[len], len = E + num_null.
moe_status moe_layer_set_correction_bias(moe_layer *layer, const float *correction_bias, size_t len);

// *bytes: what moe_layer_forward, moe_layer_route and moe_layer_logits need as workspace for up to max_tokens tokens on this handle.
moe_status moe_layer_workspace_size(const moe_cpu *cpu, const moe_layer *layer, size_t max_tokens, size_t *bytes);

// The layer: y [T, H] from x [T, H]. routing receives ids, weights and the permutation. Once the routing has been as large, nothing is allocated.
//
// The bits depend on neither instruction set, threads, nor the other tokens (routers that look at several tokens aside). y may not overlap x: a residual stream is given as residual,
// and y is another buffer.
//
// Errors: those of pointers, MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_BUFFER_TOO_SMALL, MOE_ERROR_PACKED_FOR; y is untouched then.
moe_status moe_layer_forward(const moe_cpu *cpu,
                             const moe_layer *layer,
                             moe_routing *routing,
                             const moe_forward *args);

// The router's stage alone: logits through the gate, ids, weights and the permutation into routing. moe_layer_forward with use_routing finishes the layer.
moe_status moe_layer_route(const moe_cpu *cpu,
                           const moe_layer *layer,
                           moe_routing *routing,
                           const moe_forward *args);

// The gate's logits [T, R] in f32, before multiplier, softcap and noise.
//
// Errors: as moe_layer_forward; MOE_ERROR_VALUE when the layer has no gate.
moe_status moe_layer_logits(const moe_cpu *cpu,
                            const moe_layer *layer,
                            const moe_matrix *x,
                            const moe_matrix_mut *logits,
                            uint8_t *workspace,
                            size_t workspace_bytes);

// Load balancing as in HF transformers: E * sum over e of f_e * P_e; logits [L * T, E], mask [T] or NULL, grad [L * T, E] or NULL. *value receives the loss.
//
// Errors: MOE_ERROR_VALUE, MOE_ERROR_SHAPE, those of pointers; nothing is written then. Allocates scratch.
moe_status moe_load_balancing_loss(const moe_cpu *cpu,
                                   const moe_matrix *logits,
                                   size_t top_k,
                                   const float *mask,
                                   size_t mask_len,
                                   float *grad,
                                   size_t grad_len,
                                   double *value);

// Load balancing as in Switch Transformers: K = 1 within each group of group_tokens tokens, averaged. As moe_load_balancing_loss otherwise.
moe_status moe_switch_load_balancing_loss(const moe_cpu *cpu,
                                          const moe_matrix *logits,
                                          size_t group_tokens,
                                          float *grad,
                                          size_t grad_len,
                                          double *value);

// Router z-loss: mean over rows of logsumexp^2. As moe_load_balancing_loss otherwise.
moe_status moe_router_z_loss(const moe_cpu *cpu, const moe_matrix *logits, float *grad, size_t grad_len, double *value);

// Balancing without a loss: bias[e] += rate * sign(mean load - load[e]), both of len elements; load as the permutation's counts.
moe_status moe_update_bias(float *bias, const size_t *load, size_t len, float rate);

// 1 when a driver is there and a GPU that the kernels run on (compute capability 8.0 or later), else 0, and moe_last_error() says what is missing. Starts the driver,
// makes no context.
uint32_t moe_cuda_is_available(void);

// Describes the device of the context that is current on the calling thread.
//
// Errors: MOE_ERROR_UNSUPPORTED without a driver, a current context, or a GPU of compute capability 8.0; those of the struct.
moe_status moe_cuda_device_query(moe_cuda_device *device);

// Loads the kernels that such a call needs and queues nothing: loading takes the driver's compiler some time, and is not allowed while a stream is being captured. The
// addresses are not followed.
//
// Errors: as moe_cuda_layer_forward.
moe_status moe_cuda_layer_prepare(const moe_cuda_layer *layer,
                                  const moe_cuda_forward *args);

// The layer: y [T, H] from x [T, H], queued on stream, a CUstream or cudaStream_t of the context that is current on the calling thread. Allocates no memory of the GPU, waits
// for nothing and reads nothing back, so that it can be captured in a graph once its kernels are loaded: by moe_cuda_layer_prepare, or by an earlier call.
//
// Ids and weights have the CPU's bits; f32 experts and MOE_CUDA_EXACT give them all the way to y. y may not overlap x.
//
// Errors: those of pointers, MOE_ERROR_SHAPE, MOE_ERROR_VALUE, MOE_ERROR_BUFFER_TOO_SMALL, MOE_ERROR_UNSUPPORTED without a driver, context or able GPU: nothing is queued then.
// MOE_ERROR_DRIVER: what had been queued before still runs, and y may hold anything.
moe_status moe_cuda_layer_forward(const moe_cuda_layer *layer,
                                  void *stream,
                                  const moe_cuda_forward *args);

// Makes a layer. The router is copied and serves layers on the CPU as well; what it says is done here, but its correction bias and per-expert scale come with each
// call, in the GPU's memory: a call that lacks one that the router had here is refused. Needs no driver.
//
// Errors: MOE_ERROR_VALUE naming the field: a zero size, an activation or constant that is none, local experts that are not the router's, and what runs on the CPU
// only (docs/gpu.md).
moe_status moe_cuda_layer_create(const moe_router *router,
                                 const moe_cuda_layer_config *config,
                                 moe_cuda_layer **out);

// Ends a handle. NULL is allowed. MOE_ERROR_BUSY while a call uses it; work that is queued does not.
moe_status moe_cuda_layer_destroy(moe_cuda_layer *layer);

// *bytes: the workspace in the GPU's memory that moe_cuda_layer_forward needs for up to max_tokens tokens on the current context's device, wherever the routing
// comes from.
moe_status moe_cuda_layer_workspace_size(const moe_cuda_layer *layer,
                                         size_t max_tokens,
                                         size_t *bytes);

// *bytes: the workspace of moe_cuda_route for up to max_tokens tokens; 0 for most routers. Needs no driver.
//
// Errors: MOE_ERROR_VALUE for what runs on the CPU only.
moe_status moe_cuda_route_workspace_size(const moe_router *router, size_t max_tokens, size_t *bytes);

// Ids and weights from logits, with the CPU's bits, queued on stream. As for all stages: a stream of the current context; nothing is allocated, waited for or read back;
// the first call of a kernel loads it, so make one before capturing a graph.
//
// Errors: as moe_cuda_layer_forward.
moe_status moe_cuda_route(const moe_router *router,
                          void *stream,
                          const moe_cuda_route_args *args);

// *max_rows: the most rows that num_pairs pairs can take, padding included. *workspace_bytes: the workspace of moe_cuda_permute for up to num_pairs pairs on the
// current context's device; 0 up to 65536 pairs.
//
// Errors: MOE_ERROR_VALUE for options that make no sense or more than 4096 experts, MOE_ERROR_OVERFLOW, MOE_ERROR_UNSUPPORTED without a driver, context or able GPU.
moe_status moe_cuda_permute_sizes(size_t num_pairs,
                                  size_t num_experts,
                                  const moe_permute_options *options,
                                  size_t *max_rows,
                                  size_t *workspace_bytes);

// Sorts pairs by expert, stably: what moe_permutation_sort gives, in the GPU's memory, queued on stream.
//
// Errors: as moe_cuda_layer_forward.
moe_status moe_cuda_permute(void *stream, const moe_cuda_permute_args *args);

// Copies rows, queued on stream. Errors: as moe_cuda_layer_forward.
moe_status moe_cuda_copy_rows(void *stream, const moe_cuda_copy_args *args);

// The ragged grouped product, queued on stream. Errors: as moe_cuda_layer_forward.
moe_status moe_cuda_grouped_gemm(void *stream, const moe_cuda_gemm_args *args);

// The weighted sum, with the CPU's bits from the same ys, queued on stream. Errors: as moe_cuda_layer_forward.
moe_status moe_cuda_combine(void *stream, const moe_cuda_combine_args *args);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* MOE_KERNELS_H */
