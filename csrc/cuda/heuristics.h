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
  int gate_up_shape, down_shape;  // of kGemmShapes, kHopper or kHopperPairs
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

// Whether rows of weights are in order, and not columns: what the small batches' kernels read.
inline bool has_plain_layout(const ExpertsParams& p) { return !p.formula.interleaved && !p.formula.transposed; }

// Whether the small batches' kernels know the layer.
inline bool fits_small_batch(const ExpertsParams& p) {
  return p.formula.gated && (has_plain_layout(p) || p.format.quantised());
}

// Whether the wgmma kernels know a layer that fits_tensor_cores(). Scales of groups multiply weights, which could leave
// fp16's range.
inline bool known_to_hopper(const ExpertsParams& p) {
  return p.formula.gated && !p.formula.capped() &&
         (!p.format.quantised() || p.dtype == DType::kBFloat16 || p.format.group_size == 0);
}

// Whether it is of the kind that an H100 measured on the wgmma kernels.
inline bool measured_on_hopper(const ExpertsParams& p) {
  return p.format.quantised() ||
         (has_plain_layout(p) && p.formula.unlimited() && p.gate_up_bias == nullptr && p.down_bias == nullptr);
}

// Whether the wgmma kernels can take it: they count rows of weights, 16-byte pieces of activations, scales, and bytes
// of 16 quantised rows in 32 bits.
inline bool fits_hopper(const ExpertsParams& p, const Device& device) {
  const int64_t most = std::numeric_limits<int32_t>::max();
  const int64_t positions = p.tokens * p.top_k, longest = std::max(p.hidden, p.intermediate);
  const int64_t rows = p.num_experts * std::max(2 * p.intermediate, p.hidden);
  const bool counts_scales = !p.format.quantised() || (rows * p.format.groups(longest) <= most && longest <= most / 16);
  return device.wgmma && known_to_hopper(p) && rows <= most && positions * longest / 8 <= most && counts_scales;
}

