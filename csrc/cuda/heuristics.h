// The one place where the CUDA back end chooses: which kernels a call takes, with which of the tile shapes in shapes.h.
// Choices depend on shapes, dtype, alignment, the device and what MOE_EXT_CUDA_KERNELS forces only, never on routing
// results, so that a CUDA graph stays valid. Nothing here asks the device or the environment, and nothing launches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/params.h"
#include "cuda/shapes.h"
#include "moe.h"

namespace moe_ext::cuda {

// ---- choices

// The kernels that a call takes. Small batches have no tiles; `rows` are those of the sort's tile lists.
struct Choice {
  enum class Way { kSmallBatch, kGrouped, kPlain } way;
  int gate_up_shape, down_shape;  // of kGemmShapes, or kHopper
  int gate_up_rows, down_rows;

  // Of h and y, when the layer is of `dtype`: the plain kernels keep float32 between them.
  constexpr DType row_dtype(DType dtype) const { return way == Way::kPlain ? DType::kFloat32 : dtype; }
};

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether rows can be read 16 bytes at a time and multiplied by the tensor cores. Rows of quantised weights are picked
// one by one, so that they may be interleaved.
inline bool fits_tensor_cores(const ExpertsParams& p) {
  const Activation activation = p.formula.activation;
  if (!p.formula.gated && activation != Activation::kSilu && activation != Activation::kRelu2) return false;
  if (p.formula.interleaved && !p.formula.transposed && !p.format.quantised()) return false;
  return p.dtype != DType::kFloat32 && p.hidden % 8 == 0 && p.intermediate % 8 == 0 && is_aligned(p.x) &&
         is_aligned(p.gate_up) && is_aligned(p.down);
}

inline int64_t rows_per_expert(const ExpertsParams& p) {
  return (p.tokens * p.top_k + p.num_experts - 1) / p.num_experts;
}

// Whether rows of weights are in order, and not columns: what the wgmma and small batches' kernels read.
inline bool has_plain_layout(const ExpertsParams& p) { return !p.formula.interleaved && !p.formula.transposed; }

// Whether the small batches' kernels know the layer.
inline bool fits_small_batch(const ExpertsParams& p) {
  return p.formula.gated && (has_plain_layout(p) || p.format.quantised());
}

// Whether the wgmma kernels know the layer: usual rows, not quantised, gate and up as the products leave them. (What is
// done to accumulators in place makes ptxas wait for every wgmma.)
inline bool has_usual_experts(const ExpertsParams& p) {
  return !p.format.quantised() && has_plain_layout(p) && p.formula.gated && p.formula.unlimited() &&
         p.gate_up_bias == nullptr && p.down_bias == nullptr;
}

// Whether the wgmma kernels can take it: they count rows of weights, and 16-byte pieces of activations, in 32 bits.
inline bool fits_hopper(const ExpertsParams& p, const Device& device) {
  const int64_t most = std::numeric_limits<int32_t>::max();
  const int64_t positions = p.tokens * p.top_k, longest = std::max(p.hidden, p.intermediate);
  return device.wgmma && has_usual_experts(p) && p.num_experts * std::max(2 * p.intermediate, p.hidden) <= most &&
         positions * longest / 8 <= most;
}

// Work of the busiest multiprocessor when tiles of `rows` by `columns` share out a product: elements that it
// multiplies.
inline double busiest_work(const ExpertsParams& p, Product product, const Device& device, int rows, int columns) {
  const int64_t rows_of_expert = rows_per_expert(p);
  const int64_t of_weights = product == Product::kGateUp ? p.formula.rows(p.intermediate) : p.hidden;
  const int64_t active = std::min(p.num_experts, p.tokens * p.top_k);
  const int64_t tiles = (rows_of_expert + rows - 1) / rows;
  const int64_t blocks = active * tiles * ((of_weights + columns - 1) / columns);
  const int64_t blocks_each = (blocks + device.multiprocessors - 1) / device.multiprocessors;
  const int64_t rows_each = ((rows_of_expert + tiles - 1) / tiles + 15) / 16 * 16;
  return static_cast<double>(blocks_each * rows_each * columns);
}

// The shape with the least of that work, over the share of the tensor cores' rate that it can reach, which its
// instructions and its FLOPs per byte from L2 limit (a guess until a GPU has measured it).
inline int gemm_shape(const ExpertsParams& p, Product product, const Device& device) {
  int best = kFlat;
  double least = std::numeric_limits<double>::infinity();
  const auto consider = [&](int shape, int rows, int columns, int min_rows, double efficiency) {
    if (rows_per_expert(p) < min_rows) return;
    const double work = busiest_work(p, product, device, rows, columns) / efficiency;
    if (work < least) least = work, best = shape;
  };
  for (int shape = 0; shape < kGemmShapeCount; ++shape) {
    const GemmShape& s = kGemmShapes[shape];
    if (p.format.quantised() && shape == kTall) continue;  // gemm_packed.cu has none
    consider(shape, s.rows, s.columns, s.min_rows, s.efficiency);
  }
  if (fits_hopper(p, device)) consider(kHopper, kHopperRows, kHopperColumns, kHopperMinRows, kHopperEfficiency);
  return best;
}

inline Choice grouped(int gate_up_shape, int down_shape) {
  const auto rows = [](int shape) { return shape == kHopper ? kHopperRows : kGemmShapes[shape].rows; };
  return {Choice::Way::kGrouped, gate_up_shape, down_shape, rows(gate_up_shape), rows(down_shape)};
}

inline Choice plain(const ExpertsParams& p) {
  const int rows = kPlainRows[rows_per_expert(p) > kPlainRows[0]];
  return {Choice::Way::kPlain, 0, 0, rows, rows};
}

// Bytes that a pass needs for activations: one round of k and padding of each of its tokens.
inline int64_t small_batch_staged_minimum(WeightType type) {
  const int64_t tokens = type == WeightType::kPlain ? kSmallBatchTokens : kSmallBatchPackedTokens;
  return tokens * (small_batch_round(type) * 2 + small_batch_padding(type));
}

// Shared memory for activations: what is left where the wanted number of blocks share a multiprocessor; below the
// minimum if there is not enough. CUDA takes a kilobyte a block; 128 bytes are for static variables, and a block gets
// multiples.
inline int64_t small_batch_staged_bytes(const ExpertsParams& p, const Device& device) {
  const WeightType type = p.format.type;
  const int64_t lists = small_batch_shared_bytes(p.tokens, p.tokens * p.top_k, p.num_experts, type) + 128;
  const int64_t shared = device.shared_per_multiprocessor / kSmallBatchBlocksPerMultiprocessor / 128 * 128 - 1024;
  const int64_t staged = std::max(small_batch_staged_minimum(type), shared - lists) / 16 * 16;
  return std::min<int64_t>(staged, device.shared_per_block - lists);
}

// `forced`: the name that MOE_EXT_CUDA_KERNELS gives (launch.h).
inline bool by_shape(const std::string& forced) { return forced == "" || forced == "portable"; }

// Whether tensor cores multiply; throws if the forced kernels need them and cannot have them.
inline bool takes_tensor_cores(const ExpertsParams& p, const std::string& forced) {
  if (forced == "plain") return false;
  if (fits_tensor_cores(p)) return true;
  if (by_shape(forced)) return false;
  throw std::runtime_error("MOE_EXT_CUDA_KERNELS=" + forced +
                           " needs bfloat16 or float16, H and I multiples of 8, 16-byte aligned tensors, rows that are "
                           "not interleaved unless transposed, and, without gate, silu or relu2");
}

inline Choice choose_grouped(const ExpertsParams& p, const std::string& forced, const Device& device) {
  if (forced == "hopper") {
    if (fits_hopper(p, device)) return grouped(kHopper, kHopper);
    throw std::runtime_error(
        device.wgmma ? "MOE_EXT_CUDA_KERNELS=hopper: T * K * max(H, I) / 8 or E * max(2 I, H) is beyond 2^31 - 1, or "
                       "the experts have biases, limits or no gate, or are quantised, interleaved or transposed"
                     : "MOE_EXT_CUDA_KERNELS=hopper needs a device of compute capability 9.0 (H100, H200) and moe_ext "
                       "built for 9.0a (TORCH_CUDA_ARCH_LIST), not for " MOE_EXT_CUDA_ARCHS);
  }
  if (forced == "tall") {
    if (!p.format.quantised()) return grouped(kTall, kTall);
    throw std::runtime_error("MOE_EXT_CUDA_KERNELS=tall takes no quantised weights; flat and narrow do");
  }
  if (forced == "flat") return grouped(kFlat, kFlat);
  if (forced == "narrow") return grouped(kNarrow, kNarrow);
  Device allowed = device;
  allowed.wgmma = device.wgmma && forced != "portable";
  return grouped(gemm_shape(p, Product::kGateUp, allowed), gemm_shape(p, Product::kDown, allowed));
}

inline Choice choose(const ExpertsParams& p, const Device& device, const std::string& forced) {
  if (!takes_tensor_cores(p, forced)) return plain(p);
  const bool fits =
      fits_small_batch(p) && small_batch_staged_bytes(p, device) >= small_batch_staged_minimum(p.format.type);
  if (forced == "small_batch" && !fits) {
    throw std::runtime_error(
        "MOE_EXT_CUDA_KERNELS=small_batch: the lists of T * K slots do not fit into shared memory, or the weights are "
        "interleaved, transposed or without gate");
  }
  if (forced == "small_batch" || (by_shape(forced) && p.tokens <= kSmallBatchTokens && fits)) {
    return {Choice::Way::kSmallBatch, 0, 0, 0, 0};
  }
  return choose_grouped(p, forced, device);
}

inline std::string weights_named(WeightType type) {
  switch (type) {
    case WeightType::kPlain:
      return "plain weights";
    case WeightType::kInt8:
      return "int8 weights";
    case WeightType::kInt4:
      return "int4 weights";
    case WeightType::kFloat8:
      return "fp8 weights";
    case WeightType::kMxfp4:
      return "mxfp4 weights";
  }
  return "";
}

// What `choose` chose and why, for people.
inline std::string describe(const ExpertsParams& p, const Device& device, const std::string& forced) {
  const Choice choice = choose(p, device, forced);
  const auto tiles = [](int shape, int rows) {
    const bool hopper = shape == kHopper;
    return std::string(hopper ? "hopper (wgmma)" : "mma.sync") + ", tiles of " + std::to_string(rows) + " x " +
           std::to_string(hopper ? kHopperColumns : kGemmShapes[shape].columns);
  };
  const std::string of_weights = p.format.quantised() ? weights_named(p.format.type) + ", " : "";
  std::string kernels, reason;
  if (choice.way == Choice::Way::kSmallBatch) {
    kernels = "small_batch";
    reason = "at most " + std::to_string(kSmallBatchTokens) + " tokens, bound by reading weights";
  } else if (choice.way == Choice::Way::kPlain) {
    kernels = "plain, without tensor cores";
    const bool multiples = p.hidden % 8 == 0 && p.intermediate % 8 == 0;
    reason = p.dtype == DType::kFloat32 ? "float32"
             : multiples                ? "gelu without gate"
                                        : "H and I are not multiples of 8";
  } else {
    kernels = "gate_up " + tiles(choice.gate_up_shape, choice.gate_up_rows) + "; down " +
              tiles(choice.down_shape, choice.down_rows);
    reason = "least work of the busiest of " + std::to_string(device.multiprocessors) + " multiprocessors at " +
             std::to_string(rows_per_expert(p)) + " rows an expert";
    if (p.format.quantised()) {
      reason += "; no wgmma: its kernels take no quantised weights";
    } else if (!device.wgmma) {
      reason += "; no wgmma: it needs compute capability 9.0 and moe_ext built for 9.0a";
    }
  }
  if (!by_shape(forced)) reason = "asked for";
  return of_weights + kernels + ": " + reason + (forced == "" ? "" : " (MOE_EXT_CUDA_KERNELS=" + forced + ")");
}

// As `choose`, for products over a list of positions only, however few they are: forced small_batch changes nothing.
inline Choice choose_sorted(const ExpertsParams& p, const Device& device, const std::string& forced) {
  return takes_tensor_cores(p, forced) ? choose_grouped(p, forced, device) : plain(p);
}

// ---- combine (combine.cu)

inline constexpr int64_t kCombineWarps = 4096;  // at least, where there are columns for them: two rounds of an H100

// Sets how the warps share a token's columns.
inline void split_combine(CombineParams* p) {
  const int64_t chunk = p->y_dtype == DType::kFloat32 ? kCombineChunk<4> : kCombineChunk<2>;
  const int64_t chunks = (p->hidden + chunk - 1) / chunk;
  const int64_t wanted = p->top_k > kCombineAtOnce ? chunks : (kCombineWarps + p->tokens - 1) / p->tokens;
  const int64_t chunks_each = (chunks + std::min(wanted, chunks) - 1) / std::min(wanted, chunks);
  p->part_columns = chunks_each * chunk;
  p->parts = (chunks + chunks_each - 1) / chunks_each;
}

// ---- all experts over all tokens (all_experts.cu)

inline constexpr int64_t kAllExpertsBytes = 1 << 30;  // of h and y, which are there for some tokens at a time
inline constexpr int64_t kAllExpertsLeastTokens = 256, kAllExpertsMostTokens = 2048;

// Tokens of a part: enough rows an expert to keep the tensor cores busy, and no more memory than that takes.
inline int64_t all_experts_part(const LayerParams& p) {
  const int64_t token_bytes = p.num_experts * (p.hidden + p.intermediate) * 4;  // at most: the plain kernels' float32
  return std::min(p.tokens, std::clamp(kAllExpertsBytes / token_bytes, kAllExpertsLeastTokens, kAllExpertsMostTokens));
}

// Elements of k of the parts that down's k is cut into so that every block has a unit of work: two rounds or more, and
// of quantised weights, whose rounds are longer, one.
inline int64_t small_batch_split_length(const ExpertsParams& p, int64_t blocks) {
  const int64_t units = std::min(p.num_experts, p.tokens * p.top_k) * small_batch_groups(p.hidden);
  const int64_t round = small_batch_round(p.format.type);
  const int64_t rounds = (p.intermediate + round - 1) / round;
  const int64_t most = p.format.quantised() ? rounds : rounds / 2;
  const int64_t wanted = std::max<int64_t>(1, std::min(blocks / units, most));
  return (rounds + wanted - 1) / wanted * round;
}

}  // namespace moe_ext::cuda
