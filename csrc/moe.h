// What the torch binding (torch/) and the kernels (cpu/, cuda/) agree on: plain structs, no torch types. Every pointer
// is to a dense row-major array whose shape stands beside it. T tokens, E experts, K slots a token (top_k), H hidden
// size, I expert intermediate size. A slot that carries expert index E (the sentinel) has no expert: it costs nothing
// and adds nothing.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

struct CUstream_st;  // *cudaStream_t

namespace moe_ext {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// How the weights of a layer are stored. kPlain: as numbers of x's dtype. Otherwise packed, in bytes whose order the
// kernels of every device read, and a weight is value * scale; kInt4: (value - zero) * scale, without zeros (value -
// 8) * scale; kFloat8 is e4m3fn, kMxfp4 e2m1.
enum class WeightType : int32_t { kPlain, kInt8, kInt4, kFloat8, kMxfp4 };
[[gnu::always_inline]] constexpr bool has_four_bits(WeightType type) {
  return type == WeightType::kInt4 || type == WeightType::kMxfp4;
}
enum class ScaleType : int32_t { kFloat32, kBFloat16, kFloat16, kE8M0 };  // kE8M0: a byte s, 2^(s - 127); 255: NaN

// Of a weight matrix with R rows (outputs) and C columns (the reduction), scales are (R), one a row; with groups
// (R, ceil(C / group_size)), and zeros as many; with row blocks (ceil(R / kRowBlock), ceil(C / group_size)).
struct WeightFormat {
  WeightType type = WeightType::kPlain;
  int64_t group_size = 0;   // columns that share a scale, a multiple of 32; 0: all of a row
  bool row_blocks = false;  // a scale is of kRowBlock rows, too
  ScaleType scales = ScaleType::kFloat32;

  static constexpr int64_t kRowBlock = 128;

  [[gnu::always_inline]] constexpr bool quantised() const { return type != WeightType::kPlain; }
  [[gnu::always_inline]] constexpr int64_t groups(int64_t columns) const {
    return group_size == 0 ? 1 : (columns + group_size - 1) / group_size;
  }
  // Elements of the scales of an expert.
  [[gnu::always_inline]] constexpr int64_t scale_count(int64_t rows, int64_t columns) const {
    return (row_blocks ? (rows + kRowBlock - 1) / kRowBlock : rows) * groups(columns);
  }
  [[gnu::always_inline]] constexpr int64_t scale_bytes() const {
    return scales == ScaleType::kFloat32 ? 4 : scales == ScaleType::kE8M0 ? 1 : 2;
  }
};

enum class Activation : int32_t { kSilu, kGeluErf, kGeluTanh, kRelu2 };

// What an expert computes between its two products, and how its weights lie. With gate and up as the products leave
// them, biases added:
//   g = min(gate, limit), u = min(max(up, -limit), limit)         ...with limit_after, g = gate
//   a = act(g); with silu, alpha and gate_cap: a = cap(g, gate_cap) sigmoid(alpha g),  cap(z, c) = c tanh(z / c)
//   h = a (cap(u, up_cap) + up_offset)                            ...with limit_after, min(a, limit) instead of a
// Not gated: h = act(up).
struct Formula {
  Activation activation = Activation::kSilu;
  bool gated = true;         // false: one projection, `gate_up` is (E, I, H)
  bool interleaved = false;  // gate and up rows in turn, instead of all gate rows first
  bool transposed = false;   // `gate_up` is (E, H, 2 I), `down` (E, I, H)
  bool limit_after = false;
  float limit = kNone;
  float alpha = 1.0f;
  float up_offset = 0.0f;
  float gate_cap = kNone;
  float up_cap = kNone;

  static constexpr float kNone = std::numeric_limits<float>::infinity();

