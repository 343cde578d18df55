// Combine: out[t, :] = sum over slots s of weights[t, s] * y[position of (t, s), :]      (T, H)
//
// A thread owns kVector neighbouring columns of a token (16 bytes a load where rows allow) and reads kAtOnce slots
// before it adds the first. Slots are summed in slot order in float32, so that the result does not depend on
// scheduling. When observing, the same registers give ||y||^2: each warp adds up the columns that it holds, which is
// one part of a slot's square; moments.cu adds the parts.
//
// Cost: reads K * H, writes H elements a token; 2 K H FLOPs, and 2 K H more when observing. Bound by bandwidth.
#include "cuda/launch.h"
#include "cuda/next_kernel.cuh"
#include "cuda/numeric.cuh"
#include "cuda/ptx.cuh"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAtOnce = 8;

// Columns that a thread owns.
template <typename TY>
constexpr int kVector = std::is_same_v<TY, float> ? 1 : 8;

// kVector<TY> elements as they lie in memory.
template <typename TY>
using Piece = std::conditional_t<std::is_same_v<TY, float>, float, uint4>;

__device__ __forceinline__ void widen(float piece, float (&values)[1], float /*type*/) { values[0] = piece; }

template <typename T>
__device__ __forceinline__ void widen(const uint4& piece, float (&values)[8], T /*type*/) {
  const uint32_t pairs[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(pairs[i]);
    values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
  }
}

template <typename T>
__device__ __forceinline__ void store(T* destination, const float (&values)[1]) {
  *destination = from_float<T>(values[0]);
}

template <typename T>
__device__ __forceinline__ void store(T* destination, const float (&values)[8]) {
  *reinterpret_cast<uint4*>(destination) = make_uint4(pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
                                                      pack<T>(values[4], values[5]), pack<T>(values[6], values[7]));
}

// Sums of eight values over the warp with nine shuffles: lane l gets that of value l / 4. At each of the first three
// steps a lane gives away half of its values and adds what it gets to the other half.
__device__ __forceinline__ float warp_sums(const float (&values)[8]) {
  const int lane = threadIdx.x % kWarpSize;
  float left[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) left[i] = values[i];
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane & (4 * half);
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? left[i] : left[i + half];
      left[i] = (upper ? left[i + half] : left[i]) + __shfl_xor_sync(kAllLanes, given, 4 * half);
    }
  }
  left[0] += __shfl_xor_sync(kAllLanes, left[0], 2);
  return left[0] + __shfl_xor_sync(kAllLanes, left[0], 1);
}

template <typename TY, typename T, bool kObserve>
__global__ void __launch_bounds__(kThreads) combine_kernel(CombineParams p) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  constexpr int kColumns = kVector<TY>;
  const unsigned blocks_per_token = static_cast<unsigned>((p.hidden + kThreads * kColumns - 1) / (kThreads * kColumns));
  const int64_t token = blockIdx.x / blocks_per_token;
  const int64_t column = (int64_t{blockIdx.x % blocks_per_token} * kThreads + threadIdx.x) * kColumns;
  const bool inside = column < p.hidden;
  const TY* y = static_cast<const TY*>(p.y) + column;
  const int64_t end = (token + 1) * p.top_k;

  float sum[kColumns] = {};
  for (int64_t first = token * p.top_k; first < end; first += kAtOnce) {
    Piece<TY> pieces[kAtOnce];
    float weights[kAtOnce];
    bool present[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int position = first + i < end ? p.position_of[first + i] : -1;
      present[i] = position >= 0;
      weights[i] = present[i] ? weight_of(p.weights, p.weights_dtype, first + i) : 0.0f;
      pieces[i] = Piece<TY>{};
      if (present[i] && inside) pieces[i] = *reinterpret_cast<const Piece<TY>*>(y + position * p.hidden);
    }
    float squares[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (!present[i]) continue;  // not even 0 * y: an empty slot adds nothing
      float values[kColumns];
      widen(pieces[i], values, TY{});
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        sum[j] += weights[i] * values[j];
        if constexpr (kObserve) squares[i] += values[j] * values[j];
      }
    }
    if constexpr (kObserve) {
      const float square = warp_sums(squares);
      const int64_t slot = first + threadIdx.x % kWarpSize / 4;
      const int64_t part = (column - threadIdx.x % kWarpSize * kColumns) / (kColumns * kWarpSize);
      const int64_t parts = combine_parts(p.hidden, p.y_dtype);
      if (threadIdx.x % 4 == 0 && slot < end && part < parts) p.squares[slot * parts + part] = square;
    }
  }
  if (inside) store(static_cast<T*>(p.out) + token * p.hidden + column, sum);
}

template <typename TY, typename T>
void launch_typed(const CombineParams& p, cudaStream_t stream) {
  const int64_t columns = kThreads * kVector<TY>;
  const unsigned blocks = grid_size(p.tokens * ((p.hidden + columns - 1) / columns));
  if (p.squares == nullptr) {
    launch_next<combine_kernel<TY, T, false>>("combine_kernel", blocks, kThreads, 0, stream, p);
  } else {
    launch_next<combine_kernel<TY, T, true>>("combine_kernel", blocks, kThreads, 0, stream, p);
  }
}

}  // namespace

void launch_combine(const CombineParams& p, cudaStream_t stream) {
  const bool plain = p.y_dtype == DType::kFloat32;
  switch (p.dtype) {
    case DType::kFloat32:
      return launch_typed<float, float>(p, stream);
    case DType::kBFloat16:
      return plain ? launch_typed<float, __nv_bfloat16>(p, stream)
                   : launch_typed<__nv_bfloat16, __nv_bfloat16>(p, stream);
    case DType::kFloat16:
      return plain ? launch_typed<float, __half>(p, stream) : launch_typed<__half, __half>(p, stream);
  }
}

}  // namespace moe_ext::cuda