// Rows of the wgmma kernels' tiles.
inline int hopper_rows(const ExpertsParams& p, int shape) {
  return p.format.quantised() ? kHopperPackedRows : hopper_blocks(shape) * kHopperRows;
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

// Bytes of an expert's weights, of 16 bits or fewer; scales are few.
inline int64_t down_bytes(const ExpertsParams& p) { return p.hidden * p.intermediate * weight_bits(p.format.type) / 8; }
inline int64_t expert_bytes(const ExpertsParams& p) {
  return down_bytes(p) + p.formula.rows(p.intermediate) * p.hidden * weight_bits(p.format.type) / 8;
}

// What the wgmma kernels take for both products: on an H100, from 2 tokens on, the best shape of mma.sync took 0.95 to
// 2.9 of their time (benchmarks/results, gpu-paths). Biases, limits and transposed weights were not measured there: the
// kernel is the same but for its results, or the boxes that it reads.
inline int hopper_shape(const ExpertsParams& p) {
  const int64_t rows = rows_per_expert(p);
  const bool pairs =
      !p.format.quantised() && rows > kHopperRows && rows <= kPairsMostRows && down_bytes(p) >= kPairsLeastBytes;
  return pairs ? kHopperPairs : kHopper;
}

// wgmma where it can be; otherwise the shape with the least of that work, over the share of the tensor cores' rate that
// it can reach, which its instructions and its FLOPs per byte from L2 limit. On an H100 that was within 7 % of the
// fastest.
inline int gemm_shape(const ExpertsParams& p, Product product, const Device& device) {
  if (fits_hopper(p, device)) return hopper_shape(p);
  int best = kFlat;
  double least = std::numeric_limits<double>::infinity();
  for (int shape = 0; shape < kGemmShapeCount; ++shape) {
    const GemmShape& s = kGemmShapes[shape];
    if (p.format.quantised() && shape == kTall) continue;  // gemm_packed.cu has none
    if (rows_per_expert(p) < s.min_rows) continue;
    const double work = busiest_work(p, product, device, s.rows, s.columns) / s.efficiency;
    if (work < least) least = work, best = shape;
  }
  return best;
}

// Tokens for which the small batches' kernels are taken however many weights there are.
inline int64_t small_batch_tokens(const ExpertsParams& p, const Device& device) {
  return fits_hopper(p, device) ? small_batch_tokens_beside_hopper(weight_bits(p.format.type)) : kSmallBatchTokens;
}

// Whether the small batches' kernels are the fastest for a layer that they know.
inline bool is_small_batch(const ExpertsParams& p, const Device& device) {
  const int64_t reached = std::min(p.num_experts, p.tokens * p.top_k);
  return p.tokens <= small_batch_tokens(p, device) ||
         (p.tokens <= kSmallBatchTokens && reached * expert_bytes(p) <= kSmallBatchBytesBesideHopper);
}

inline Choice grouped(const ExpertsParams& p, int gate_up_shape, int down_shape) {
  const auto rows = [&](int shape) { return is_hopper(shape) ? hopper_rows(p, shape) : kGemmShapes[shape].rows; };
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

inline Device allowed_device(Device device, const std::string& forced) {
  device.wgmma = device.wgmma && forced != "portable";
  return device;
}

inline Choice choose_grouped(const ExpertsParams& p, const std::string& forced, const Device& device) {
  if (forced == "hopper" || forced == "hopper_pairs") {
    const int shape = forced == "hopper" ? kHopper : kHopperPairs;
    if (fits_hopper(p, device) && (shape == kHopper || !p.format.quantised())) return grouped(p, shape, shape);
    throw std::runtime_error(
        "MOE_EXT_CUDA_KERNELS=" + forced +
        (device.wgmma ? ": T * K * max(H, I) / 8, E * max(2 I, H) or the number of scales is beyond 2^31 - 1, or the "
                        "experts have no gate, or caps, or are quantised in groups with float16; hopper_pairs takes no "
                        "quantised weights"
                      : " needs a device of compute capability 9.0 (H100, H200) and moe_ext built for 9.0a "
                        "(TORCH_CUDA_ARCH_LIST), not for " MOE_EXT_CUDA_ARCHS));
  }
  if (forced == "tall") {
    if (!p.format.quantised()) return grouped(p, kTall, kTall);
    throw std::runtime_error("MOE_EXT_CUDA_KERNELS=tall takes no quantised weights; flat and narrow do");
  }
  if (forced == "flat") return grouped(p, kFlat, kFlat);
  if (forced == "narrow") return grouped(p, kNarrow, kNarrow);
  const Device allowed = allowed_device(device, forced);
  return grouped(p, gemm_shape(p, Product::kGateUp, allowed), gemm_shape(p, Product::kDown, allowed));
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
  const bool small = by_shape(forced) && is_small_batch(p, allowed_device(device, forced));
  if (forced == "small_batch" || (small && fits)) {
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
    const std::string kernel = shape == kHopperPairs ? "hopper_pairs (wgmma)"
                               : shape == kHopper    ? "hopper (wgmma)"
                                                     : "mma.sync";
    return kernel + ", tiles of " + std::to_string(rows) + " x " +
           std::to_string(is_hopper(shape) ? kHopperColumns : kGemmShapes[shape].columns);
  };
  const std::string of_weights = p.format.quantised() ? weights_named(p.format.type) + ", " : "";
  std::string kernels, reason;
  if (choice.way == Choice::Way::kSmallBatch) {
    kernels = "small_batch";
    const int64_t most = small_batch_tokens(p, allowed_device(device, forced));
    reason = "at most " + std::to_string(most) + " tokens, bound by reading weights";
    if (p.tokens > most) {
      reason = "at most " + std::to_string(kSmallBatchTokens) + " tokens, which reach at most " +
               std::to_string(kSmallBatchBytesBesideHopper / 1'000'000) + " MB of weights";
    }
  } else if (choice.way == Choice::Way::kPlain) {
    kernels = "plain, without tensor cores";
    const bool multiples = p.hidden % 8 == 0 && p.intermediate % 8 == 0;
    reason = p.dtype == DType::kFloat32 ? "float32"
             : multiples                ? "gelu without gate"
                                        : "H and I are not multiples of 8";
  } else {
    kernels = "gate_up " + tiles(choice.gate_up_shape, choice.gate_up_rows) + "; down " +
              tiles(choice.down_shape, choice.down_rows);
    const std::string rows = std::to_string(rows_per_expert(p)) + " rows an expert";
    if (is_hopper(choice.gate_up_shape)) {
      reason = rows + (measured_on_hopper(p) ? "; " : "; not measured, but of plain rows without biases and limits ") +
               "no shape of mma.sync was more than 5 % faster on an H100";
    } else {
      reason = "least work of the busiest of " + std::to_string(device.multiprocessors) + " multiprocessors at " + rows;
    }
    if (!device.wgmma) {
      reason += "; no wgmma: it needs compute capability 9.0 and moe_ext built for 9.0a";
    } else if (p.format.quantised() && p.dtype == DType::kFloat16 && p.format.group_size != 0) {
      reason += "; no wgmma: with float16 its kernels take no scales of groups";
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
