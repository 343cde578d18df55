// Small batches of quantised weights: what device/small_batch.cuh multiplies with. A warp's piece is a line
// (packed.cuh) of every row, so that each byte of weights is read once, 16 a lane, and turned into operands in
// registers.
//
// Scales come through shared memory: the block's threads read those of the group's 64 rows for the next groups of
// columns side by side, as a lane would use two bytes of a sector of 32. A warp applies them to its sums of 32 columns
// (64 of eight-bit weights), in float32.
//
// Instructions a weight for its operand: int4 1.4, int8 1.75 (bf16), 1 (fp16), e4m3 2.25, mxfp4 2.4.
#include "cuda/device/dispatch.cuh"
#include "cuda/device/packed.cuh"
#include "cuda/device/small_batch.cuh"
#include "cuda/params.h"

namespace moe_ext::cuda {
namespace {

using namespace small_batch;  // NOLINT: the kernel that is made here

constexpr int kTokenTiles = kSmallBatchPackedTokens / 8;
constexpr int kRows = kTiles * 16;  // of a group
// Groups of columns whose scales are in shared memory: those of a round, at least.
constexpr int groups_at_once(WeightType type) { return has_four_bits(type) ? 32 : 8; }
// What eight rows of them, and of zero points, need to lie in different banks.
constexpr int scale_stride(WeightType type) { return groups_at_once(type) + 1; }
constexpr int kZeroStride = 36;
constexpr int scale_bytes(WeightType type) { return kRows * scale_stride(type) * 4; }

constexpr int shared_bytes_of(WeightType type) {
  return scale_bytes(type) + (type == WeightType::kInt4 ? kRows * kZeroStride : 0);
}

template <typename T, WeightType kOfType, Product kOf>
class PackedWeights {
 public:
  using Element = T;
  static constexpr Product kProduct = kOf;
  static constexpr WeightType kType = kOfType;
  static constexpr int kPiece = kLineColumns<kType>;
  static constexpr int kPadding = small_batch_padding(kType);
  static constexpr int kSharedBytes = shared_bytes_of(kType);
  static_assert(kSharedBytes % 16 == 0);

  __device__ __forceinline__ PackedWeights(const SmallBatchParams& p, int expert, int first_column, int /*inner*/,
                                           int columns, int first_k, char* shared)
      : q_(kGateUp ? p.gate_up : p.down),
        interleaved_(kGateUp && p.experts.formula.interleaved),
        expert_(expert),
        columns_(columns),
        first_column_(first_column),
        scales_(reinterpret_cast<float*>(shared)),
        zeros_(reinterpret_cast<uint8_t*>(shared + scale_bytes(kType))) {
    const int64_t row =
        weight_row<kProduct, int64_t>(expert, columns, first_column + row_of_lane(), false, interleaved_);
    row_ = static_cast<const uint8_t*>(kGateUp ? p.experts.gate_up : p.experts.down) + row * q_.row_bytes +
           first_k / kPiece * kLineBytes + threadIdx.x % 4 * 16;
  }

  // The lane's 16 bytes of its two rows in every m16 tile of the group; anything beyond the last column.
  __device__ __forceinline__ void load(int k, int here) {
    const int64_t tile_step = (interleaved_ ? 2 : 1) * kTileColumns * q_.row_bytes;
    const int64_t half_step = (kGateUp ? (interleaved_ ? 1 : columns_) : 8) * q_.row_bytes;  // to the lane's second row
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = first_column_ + tile * kTileColumns + row_of_lane() + (kGateUp ? 0 : half * 8);
        lines_[tile][half] = make_uint4(0, 0, 0, 0);
        if (k < here && column < columns_) {
          lines_[tile][half] = ptx::load_once(row_ + half * half_step + tile * tile_step + k / kPiece * kLineBytes);
        }
      }
    }
  }

  // Sends the scales from column k on for registers, unless those of the round are in shared memory.
  __device__ __forceinline__ void begin(int k) {
    k_ = k;
    arriving_ = k >> q_.group_shift >= first_group_ + groups_;
    if (!arriving_) return;
    first_group_ = k >> q_.group_shift;
    groups_ = min(kGroupsAtOnce, q_.groups - first_group_);
    reciprocal_ = 65536 / groups_ + 1;
    if (q_.scale_type == ScaleType::kFloat32) {
      read_scales<uint32_t>();
    } else if (q_.scale_type == ScaleType::kE8M0) {
      read_scales<uint8_t>();
    } else {
      read_scales<uint16_t>();
    }
  }

  // Leaves them there.
  __device__ __forceinline__ bool share() {
    if (!arriving_) return false;
    __syncthreads();  // those before are not read any more
    int reciprocal = reciprocal_;
    ptx::keep(reciprocal);  // places are computed again: there are no registers to keep them in
#pragma unroll
    for (int i = 0; i < kScalesEach; ++i) {
      const Place place = place_of_scale(i, reciprocal);
      if (!place.exists) continue;
      scales_[place.row * kScaleStride + place.group] = scale_of_bits(q_.scale_type, scale_bits_[i]);
      if constexpr (kType == WeightType::kInt4) {
        zeros_[place.row * kZeroStride + place.group] = static_cast<uint8_t>(zero_bits_[i / 4] >> i % 4 * 8);
      }
    }
    return true;
  }

