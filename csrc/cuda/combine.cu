// Combine: out[t, :] = sum over slots s of weights[t, s] * y[position of (t, s), :]      (T, H)
//
// A warp takes part of a token's columns, kPieces pieces of neighbouring ones a lane at a time (16 bytes each where
// rows allow), and reads kAtOnce slots of them before it adds the first. Slots are summed in slot order in float32, so
// that the result does not depend on scheduling. When observing, the same registers give ||y||^2: of 16-bit elements by
// the tensor cores, a slot's pieces times themselves, with an eighth of the instructions; each warp's sum is one part
// of a slot's square, and moments.cu adds the parts.
//
// Cost: reads K * H, writes H elements a token; 2 K H FLOPs, and 2 K H more when observing. Bound by bandwidth.
#include "cuda/device/dispatch.cuh"
#include "cuda/device/next_kernel.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/ptx_sm80.cuh"
#include "cuda/launch.h"
#include "cuda/params.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int kPieces = 2;
constexpr int kLeastBlocks = 6;  // a multiprocessor: 168 registers a thread, so that what is read at once has room
constexpr int kShares = 8;       // that a warp leaves of a sum of squares

// Columns of a piece.
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

// Sums of squares that build up in a warp: add() takes a piece a lane, leave() leaves eight shares of the sum of all.
template <typename T>
struct Squares {
  float products[4] = {};  // of an 8x8 matrix over groups of four lanes, whose diagonal counts; the rest is not used
  __device__ __forceinline__ void add(const uint4& piece) {
    const uint32_t first[4] = {piece.x, 0, piece.y, 0}, second[4] = {piece.z, 0, piece.w, 0};
    ptx::multiply_add(products, first, piece.x, piece.y, T{});
    ptx::multiply_add(products, second, piece.z, piece.w, T{});
  }
  __device__ __forceinline__ void leave(float* shares) const {
    const int lane = threadIdx.x % kWarpSize, group = lane / 4;
    if (lane % 4 == group / 2) shares[group] = group % 2 == 0 ? products[0] : products[1];
  }
};

template <>
struct Squares<float> {
  float sum = 0.0f;
  __device__ __forceinline__ void add(float piece) { sum += piece * piece; }
  __device__ __forceinline__ void leave(float* shares) const {
    const float half = sum + __shfl_xor_sync(kAllLanes, sum, 16);
    const float quarter = half + __shfl_xor_sync(kAllLanes, half, 8);
    if (threadIdx.x % kWarpSize < kShares) shares[threadIdx.x % kWarpSize] = quarter;
  }
};

template <typename TY, typename T, int kAtOnce, bool kObserve>
__global__ void __launch_bounds__(kThreads, kLeastBlocks) combine_kernel(CombineParams p) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  constexpr int kColumns = kVector<TY>, kStep = kWarpSize * kColumns, kChunk = kPieces * kStep;
  static_assert(kChunk == kCombineChunk<sizeof(TY)>);
  const int hidden = static_cast<int>(p.hidden), top_k = static_cast<int>(p.top_k), parts = static_cast<int>(p.parts);
  const unsigned warp = blockIdx.x * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const int token = static_cast<int>(warp / parts), part = static_cast<int>(warp % parts);
  if (token >= p.tokens) return;
  const int lane = threadIdx.x % kWarpSize;
  const int begin = part * static_cast<int>(p.part_columns) + lane * kColumns;
  const int end = min(hidden, (part + 1) * static_cast<int>(p.part_columns));
  const int slots_end = (token + 1) * top_k;  // T * K fits (experts.cpp)
  T* out = static_cast<T*>(p.out) + int64_t{token} * hidden;

  float sum[kPieces][kColumns] = {};
  for (int first = token * top_k; first < slots_end; first += kAtOnce) {
    const TY* rows[kAtOnce];  // null: an empty slot
    float weights[kAtOnce];
    Squares<TY> squares[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int position = first + i < slots_end ? p.position_of[first + i] : -1;
      rows[i] = position < 0 ? nullptr : static_cast<const TY*>(p.y) + int64_t{position} * hidden;
      weights[i] = position < 0 ? 0.0f : weight_of(p.weights, p.weights_dtype, first + i);
    }
    for (int column = begin; column - lane * kColumns < end; column += kChunk) {
      Piece<TY> pieces[kAtOnce][kPieces];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
          pieces[i][j] = Piece<TY>{};
          if (rows[i] != nullptr && column + j * kStep < end) {
            pieces[i][j] = *reinterpret_cast<const Piece<TY>*>(rows[i] + column + j * kStep);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        // An empty slot adds 0 * 0: no sum starts as -0, so that not a bit changes.
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
          float values[kColumns];
          widen(pieces[i][j], values, TY{});
#pragma unroll
          for (int k = 0; k < kColumns; ++k) sum[j][k] += weights[i] * values[k];
          if constexpr (kObserve) squares[i].add(pieces[i][j]);
        }
      }
      if (first + kAtOnce < slots_end) continue;  // a part is one chunk where a token's slots do not fit (heuristics.h)
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if (column + j * kStep < end) store(out + column + j * kStep, sum[j]);
#pragma unroll
        for (int k = 0; k < kColumns; ++k) sum[j][k] = 0.0f;
      }
    }
    if constexpr (kObserve) {
      __shared__ float shares[kThreads / kWarpSize][kAtOnce][kShares];
      float (&of_warp)[kAtOnce][kShares] = shares[threadIdx.x / kWarpSize];
      __syncwarp();  // those of the slots before have been read
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) squares[i].leave(of_warp[i]);
      __syncwarp();
      if (lane < kAtOnce && first + lane < slots_end) {
        float square = 0.0f;
#pragma unroll
        for (int i = 0; i < kShares; ++i) square += of_warp[lane][i];
        p.squares[int64_t{first + lane} * parts + part] = square;
      }
    }
  }
}

template <typename TY, typename T, int kAtOnce>
void launch_at_once(const CombineParams& p, cudaStream_t stream) {
  const int64_t warps = kThreads / kWarpSize;
  const unsigned blocks = grid_size((p.tokens * p.parts + warps - 1) / warps);
  if (p.squares == nullptr) {
    launch_next<combine_kernel<TY, T, kAtOnce, false>>("combine_kernel", blocks, kThreads, 0, stream, p);
  } else {
    launch_next<combine_kernel<TY, T, kAtOnce, true>>("combine_kernel", blocks, kThreads, 0, stream, p);
  }
}

template <typename TY, typename T>
void launch_typed(const CombineParams& p, cudaStream_t stream) {
  p.top_k <= 2 ? launch_at_once<TY, T, 2>(p, stream) : launch_at_once<TY, T, kCombineAtOnce>(p, stream);
}

}  // namespace

void launch_combine(const CombineParams& p, cudaStream_t stream) {
  for_row_dtype(p.y_dtype, p.dtype,
                [&](auto row, auto type) { launch_typed<decltype(row), decltype(type)>(p, stream); });
}

}  // namespace moe_ext::cuda