  [[gnu::always_inline]] constexpr bool capped() const { return gate_cap != kNone || up_cap != kNone; }
  // h = act(gate) * up, or act(up).
  [[gnu::always_inline]] constexpr bool unlimited() const {
    return limit == kNone && alpha == 1.0f && up_offset == 0.0f && !capped();
  }
  // Rows of `gate_up` (columns, where it is transposed) for so many columns of h.
  [[gnu::always_inline]] constexpr int64_t rows(int64_t columns) const { return gated ? 2 * columns : columns; }
};

// How a CPU kernel gets its threads: the caller's pool, so that no second one is started.
// run(workers, body, context) calls body(context) at least once and at most `workers` times, concurrently if it can,
// and returns when all calls have.
struct Threads {
  int64_t count;
  void (*run)(int64_t workers, void (*body)(void* context), void* context);
};

// weights[t, j], experts[t, j] = the K largest of softmax(logits[t, :]), largest first; equal logits: lower index
// first.
// What a router computes of a token's logits l, per expert e. Only these are compared in float32, as families do.
//   score s_e:  softmax over all E, sigmoid, or sqrt(softplus)
//   choice c_e: s_e, or l_e if by_logits; plus bias_e
//   groups:     contiguous and of equal size; the best `groups_per_token` by the sum of their `group_best` largest
//               choices. Elsewhere c_e is -inf, or 0 if outside_zero
//   weights:    scale * s_e of the K largest choices; if renormalise over max(their sum + epsilon, least)
enum class Score { kSoftmax, kSigmoid, kSqrtSoftplus };

struct RouteParams {
  const void* logits;       // (T, E) of `dtype`
  const float* thresholds;  // (K - 1), or null: nothing is skipped
  float* weights;           // (T, K) out
  int64_t* experts;         // (T, K) out
  int64_t tokens;
  int64_t num_experts;
  int64_t top_k;
  DType dtype;
  bool renormalise;             // true: a token's weights sum to 1 (times scale); false: they keep their scores
  const float* bias = nullptr;  // (E), or null: 0
  Score score = Score::kSoftmax;
  bool by_logits = false;
  bool outside_zero = false;
  int64_t groups = 1;
  int64_t groups_per_token = 1;
  int64_t group_best = 1;
  float epsilon = 0.0f;
  float least = 0.0f;
  float scale = 1.0f;

