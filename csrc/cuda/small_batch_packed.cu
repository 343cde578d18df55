// Small batches of quantised weights: what device/small_batch.cuh multiplies with. A warp's piece is four lines
// (packed.cuh) of every row, or two of four-bit weights, so that each byte of weights is read once, 16 a lane, and
// turned into operands in registers.
//
// Scales of groups of columns, and zero points, come with the piece: of the lane's two rows the first lane of four
// reads those of the first line, and so on, and they go round when their line is multiplied. They are applied to sums
// of a group's columns, or of a line's, in float32. Those of whole rows are applied at the end of a unit.
#include "cuda/device/dispatch.cuh"
#include "cuda/device/packed.cuh"
#include "cuda/device/small_batch.cuh"
#include "cuda/params.h"

namespace moe_ext::cuda {
namespace {

using namespace small_batch;  // NOLINT: the kernel that is made here

constexpr int kTokenTiles = kSmallBatchPackedTokens / 8;

template <typename T, WeightType kOfType, Product kOf>
class PackedWeights {
 public:
  using Element = T;
  static constexpr Product kProduct = kOf;
  static constexpr WeightType kType = kOfType;
  static constexpr int kLines = small_batch_row_bytes(kType) / kLineBytes;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kEarly = kType == WeightType::kInt4 ? 0 : kLines / 2;  // ptxas would spill
#else
  static constexpr int kEarly = kLines / 2;
#endif
  static constexpr int kPiece = kLines * kLineColumns<kType>;
  static constexpr int kPadding = small_batch_padding(kType);
  static constexpr int kScales = has_four_bits(kType) ? kStepsPerLine<kType> : 1;  // of a line and row at most
  struct Piece {
    uint4 lines[kLines][2];
    uint32_t scales[2][kScales];  // bits, of the lane's line
    uint32_t zeros[2];            // a byte each
  };

  __device__ __forceinline__ PackedWeights(const SmallBatchParams& p, int /*inner*/, int columns)
      : q_(kGateUp ? p.gate_up : p.down),
        all_(static_cast<const uint8_t*>(kGateUp ? p.experts.gate_up : p.experts.down)),
        interleaved_(kGateUp && p.experts.formula.interleaved),
        columns_(columns) {}

  __device__ __forceinline__ void begin(int expert, int first_column, int k, int last_k) {
    left_ = last_k - k;
    first_group_ = (k + line_of_lane() * kLineColumns<kType>) >> q_.group_shift;
    const Row first = row_of(first_column, 0), second = row_of(first_column, 1);
    row_ = all_ + (int64_t{expert} * weight_rows(kProduct, columns_) + first.number) * q_.row_bytes +
           k / kLineColumns<kType> * kLineBytes + threadIdx.x % 4 * 16;
    scales_ = scales_of_row(q_, expert, first.number);
    if constexpr (!has_four_bits(kType)) {
      to_second_block_ = static_cast<int>(scales_of_row(q_, expert, second.number) - scales_);
    }
    present_[0] = first.present, present_[1] = second.present;
  }

  __device__ __forceinline__ void load_early(Piece& piece) const {
#pragma unroll
    for (int line = 0; line < kEarly; ++line) load(piece, line);
  }

  __device__ __forceinline__ void load_rest(Piece& piece) {
#pragma unroll
    for (int line = kEarly; line < kLines; ++line) load(piece, line);
    load_scales(piece);
    advance();
  }

  __device__ __forceinline__ void multiply(float (&acc)[kTokenTiles][4], Piece& piece, const char* staged,
                                           int row_bytes, int tokens, int k, bool last) {
    const char* of_token = staged + min(row_of_lane(), tokens - 1) * row_bytes + k * 2;  // tokens beyond are not used
    if constexpr (!has_four_bits(kType)) {
      multiply<kStepsPerLine<kType>>(acc[0], piece, of_token, last);
    } else if (kType == WeightType::kMxfp4 || q_.group_shift == 5) {
      multiply<1>(acc[0], piece, of_token, last);
    } else if constexpr (kType == WeightType::kInt4) {
      if (q_.group_shift == 6) {
        multiply<2>(acc[0], piece, of_token, last);
      } else {
        multiply<4>(acc[0], piece, of_token, last);
      }
    }
  }

