// What the routing kernels are told: `RouteParams` of src/cuda/routing.rs, byte for byte.
#pragma once

#include "../numerics.cuh"

namespace routing {

enum Dtype : uint32_t { F32 = 0, F16 = 1, BF16 = 2 };
enum Score : uint32_t { Softmax = 0, Sigmoid = 1, SqrtSoftplus = 2, Identity = 3 };
enum Selection : uint32_t { TopK = 0, Given = 1, SparseMixer = 2, ProductKeys = 3, ExpertChoice = 4, Dense = 5 };
enum WeightSource : uint32_t { OfScore = 0, SoftmaxSelected = 1, JointWithShared = 2 };
enum Renorm : uint32_t { NoRenorm = 0, Sum = 1, SumPlusEps = 2, SumClampMin = 3, PNorm = 4 };
enum Flags : uint32_t {
    RankByLogit = 1,       // else by score
    GroupTop2Sum = 2,      // a group's score; else its best
    GroupFillZero = 4,     // what excluded experts rank as; else below everything
    ZeroNulls = 8,         // ids from E on weigh 0
    StackedKeys = 16,      // product keys: Doge's layout
    Noisy = 32,            // logits + normal · softplus(noise logit)
    LeaveRaw = 64          // weights are renormalised and scaled by a later kernel
};

struct RoutingParams {
    const void* logits;             // [T, R], f32, f16 or bf16
    const void* noise_logits;       // [T, R] or none
    const float* bias;              // [n] or none: correction bias
    const float* per_expert_scale;  // [E] or none
    const int32_t* given_ids;       // [T, K] or none
    int32_t* ids;                   // [T, slots]
    float* weights;                 // [T, slots]
    float* shared_weights;          // [T, S] or none
    int32_t* importance;            // [T] or none: key of a token's best score
    uint64_t* last_taken;           // [E] or none, expert choice: the last pair that each expert takes
    uint32_t* order;                // [T] or none: tokens of a scope in the order in which they are served
    uint64_t logits_stride;         // elements from one row to the next
    uint64_t noise_stride;
    uint64_t seed;
    uint64_t position;  // of the first token
    uint32_t tokens;    // T
    uint32_t columns;   // R: of the logits
    uint32_t width;     // logits of a token: R, or E with product keys
    uint32_t experts;   // E
    uint32_t selectable;  // n = E + null experts
    uint32_t slots;     // K, or E
    uint32_t shared;    // S: joint shared experts
    uint32_t keys;      // √E with product keys
    uint32_t groups;    // 0: no limit
    uint32_t kept_groups;
    uint32_t group_size;
    uint32_t group_magic;  // ⌊2³² / group_size⌋ + 1, so that e / group_size = mulhi(e, group_magic); 0 for groups of one
    uint32_t per_expert;   // capacity, or tokens that an expert takes
    uint32_t scope;        // tokens of a scope
    uint32_t dtype;        // of logits
    uint32_t noise_dtype;
    uint32_t score;
    uint32_t selection;
    uint32_t weight_source;
    uint32_t renorm;
    uint32_t flags;
    float multiplier;
    float softcap;
    float renorm_value;  // ε or p
    float scale;
    float reach;  // 2·jitter_eps
};
static_assert(sizeof(RoutingParams) == 15 * 8 + 26 * 4, "RouteParams in src/cuda/routing.rs");

MOE_DEVICE bool has(const RoutingParams& p, uint32_t flag) { return (p.flags & flag) != 0; }

}  // namespace routing