  // Softmax, and nothing that moves the choice away from the largest logits: exponentials of K of them may do.
  bool plain() const {
    return score == Score::kSoftmax && bias == nullptr && groups == 1 && epsilon == 0.0f && least == 0.0f;
  }
};

// The experts of a layer and the tokens that they are given:
// f_e(x) = down[e] h + down_bias[e],  h = act(gate) * up or what `formula` says,
// gate = gate[e] x + gate_bias[e],  up = up[e] x + up_bias[e],  gate[e] = gate_up[e, :I, :], up[e] = gate_up[e, I:, :].
struct LayerParams {
  const void* x;             // (T, H) of `dtype`
  const void* gate_up;       // (E, 2 I, H) of `dtype`, or as `formula` and `format` say
  const void* down;          // (E, H, I) of `dtype`, or as `formula` and `format` say
  const void* gate_up_bias;  // (E, 2 I) of `dtype`, in the order of gate_up's rows; or null
  const void* down_bias;     // (E, H) of `dtype`, or null
  int64_t tokens;
  int64_t num_experts;
  int64_t hidden;
  int64_t intermediate;
  DType dtype;
  Formula formula;
  WeightFormat format = {};              // of gate_up and of down; what follows is null where they are plain
  const void* gate_up_scales = nullptr;  // of every expert in turn, as WeightFormat says
  const void* down_scales = nullptr;
  const uint8_t* gate_up_zeros = nullptr;  // of kInt4, or null
  const uint8_t* down_zeros = nullptr;
  // Products of whole numbers, of kInt8, kInt4 and kMxfp4 on the CPU: x and h rounded to 8 bits, 128 columns a scale.
  bool int8_activations = false;
};

// Quantised weights to be packed or unpacked.
struct PackingParams {
  WeightType type;
  int64_t rows;  // of all experts
  int64_t columns;
};

// out[t, :] = sum over slots s of weights[t, s] * f_e(x[t, :]),  e = experts[t, s].
struct ExpertsParams : LayerParams {
  const void* experts;  // (T, K) int64 if experts_are_int64, else int32; in [0, E]
  const void* weights;  // (T, K) of `weights_dtype`
  void* out;            // (T, H) of `dtype`
  double* moments;      // (E, 3, 3) += sum over counted slots of g^a ||f_e||^b, or null: nothing is observed
  double* pairs;        // (E, E) += sum over counted tokens with slots of both of (g ||f||) (g ||f||); or null
  double* channels;     // (E, I) += sum over counted slots of g^2 h^2, h as in LayerParams; or null
  const bool* counted;  // (T) tokens that enter the sums, or null: all
  int64_t top_k;
  DType weights_dtype;
  bool experts_are_int64;
};

// gram[t, i, j] = <f_i(x[t, :]), f_j(x[t, :])>, f rounded to `dtype`; sums in float64.
struct GramParams : LayerParams {
  double* gram;  // (T, E, E) out
};

// out[t, e] = <g[t, :], f_e(x[t, :])>, f not rounded to `dtype`; sums over H in float64.
struct ProjectionParams : LayerParams {
  const void* g;  // (T, H) of `g_dtype`
  double* out;    // (T, E) out
  DType g_dtype;
};

// errors[s] = sum over tokens of || F(x) - F_s(x) ||^2: what a layer's output loses when only the experts keep[s, :]
// are left. N <= E: the experts of the N highest ranks of a token, which are all that it can come to use; pairs
// i < j of them are stored row by row, (0, 1), (0, 2) ... (1, 2) ...: M = N (N - 1) / 2.
struct SubsetsParams {
  const double* distances;  // (T, M) or null: || f_i - f_j ||^2 of the experts of ranks i and j
  const int64_t* ranks;     // (T, N): expert of a rank, in [0, E)
  const double* scores;     // (T, N): by rank; the weights of the chosen experts are their scores over the scores' sum
  const bool* keep;         // (S, E); at most N - K experts of a subset are not kept
  const float* thresholds;  // (K - 1): of F_s, as in RouteParams; or null: nothing is skipped
  double* errors;           // (S) out
  int64_t tokens;
  int64_t num_experts;
  int64_t depth;  // N
  int64_t top_k;
  int64_t subsets;            // S
  const double* projections;  // (T, N) instead of distances, by rank: an expert's output is this one number; or null
};

namespace cpu {

void route(const RouteParams& p, const Threads& threads);
void experts(const ExpertsParams& p, const Threads& threads);
void gram(const GramParams& p, const Threads& threads);
void projection(const ProjectionParams& p, const Threads& threads);
void subset_errors(const SubsetsParams& p, const Threads& threads);

// Quantised weights, packed and as they are given: a row of kInt8 and kFloat8 is a byte a column; of kInt4 and kMxfp4 a
// byte holds two columns, the even one in its low half. See cpu/packing.cpp for the packed order.
int64_t packed_row_bytes(WeightType type, int64_t columns);
int64_t given_row_bytes(WeightType type, int64_t columns);
void pack_weights(const PackingParams& p, const uint8_t* values, uint8_t* packed, const Threads& threads);
void unpack_weights(const PackingParams& p, const uint8_t* packed, uint8_t* values, const Threads& threads);

// Position in the flattened (T, K) array of the first expert index outside [0, E], or -1.
int64_t first_bad_expert(const void* experts, bool is_int64, int64_t slots, int64_t num_experts);

// Instruction sets: the compiled variants, best first; whether this machine runs one; the one in use. MOE_EXT_ISA
// forces one by name; active_isa() throws std::runtime_error if that name is unknown or does not run here.
inline constexpr int kIsaCount = 4;
const char* isa_name(int isa);
bool isa_runs_here(int isa);
int active_isa();

}  // namespace cpu

namespace cuda {

inline constexpr int64_t kMaxRoutedExperts = 512;  // that route takes: a warp holds a token's logits
inline constexpr int64_t kMaxRoutedGroups = 32;    // and a lane a group's
inline constexpr int64_t kMaxExperts = 8192;       // that experts takes: a block holds a count of each

// Device memory for the duration of a call, from the caller's allocator; kernels may still be using it when the call
// returns, in stream order. allocate(context, bytes) gives 16-byte aligned memory.
struct Scratch {
  void* context;
  void* (*allocate)(void* context, int64_t bytes);
};

// Launch on `stream` of the current device and return; pointers are to device memory. They throw std::runtime_error if
// CUDA refuses a launch.
void route(const RouteParams& p, CUstream_st* stream);
void experts(const ExpertsParams& p, const Scratch& scratch, CUstream_st* stream);
void gram(const GramParams& p, const Scratch& scratch, CUstream_st* stream);
void projection(const ProjectionParams& p, const Scratch& scratch, CUstream_st* stream);

// As cpu::pack_weights and cpu::unpack_weights, and in the same order.
void pack_weights(const PackingParams& p, const uint8_t* values, uint8_t* packed, CUstream_st* stream);
void unpack_weights(const PackingParams& p, const uint8_t* packed, uint8_t* values, CUstream_st* stream);

// Which kernels `experts` would launch on the current device for these sizes and dtype, and why.
std::string describe(const ExpertsParams& p);

}  // namespace cuda
}  // namespace moe_ext