  __device__ __forceinline__ void scale(float (&acc)[kTokenTiles][4], int expert, int first_column) const {
    if (in_groups()) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Row row = row_of(first_column, half);
      const float factor = row.present ? scale_at(q_, scales_of_row(q_, expert, row.number)) : 0.0f;
      acc[0][2 * half] *= factor, acc[0][2 * half + 1] *= factor;
    }
  }

 private:
  static_assert(kTokenTiles == 1);
  static constexpr bool kGateUp = kProduct == Product::kGateUp;

  // The lane's first or second row: which of its expert's, and whether there is such a column of the result.
  struct Row {
    int number;
    bool present;
  };
  __device__ __forceinline__ Row row_of(int first_column, int half) const {
    const int column = first_column + tile_of_warp() * (kColumns<kProduct> / kTiles) + row_of_lane();
    if (kGateUp) return {weight_row<kProduct, int>(0, columns_, column, half == 1, interleaved_), column < columns_};
    return {column + 8 * half, column + 8 * half < columns_};
  }

  // From the lane's first row to its second: rows, their bytes and their scales.
  __device__ __forceinline__ int rows_to_second() const { return kGateUp ? (interleaved_ ? 1 : columns_) : 8; }
  __device__ __forceinline__ int64_t to_second_row() const { return rows_to_second() * q_.row_bytes; }
  __device__ __forceinline__ int64_t to_second_scales() const {
    return has_four_bits(kType) ? int64_t{rows_to_second()} * q_.groups : to_second_block_;  // blocks have rows, too
  }

  // Whether scales are those of groups of columns.
  __device__ __forceinline__ bool in_groups() const {
    return has_four_bits(kType) || (kType == WeightType::kFloat8 && q_.groups > 1);
  }
  static_assert(kStepColumns == 1 << 5);

