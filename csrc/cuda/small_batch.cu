// Small batches of weights in bf16 and fp16: what device/small_batch.cuh multiplies with.
#include "cuda/device/dispatch.cuh"
#include "cuda/device/small_batch.cuh"
#include "cuda/params.h"

namespace moe_ext::cuda {
namespace {

using namespace small_batch;  // NOLINT: the kernel that is made here

constexpr int token_tiles_of(int64_t tokens) { return tokens <= 8 ? 1 : 2; }

template <typename T, Product kOf>
class PlainWeights {
 public:
  using Element = T;
  static constexpr Product kProduct = kOf;
  static constexpr WeightType kType = WeightType::kPlain;
  static constexpr int kChunks = small_batch_row_bytes(kType) / 64;  // of a row, 64 bytes each
  static constexpr int kPiece = kChunks * 32;                        // 8 a lane, four lanes a row
  static constexpr int kPadding = 64;
  struct Piece {
    uint4 weights[kChunks][2];
  };

  __device__ __forceinline__ PlainWeights(const SmallBatchParams& p, int inner, int columns)
      : all_(static_cast<const T*>(kGateUp ? p.experts.gate_up : p.experts.down)), inner_(inner), columns_(columns) {}

  __device__ __forceinline__ void begin(int expert, int first_column, int k, int last_k) {
    // The lane's first row of weights, and the up row of the same column or the row eight on.
    const int column = first_column + tile_of_warp() * (kColumns<kProduct> / kTiles) + row_of_lane();
    const int64_t row = weight_row<kProduct, int64_t>(expert, columns_, column, false);
    row_ = all_ + row * inner_ + k + k_of_lane();
    const bool second = kGateUp ? column < columns_ : column + 8 < columns_;
    left_[0] = column < columns_ ? last_k - k - k_of_lane() : 0;
    left_[1] = second ? last_k - k - k_of_lane() : 0;
  }

  __device__ __forceinline__ void load_early(Piece& piece) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks / 2; ++chunk) load(piece, chunk);
  }

  __device__ __forceinline__ void load_rest(Piece& piece) {
#pragma unroll
    for (int chunk = kChunks / 2; chunk < kChunks; ++chunk) load(piece, chunk);
    advance();
  }

  template <int kTokenTiles>
  __device__ __forceinline__ void multiply(float (&acc)[kTokenTiles][4], Piece& piece, const char* staged,
                                           int row_bytes, int tokens, int k, bool last) {
    const char* of_token[kTokenTiles];
#pragma unroll
    for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
      const int token = min(token_tile * 8 + row_of_lane(), tokens - 1);  // the columns beyond are not used
      of_token[token_tile] = staged + token * row_bytes + (k + k_of_lane()) * 2;
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const uint4 upper = piece.weights[chunk][0], lower = piece.weights[chunk][1];
#pragma unroll
      for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
        const uint4 b = *reinterpret_cast<const uint4*>(of_token[token_tile] + chunk * 64);
        ptx::multiply_add(acc[token_tile], {upper.x, lower.x, upper.y, lower.y}, b.x, b.y, T{});
        ptx::multiply_add(acc[token_tile], {upper.z, lower.z, upper.w, lower.w}, b.z, b.w, T{});
      }
      if (chunk < kChunks / 2 || !last) load(piece, chunk);
    }
    if (!last) advance();
  }

  template <int kTokenTiles>
  __device__ __forceinline__ void scale(float (& /*acc*/)[kTokenTiles][4], int /*expert*/, int /*first_column*/) const {
  }

 private:
  static constexpr bool kGateUp = kProduct == Product::kGateUp;
  static __device__ __forceinline__ int k_of_lane() { return threadIdx.x % 4 * 8; }

  // Zeros beyond the last element and beyond the last column.
  __device__ __forceinline__ void load(Piece& piece, int chunk) const {
    const int64_t second = int64_t{kGateUp ? columns_ : 8} * inner_;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      piece.weights[chunk][half] = make_uint4(0, 0, 0, 0);
      if (chunk * 32 < left_[half]) piece.weights[chunk][half] = ptx::load_once(row_ + half * second + chunk * 32);
    }
  }

  __device__ __forceinline__ void advance() {
    row_ += kParts * kPiece;
    left_[0] -= kParts * kPiece, left_[1] -= kParts * kPiece;
  }

  const T* all_;
  int inner_, columns_;
  const T* row_;  // the lane's part of the next piece of its first row
  int left_[2];   // elements of k from there on, of both rows
};

template <typename T, int kTokenTiles>
void launch_tiles(const SmallBatchParams& p, cudaStream_t stream) {
  using GateUp = PlainWeights<T, Product::kGateUp>;
  if (p.experts.channels == nullptr) {
    launch<GateUp, kTokenTiles, false>(p, stream);
  } else {
    launch<GateUp, kTokenTiles, true>(p, stream);
  }
  launch<PlainWeights<T, Product::kDown>, kTokenTiles, false>(p, stream);
}

template <typename T>
void launch_typed(const SmallBatchParams& p, cudaStream_t stream) {
  token_tiles_of(p.experts.tokens) == 1 ? launch_tiles<T, 1>(p, stream) : launch_tiles<T, 2>(p, stream);
}

}  // namespace

int64_t small_batch_shared_bytes(int64_t tokens, int64_t slots, int64_t num_experts, WeightType type) {
  const int token_tiles = type == WeightType::kPlain ? token_tiles_of(tokens) : kSmallBatchPackedTokens / 8;
  return sums_bytes(token_tiles) + lists_bytes(slots, num_experts);
}

void launch_small_batch(const SmallBatchParams& p, cudaStream_t stream) {
  for_16_bit_dtype(p.experts.dtype, [&](auto type) { launch_typed<decltype(type)>(p, stream); });
}

}  // namespace moe_ext::cuda