  __device__ __forceinline__ void multiply(float (&acc)[kTiles][kTokenTiles][4], const char* staged, int row_bytes,
                                           int tokens, int k) const {
    constexpr int kSteps = kStepsPerScale<kType>;
    const int first_of_warp = static_cast<int>(threadIdx.x) / kWarpSize * kPiece;
    const char* of_token = staged + min(row_of_lane(), tokens - 1) * row_bytes + k * 2;  // tokens beyond are not used
#pragma unroll 1  // fewer registers, and instructions
    for (int first = 0; first < kStepsPerLine<kType>; first += kSteps) {
      const int group = (k_ + first_of_warp + first * kStepColumns) >> q_.group_shift;
      const int at = min(group - first_group_, groups_ - 1);  // columns beyond the last are zeros times anything
      uint4 b[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        b[s] = *reinterpret_cast<const uint4*>(of_token + chunk_of_lane<kType>(first + s) * 16);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float sum[4] = {};
        float scales[2];
        uint32_t zeros[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = (kGateUp ? half * kGateUpColumns + tile * 8 : tile * 16 + half * 8) + row_of_lane();
          scales[half] = scales_[row * kScaleStride + at];
          if constexpr (kType == WeightType::kInt4) {
            zeros[half] = zero_pair<T>(q_.zeros == nullptr ? 8 : zeros_[row * kZeroStride + at]);
          }
        }
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          uint32_t upper[4], lower[4];
          values_of<kType, T>(lines_[tile][0], first + s, zeros[0], upper);
          values_of<kType, T>(lines_[tile][1], first + s, zeros[1], lower);
          ptx::multiply_add(sum, {upper[0], lower[0], upper[1], lower[1]}, b[s].x, b[s].y, T{});
          ptx::multiply_add(sum, {upper[2], lower[2], upper[3], lower[3]}, b[s].z, b[s].w, T{});
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[tile][0][i] = fmaf(scales[i / 2], sum[i], acc[tile][0][i]);
      }
    }
  }

  __device__ __forceinline__ void advance(int length) { row_ += length / kPiece * kLineBytes; }

 private:
  static_assert(kTokenTiles == 1);
  static constexpr int kGroupsAtOnce = groups_at_once(kType), kScaleStride = scale_stride(kType);
  static constexpr int kScalesEach = kRows * kGroupsAtOnce / kThreads;  // that a thread brings at a time
  static constexpr bool kGateUp = kProduct == Product::kGateUp;
  static constexpr int kTileColumns = kColumns<kProduct> / kTiles;

  // One of those that a thread brings: of which of the group's rows, and of which of the columns' groups that are
  // brought.
  struct Place {
    int row, group;
    bool exists;
  };
  __device__ __forceinline__ Place place_of_scale(int i, int reciprocal) const {
    const unsigned number = threadIdx.x + i * kThreads;  // row by row
    const int row = static_cast<int>(number * static_cast<unsigned>(reciprocal) >> 16);
    return {row, static_cast<int>(number) - row * groups_, row < kRows};
  }

  // Their bits, 0 of rows beyond the last column; so that all of them are on their way at once.
  template <typename Bits>
  __device__ __forceinline__ void read_scales() {
    const int64_t of_expert = int64_t{expert_} * q_.scale_rows * q_.groups + first_group_;
#pragma unroll
    for (int i = 0; i < kScalesEach; ++i) {
      const Place place = place_of_scale(i, reciprocal_);
      const bool up = kGateUp && place.row >= kGateUpColumns;
      const int column = first_column_ + (up ? place.row - kGateUpColumns : place.row);
      const int row = weight_row<kProduct, int>(0, columns_, column, up, interleaved_) >> q_.row_shift;
      const int64_t at = of_expert + row * q_.groups + place.group;
      const bool inside = place.exists && column < columns_;
      scale_bits_[i] = inside ? __ldg(static_cast<const Bits*>(q_.scales) + at) : Bits{0};
      if constexpr (kType == WeightType::kInt4) {
        if (i % 4 == 0) zero_bits_[i / 4] = 0;
        if (inside && q_.zeros != nullptr) zero_bits_[i / 4] |= uint32_t{__ldg(q_.zeros + at)} << i % 4 * 8;
      }
    }
  }

  const Quantisation& q_;
  const bool interleaved_;
  const int expert_, columns_, first_column_;
  float* scales_;       // (kRows, kScaleStride) shared
  uint8_t* zeros_;      // (kRows, kZeroStride) shared
  const uint8_t* row_;  // the lane's first, and of that its bytes
  uint4 lines_[kTiles][2];
  int k_ = 0;                         // of the round
  int first_group_ = 0, groups_ = 0;  // whose scales are there, or
  bool arriving_ = false;             // on their way, and then
  int reciprocal_ = 0;                // what 2048 and less are divided by groups_ with, in 16 bits
  uint32_t scale_bits_[kScalesEach];
  uint32_t zero_bits_[(kScalesEach + 3) / 4];
};

template <typename T, WeightType kType>
void launch_typed(const SmallBatchParams& p, cudaStream_t stream) {
  launch<PackedWeights<T, kType, Product::kGateUp>, kTokenTiles, true>(p, stream);
  launch<PackedWeights<T, kType, Product::kDown>, kTokenTiles, false>(p, stream);
}

}  // namespace

int64_t packed_small_batch_shared_bytes(int64_t slots, int64_t num_experts, WeightType type) {
  return sums_bytes(kTokenTiles) + lists_bytes(slots, num_experts) + shared_bytes_of(type);
}

void launch_packed_small_batch(const SmallBatchParams& p, cudaStream_t stream) {
  for_16_bit_dtype(p.experts.dtype, [&](auto type) {
    for_weight_type(p.gate_up.type, [&](auto weights) { launch_typed<decltype(type), weights.value>(p, stream); });
  });
}

}  // namespace moe_ext::cuda