  // A scale is that of so many steps of a line.
  template <int kSteps>
  __device__ __forceinline__ void multiply(float (&acc)[4], Piece& piece, const char* of_token, bool last) {
    constexpr int kHere = kStepsPerLine<kType> / kSteps;
    float scales[2][kHere];  // of the lane's line
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kHere; ++i) {
        scales[half][i] = in_groups() ? scale_of_bits(q_.scale_type, piece.scales[half][i]) : 1.0f;
      }
    }
    const uint32_t zeros[2] = {piece.zeros[0], piece.zeros[1]};
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
      uint32_t of_line_zeros[2] = {0x08080808u, 0x08080808u};
      if (kType == WeightType::kInt4 && q_.zeros != nullptr) {
        of_line_zeros[0] = of_line(line, zeros[0]), of_line_zeros[1] = of_line(line, zeros[1]);
      }
#pragma unroll
      for (int scale = 0; scale < kHere; ++scale) {
        float sum[4] = {};
        const uint32_t zero[2] = {zero_pair<T>(of_line_zeros[0] >> 8 * scale & 255),
                                  zero_pair<T>(of_line_zeros[1] >> 8 * scale & 255)};
#pragma unroll
        for (int step = scale * kSteps; step < (scale + 1) * kSteps; ++step) {
          const uint4 b = *reinterpret_cast<const uint4*>(of_token + line * kLineColumns<kType> * 2 +
                                                          chunk_of_lane<kType>(step) * 16);
          uint32_t upper[4], lower[4];
          values_of<kType, T>(piece.lines[line][0], step, zero[0], upper);
          values_of<kType, T>(piece.lines[line][1], step, zero[1], lower);
          ptx::multiply_add(sum, {upper[0], lower[0], upper[1], lower[1]}, b.x, b.y, T{});
          ptx::multiply_add(sum, {upper[2], lower[2], upper[3], lower[3]}, b.z, b.w, T{});
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float factor = of_line(line, scales[half][scale]);
          acc[2 * half] = fmaf(factor, sum[2 * half], acc[2 * half]);
          acc[2 * half + 1] = fmaf(factor, sum[2 * half + 1], acc[2 * half + 1]);
        }
      }
      if (line < kEarly || !last) load(piece, line);
    }
    if (last) return;
    load_scales(piece);  // not before: they would need registers of their own
    advance();
  }

  // The line of a piece whose scales the lane brings, and what the lane of a line has, of four lanes.
  static __device__ __forceinline__ int line_of_lane() { return threadIdx.x % kLines; }
  template <typename Value>
  static __device__ __forceinline__ Value of_line(int line, Value value) {
    return __shfl_sync(kAllLanes, value, line, 4);
  }

  // Zeros beyond the last column of the result; anything beyond the last of k, for which activations are zeros.
  __device__ __forceinline__ void load(Piece& piece, int line) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      piece.lines[line][half] = make_uint4(0, 0, 0, 0);
      if (line * kLineColumns<kType> < left_ && present_[half]) {
        piece.lines[line][half] = ptx::load_once(row_ + half * to_second_row() + line * kLineBytes);
      }
    }
  }

  __device__ __forceinline__ void load_scales(Piece& piece) const {
    if (!in_groups()) return;
    if (q_.scale_type == ScaleType::kFloat32) {
      load_scales_of<uint32_t>(piece);
    } else if (q_.scale_type == ScaleType::kE8M0) {
      load_scales_of<uint8_t>(piece);
    } else {
      load_scales_of<uint16_t>(piece);
    }
  }

  __device__ __forceinline__ void advance() {
    constexpr int kStep = kParts * kPiece;
    left_ -= kStep;
    first_group_ += kStep >> q_.group_shift;
    row_ += kStep / kLineColumns<kType> * kLineBytes;
  }

  template <typename Bits>
  __device__ __forceinline__ void load_scales_of(Piece& piece) const {
    const int here = has_four_bits(kType) ? kLineColumns<kType> >> q_.group_shift : 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kType == WeightType::kInt4) piece.zeros[half] = 0;
#pragma unroll
      for (int i = 0; i < kScales; ++i) {
        piece.scales[half][i] = 0;
        if (i >= here || !present_[half] || first_group_ + i >= q_.groups) continue;
        const int64_t at = scales_ + half * to_second_scales() + first_group_ + i;
        piece.scales[half][i] = __ldg(static_cast<const Bits*>(q_.scales) + at);
        if constexpr (kType == WeightType::kInt4) {
          if (q_.zeros != nullptr) piece.zeros[half] |= uint32_t{__ldg(q_.zeros + at)} << 8 * i;
        }
      }
    }
  }

  const Quantisation& q_;
  const uint8_t* all_;
  const bool interleaved_;
  const int columns_;
  const uint8_t* row_;   // the lane's bytes of the next piece of its first row
  int64_t scales_;       // where those of its first row begin, and
  int to_second_block_;  // of eight-bit weights, how far from there those of the second do
  int left_;             // elements of k from there on
  int first_group_;      // of the lane's line
  bool present_[2];
};

template <typename T, WeightType kType>
void launch_typed(const SmallBatchParams& p, cudaStream_t stream) {
  launch<PackedWeights<T, kType, Product::kGateUp>, kTokenTiles, true>(p, stream);
  launch<PackedWeights<T, kType, Product::kDown>, kTokenTiles, false>(p, stream);
}

}  // namespace

void launch_packed_small_batch(const SmallBatchParams& p, cudaStream_t stream) {
  for_16_bit_dtype(p.experts.dtype, [&](auto type) {
    for_weight_type(p.gate_up.type, [&](auto weights) { launch_typed<decltype(type), weights.value>(p, stream); });
  });
}

}  // namespace moe_ext::cuda
