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
  static constexpr int kPiece = 32;  // 8 a lane, four lanes a row
  static constexpr int kPadding = 64;
  static constexpr int kSharedBytes = 0;
  static constexpr bool kManyRegisters = false;

  __device__ __forceinline__ PlainWeights(const SmallBatchParams& p, int expert, int first_column, int inner,
                                          int columns, int first_k, char* /*shared*/)
      : inner_(inner), columns_(columns), first_column_(first_column) {
    // The lane's first row of weights, and the up row of the same column or the row eight on.
    const ExpertsParams& e = p.experts;
    const int64_t row = weight_row<kProduct, int64_t>(expert, columns, first_column + row_of_lane(), false);
    rows_[0] = static_cast<const T*>(kGateUp ? e.gate_up : e.down) + row * inner + first_k;
    rows_[1] = rows_[0] + int64_t{kGateUp ? columns : 8} * inner;
  }

  __device__ __forceinline__ void begin(int /*k*/) const {}

  // The lane's 16 bytes of its two rows of weights in every m16 tile of the group; zeros from `here` on and beyond the
  // last column.
  __device__ __forceinline__ void load(int k, int here) {
    constexpr int kTileColumns = kColumns<kProduct> / kTiles;
    k += k_of_lane();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = first_column_ + tile * kTileColumns + row_of_lane() + (kGateUp ? 0 : half * 8);
        weights_[tile][half] = make_uint4(0, 0, 0, 0);
        if (k < here && column < columns_) {
          weights_[tile][half] = ptx::load_once(rows_[half] + int64_t{tile * kTileColumns} * inner_ + k);
        }
      }
    }
  }

  __device__ __forceinline__ bool share() const { return false; }

  template <int kTokenTiles>
  __device__ __forceinline__ void multiply(float (&acc)[kTiles][kTokenTiles][4], const char* staged, int row_bytes,
                                           int tokens, int k, int /*k_begin*/) const {
#pragma unroll
    for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
      const int token = min(token_tile * 8 + row_of_lane(), tokens - 1);  // the columns beyond are not used
      const uint4 b = *reinterpret_cast<const uint4*>(staged + token * row_bytes + (k + k_of_lane()) * 2);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 upper = weights_[tile][0], lower = weights_[tile][1];
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
        ptx::multiply_add(acc[tile][token_tile], first, b.x, b.y, T{});
        ptx::multiply_add(acc[tile][token_tile], second, b.z, b.w, T{});
      }
    }
  }

  __device__ __forceinline__ void advance(int length) {
#pragma unroll
    for (int half = 0; half < 2; ++half) rows_[half] += length;
  }

 private:
  static constexpr bool kGateUp = kProduct == Product::kGateUp;
  static __device__ __forceinline__ int k_of_lane() { return threadIdx.x % 4 * 8; }

  const T* rows_[2];
  int inner_, columns_, first_column_;
  uint4 weights_[kTiles][2];
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
  if (type != WeightType::kPlain) return packed_small_batch_shared_bytes(slots, num_experts, type);
  return sums_bytes(token_tiles_of(tokens)) + lists_bytes(slots, num_experts);
}

void launch_small_batch(const SmallBatchParams& p, cudaStream_t stream) {
  for_16_bit_dtype(p.experts.dtype, [&](auto type) { launch_typed<decltype(type)>(p, stream); });
}

}  // namespace moe_ext::cuda
