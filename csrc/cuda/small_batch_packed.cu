// Small batches of quantised weights: what device/small_batch.cuh multiplies with. A warp's piece is a line
// (packed.cuh) of every row, so that each byte of weights is read once, 16 a lane, and turned into operands in
// registers.
//
// Scales come through shared memory: the block's threads read those of the group's 64 rows for the next groups of
// columns side by side, as a lane would use two bytes of a sector of 32. A warp applies them to its sums of 32 columns
// (64 of eight-bit weights), in float32.
//
// Instructions a weight, of the machine code for sm_80, in the loop over steps: int4 3.2, mxfp4 3.3, int8 3.0 (bf16)
// and 2.3 (fp16), e4m3 4.3.
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
  static constexpr bool kManyRegisters = kType == WeightType::kInt8 || kType == WeightType::kFloat8;

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
    arriving_ = k >> q_.group_shift >= first_group_ + groups_;
    if (!arriving_) return;
    first_group_ = k >> q_.group_shift;
    groups_ = min(kGroupsAtOnce, q_.groups - first_group_);
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
    int groups = groups_;
    ptx::keep(groups);  // places are computed again: there are no registers to keep them in
    const unsigned reciprocal = reciprocal_of(groups);
    [[maybe_unused]] uint64_t zeros = 0;  // a byte each
    if constexpr (kType == WeightType::kInt4) {
      static_assert(kScalesEach <= 8);
      if (q_.zeros != nullptr) {
#pragma unroll
        for (int i = 0; i < kScalesEach; ++i) {
          const Place place = place_of_scale(i, reciprocal);
          if (place.inside) zeros |= uint64_t{__ldg(q_.zeros + index_of(place))} << 8 * i;
        }
      }
    }
    __syncthreads();  // those before are not read any more
#pragma unroll
    for (int i = 0; i < kScalesEach; ++i) {
      const Place place = place_of_scale(i, reciprocal);
      if (!place.exists) continue;
      scales_[place.row * kScaleStride + place.group] = scale_of_bits(q_.scale_type, scale_bits_[i]);
      if constexpr (kType == WeightType::kInt4) {
        zeros_[place.row * kZeroStride + place.group] = static_cast<uint8_t>(zeros >> 8 * i);
      }
    }
    return true;
  }

  __device__ __forceinline__ void multiply(float (&acc)[kTiles][kTokenTiles][4], const char* staged, int row_bytes,
                                           int tokens, int k, int k_begin) const {
    constexpr int kSteps = 1;  // of a scale: two of eight-bit weights at a time would spill
    const char* of_token = staged + min(row_of_lane(), tokens - 1) * row_bytes + k * 2;  // tokens beyond are not used
#pragma unroll 1                                                                         // so would more
    for (int first = 0; first < kStepsPerLine<kType>; first += kSteps) {
      const int group = (k_begin + k + first * kStepColumns) >> q_.group_shift;
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
  // brought; whether it is one, and of a row up to the last column.
  struct Place {
    int row, group;
    bool exists, inside;
  };
  // What numbers up to 2048 are divided by `groups` with: the upper 16 bits of their product.
  static __device__ __forceinline__ unsigned reciprocal_of(int groups) {
    return 65536u / static_cast<unsigned>(groups) + 1;
  }
  static __device__ __forceinline__ bool is_up(int row) { return kGateUp && row >= kGateUpColumns; }
  __device__ __forceinline__ int column_of(int row) const {
    return first_column_ + (is_up(row) ? row - kGateUpColumns : row);
  }
  __device__ __forceinline__ Place place_of_scale(int i, unsigned reciprocal) const {
    const unsigned number = threadIdx.x + i * kThreads;  // row by row
    const int row = static_cast<int>(number * reciprocal >> 16);
    return {row, static_cast<int>(number) - row * groups_, row < kRows, row < kRows && column_of(row) < columns_};
  }
  __device__ __forceinline__ int64_t index_of(const Place& place) const {
    const int row = weight_row<kProduct, int>(0, columns_, column_of(place.row), is_up(place.row), interleaved_);
    return scales_of_row(q_, expert_, row) + first_group_ + place.group;
  }

  // Their bits, 0 of rows beyond the last column; so that all of them are on their way at once.
  template <typename Bits>
  __device__ __forceinline__ void read_scales() {
    const unsigned reciprocal = reciprocal_of(groups_);
#pragma unroll
    for (int i = 0; i < kScalesEach; ++i) {
      const Place place = place_of_scale(i, reciprocal);
      scale_bits_[i] = place.inside ? __ldg(static_cast<const Bits*>(q_.scales) + index_of(place)) : Bits{0};
    }
  }

  const Quantisation& q_;
  const bool interleaved_;
  const int expert_, columns_, first_column_;
  float* scales_;       // (kRows, kScaleStride) shared
  uint8_t* zeros_;      // (kRows, kZeroStride) shared
  const uint8_t* row_;  // the lane's first, and of that its bytes
  uint4 lines_[kTiles][2];
  int first_group_ = 0, groups_ = 0;  // whose scales are there, or
  bool arriving_ = false;             // on their way, and then
  uint32_t scale_bits_[kScalesEach];
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
