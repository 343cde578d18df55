// Grouped products for large batches on sm_90a (H100, H200), bf16 and fp16, float32 accumulation:
//   gate_up   h[p, :] = act(gate[e] x) * (up[e] x),  x = x[token of p, :]          (positions, I)
//   down      y[p, :] = down[e] h[p, :]                                            (positions, H)
//
// The products are computed transposed: weights are wgmma's first operand, whose rows come in 64s, and positions its
// second, whose rows come in 16s here, because experts have any number of positions and weights do not. A tile is 256
// rows of weights (in gate_up 128 of gate and the 128 of up for the same columns of c) by up to 192 positions of one
// expert, numbered as in tiles.cuh. One block a multiprocessor takes every gridDim.x-th tile:
//   producer    one warpgroup: weights by TMA, one map over all experts' (E * rows, k); activations gathered row by row
//               with 16-byte cp.async into the same swizzled layout, zeros beyond the tile's rows and beyond k
//   consumers   two warpgroups, each 128 of the tile's rows of weights in two wgmmas m64: in gate_up one is gate and
//               the other up, so that a thread has both of the same element in its accumulators
// They meet at two mbarriers for each of kStages steps of 64 elements of k: `full` (filled) and `empty` (multiplied).
// Results are turned by stmatrix on their way through shared memory and leave in rows of 128 bytes. Where energies of
// channels are observed, the tensor cores of mma.sync weight and add up the squares of a warp's 16 columns, of operands
// that accumulators and energies.cu's table are as they stand. A position that is not counted has weight 0; where
// the sum is no number, which such a position alone may cause, a thread adds up once more, from what is staged.
//
// Memory order: TMA counts its bytes on `full`. A producer's cp.async are its own writes: it waits for those of the
// step before, fences them towards wgmma's proxy and only then arrives, so that one step is always under way. Weights
// of other experts that a box covers beyond an expert's last row give columns that are not stored.
//
// Every element is a sum in order of k by one warpgroup: deterministic. Cost of a tile: 2 * 256 * rows * k FLOPs, with
// rows rounded up to a multiple of 16; reads (256 + rows) * k elements, at 192 rows 110 FLOPs a byte.
#include <cuda.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/device/dispatch.cuh"
#include "cuda/device/next_kernel.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/ptx_sm80.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/launch.h"
#include "cuda/params.h"
#include "cuda/shapes.h"
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include "cuda/device/ptx_sm90.cuh"
#include "cuda/device/wgmma.cuh"
#endif

namespace moe_ext::cuda {
namespace {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kConsumers = 2;       // warpgroups; the producer comes after them
constexpr int kThreads = (kConsumers + 1) * kGroupThreads;
constexpr int kMaxRows = kHopperRows;  // positions of a tile
constexpr int kWeightRows = kHopperColumns;
constexpr int kBoxRows = 128;  // of weights that one TMA brings
constexpr int kInner = 64;     // elements of k of a step: a row of 128 bytes
constexpr int kChunks = kInner / 8;
constexpr int kStages = 3;
constexpr int kWeightBytes = kWeightRows * kInner * 2;
constexpr int kStageBytes = kWeightBytes + kMaxRows * kInner * 2;
constexpr int kOutColumns = 64;  // of c that a consumer passes through shared memory at once: 128 bytes a row
constexpr int kOutBytes = kMaxRows * kOutColumns * 2;
constexpr int kBarriers = kStages * kStageBytes + kConsumers * kOutBytes;  // offset; before them the stages, then c
constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
static_assert(kSharedBytes <= 227 * 1024 && kStageBytes % 1024 == 0 && kWeightRows == 2 * kBoxRows);

// 65536 registers: 2 * 128 * 232 + 128 * 40.
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The ring of steps, as one role goes through it.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ uint32_t full(uint32_t shared, int stage) { return shared + kBarriers + stage * 8; }
__device__ __forceinline__ uint32_t empty(uint32_t shared, int stage) { return full(shared, kStages + stage); }

template <typename T, Product kProduct>
__device__ __forceinline__ void produce(const GemmParams& p, const CUtensorMap* weights, uint32_t shared,
                                        unsigned tiles) {
  constexpr bool kGateUp = kProduct == Product::kGateUp;
  constexpr int kColumns = kGateUp ? kBoxRows : kWeightRows;  // of c, a tile
  constexpr int kRowStep = kGroupThreads / kChunks;           // rows that all threads copy at once
  constexpr int kCopies = kMaxRows / kRowStep;
  static_assert(kRowStep == kFragment);
  const int thread = threadIdx.x % kGroupThreads;
  const int chunk = thread % kChunks, copy_row = thread / kChunks;
  const uint32_t copy_to = kWeightBytes + swizzled<kChunks>(copy_row, chunk);
  const int inner = static_cast<int>(p.inner);
  const uint32_t top_k = static_cast<uint32_t>(p.top_k);
  const int steps = (inner + kInner - 1) / kInner;
  Ring ring;
  int unannounced = -1;  // the stage whose copies are under way

  const auto announce = [&] {
    ptx::fence_async_proxy();
    __syncwarp();
    if (thread % kWarpSize == 0) ptx::barrier_arrive(full(shared, unannounced));
  };

  for (unsigned index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Place place = place_of(p, index, kMaxRows, kColumns);
    if (place.expert < 0) break;
    // Where this thread's chunks of a begin, in 16 bytes: 32 bits, for there are few registers (fits_hopper()).
    uint32_t sources[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = copy_row + i * kRowStep;
      sources[i] = 0;
      if (row < place.rows) {
        const uint32_t position = static_cast<uint32_t>(place.first_position) + row;
        const uint32_t a_row = kGateUp ? static_cast<uint32_t>(p.slot_of[position]) / top_k : position;
        sources[i] = a_row * (inner / 8);
      }
    }
    const int columns = static_cast<int>(p.columns);
    const int box = weight_row<kProduct>(place.expert, columns, place.first_column, false);
    const int next_box =
        kGateUp ? weight_row<kProduct>(place.expert, columns, place.first_column, true) : box + kBoxRows;

    for (int step = 0; step < steps; ++step) {
      ptx::barrier_wait(empty(shared, ring.stage), ring.parity ^ 1);
      const uint32_t stage = shared + ring.stage * kStageBytes;
      if (thread == 0) {
        const uint32_t barrier = full(shared, ring.stage);
        ptx::barrier_arrive_expect(barrier, kWeightBytes);
        ptx::load_box(stage, weights, step * kInner, box, barrier);
        ptx::load_box(stage + kBoxRows * kInner * 2, weights, step * kInner, next_box, barrier);
      }
      const uint4* a = static_cast<const uint4*>(p.a) + step * kChunks + chunk;
      const int rows = step * kChunks + chunk < inner / 8 ? place.rows - copy_row : 0;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (i * kRowStep >= place.rows) break;
        ptx::copy_async(stage + copy_to + i * kRowStep * kInner * 2, a + sources[i], i * kRowStep < rows);
      }
      ptx::copy_async_commit();
      if (unannounced >= 0) {
        ptx::copy_async_wait<1>();
        announce();
      }
      unannounced = ring.stage;
      ring.advance();
    }
  }
  ptx::copy_async_wait<0>();
  if (unannounced >= 0) announce();
}

// sums[m] = 64 rows of weights by kRows positions, over all of k.
template <typename T, bool kGateUp, int kRows>
__device__ __forceinline__ void multiply(float (&sums)[2][kMaxRows / 2], uint32_t shared, int group, int steps,
                                         Ring& ring) {
  constexpr int kNextBlock = (kGateUp ? kBoxRows : 64) * kInner * 2;  // from the one m64 to the other
  const int first_row = group * (kGateUp ? 64 : kBoxRows);
  const uint64_t a = ptx::wgmma_operand(shared + first_row * kInner * 2);
  const uint64_t b = ptx::wgmma_operand(shared + kWeightBytes);
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    ptx::barrier_wait(full(shared, ring.stage), ring.parity);
    const int offset = ring.stage * (kStageBytes >> 4);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kInner / 16; ++k) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        ptx::wgmma<kRows, T>(sums[m], a + offset + m * (kNextBlock >> 4) + k * 2, b + offset + k * 2, step + k > 0);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (step > 0 && threadIdx.x % kWarpSize == 0) ptx::barrier_arrive(empty(shared, previous));
    previous = ring.stage;
    ring.advance();
  }
  ptx::wgmma_wait<0>();
  if (threadIdx.x % kWarpSize == 0) ptx::barrier_arrive(empty(shared, previous));
}

// What of a tile's energies is this lane's, as that of the lane two on: kept, for a tile has few instructions to spare.
struct EnergyLane {
  const uint4* weights;  // p.energies.fragments, from this lane's on
  int column;            // of the 64 that its consumer stores
  int half;              // which of EnergySums::energy()
  int columns;           // of c, which 32 bits hold with those of all tiles (fits_hopper())
};

__device__ __forceinline__ EnergyLane energy_lane(const GemmParams& p) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x % kGroupThreads / kWarpSize;
  const uint4* weights = p.energies.fragments + lane / 4 % 2 * 4 + lane % 4;
  EnergyLane found{weights, warp * 16 + lane % 2 * 8 + lane / 4, lane % 2, static_cast<int>(p.columns)};
  ptx::keep(found.column), ptx::keep(found.half), ptx::keep(found.columns);
  return found;
}

// Energies of a warp's 16 columns: add() takes h of rows lane / 4 + 8 * half of them at positions 8 i + 2 (lane % 4)
// and the next, in order of i and half.
struct EnergySums {
  const uint4* weights;  // of the tile's first fragment, for this lane
  uint4 of_fragment;
  uint32_t squares[4];
  float sums[4] = {};

  __device__ __forceinline__ EnergySums(const EnergyLane& lane, const Place& place)
      : weights(lane.weights + place.tile * static_cast<unsigned>(energy_fragments(kMaxRows))) {}
  __device__ __forceinline__ void add(int i, int half, float2 h) {
    if (i % 2 == 0 && half == 0) of_fragment = weights[i / 2 * kEnergyFragment];
    squares[half] = ptx::square(h.x);
    squares[half + 2] = ptx::square(h.y);
    if (half == 0) return;
    ptx::multiply_add_tf32(sums, squares, i % 2 == 0 ? of_fragment.x : of_fragment.z,
                           i % 2 == 0 ? of_fragment.y : of_fragment.w);
  }
  // That of row lane / 4 + 8 * half.
  __device__ __forceinline__ float energy(int half) const { return sums[2 * half] + sums[2 * half + 1]; }
};

// That of one column of what is staged of the tile.
template <typename T>
__device__ __forceinline__ float energy_of_staged(const float* weights, int rows, const char* staged, int column) {
  float energy = 0.0f;
  int row = 0;
  do {
    const char* chunk = staged + swizzled<kChunks>(row, column / 8);
    add_energy(weights[row], to_float(reinterpret_cast<const T*>(chunk)[column % 8]), energy);
  } while (++row < rows);  // no tile is empty
  return energy;
}

// Leaves the energies of columns [column, column + 64) of the tile, which store() has staged.
template <typename T>
__device__ __forceinline__ void store_energies(const GemmParams& p, const Place& place, int column, const char* staged,
                                               const EnergyLane& lane, const EnergySums& energies) {
  const int at = column + lane.column;
  if (at >= lane.columns) return;
  float energy = lane.half == 0 ? energies.energy(0) : energies.energy(1);
  if (__builtin_expect(!isfinite(energy), false)) {
    energy = energy_of_staged<T>(p.energies.weights + place.first_position, place.rows, staged, lane.column);
  }
  p.energies.sums[static_cast<unsigned>(place.tile * lane.columns + at)] = energy;
}

// Columns [column, column + 64) of c from pairs of 16-bit results: value(i, half) is row lane / 4 + 8 * half of the
// warp's 16 columns at positions 8 i + 2 (lane % 4) and the next.
template <typename T, typename Value>
__device__ __forceinline__ void store(const GemmParams& p, const Place& place, int column, char* staged, int group,
                                      const Value& value) {
  const int thread = threadIdx.x % kGroupThreads, lane = thread % kWarpSize, warp = thread / kWarpSize;
  ptx::named_barrier(1 + group, kGroupThreads);  // what was staged before has been read
#pragma unroll
  for (int i = 0; i < kMaxRows / 8; i += 2) {
    if (i * 8 >= place.rows) break;
    const uint32_t matrices[4] = {value(i, 0), value(i, 1), value(i + 1, 0), value(i + 1, 1)};
    const int row = (i + lane / 16) * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
    ptx::store_matrices_transposed(ptx::shared_address(staged + swizzled<kChunks>(row, chunk)), matrices);
  }
  ptx::named_barrier(1 + group, kGroupThreads);
  const int chunk = thread % kChunks;
  if (column + chunk * 8 >= p.columns) return;
  T* c = static_cast<T*>(p.c) + place.first_position * p.columns + column + chunk * 8;
  for (int row = thread / kChunks; row < place.rows; row += kGroupThreads / kChunks) {
    *reinterpret_cast<uint4*>(c + row * p.columns) =
        *reinterpret_cast<const uint4*>(staged + swizzled<kChunks>(row, chunk));
  }
}

template <typename T, bool kGateUp, bool kEnergies>
__device__ __forceinline__ void consume(const GemmParams& p, char* memory, int group, unsigned tiles) {
  constexpr int kColumns = kGateUp ? kBoxRows : kWeightRows;
  const uint32_t shared = ptx::shared_address(memory);
  char* staged = memory + kStages * kStageBytes + group * kOutBytes;
  const int steps = (static_cast<int>(p.inner) + kInner - 1) / kInner;
  [[maybe_unused]] EnergyLane lane;
  if constexpr (kEnergies) lane = energy_lane(p);
  Ring ring;
  for (unsigned index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Place place = place_of(p, index, kMaxRows, kColumns);
    if (place.expert < 0) break;
    float sums[2][kMaxRows / 2];  // those of rows beyond the tile's are neither set nor used
    static_assert(kMaxRows == 192);
    switch ((place.rows + 15) / 16) {
#define MOE_EXT_ROWS(n)                                        \
  case n / 16:                                                 \
    multiply<T, kGateUp, n>(sums, shared, group, steps, ring); \
    break;
      MOE_EXT_ROWS(16)
      MOE_EXT_ROWS(32)
      MOE_EXT_ROWS(48)
      MOE_EXT_ROWS(64)
      MOE_EXT_ROWS(80)
      MOE_EXT_ROWS(96)
      MOE_EXT_ROWS(112)
      MOE_EXT_ROWS(128)
      MOE_EXT_ROWS(144)
      MOE_EXT_ROWS(160)
      MOE_EXT_ROWS(176)
      MOE_EXT_ROWS(192)
#undef MOE_EXT_ROWS
    }
    if constexpr (kGateUp) {
      const int column = place.first_column + group * kOutColumns;
      const auto h = [&](int i, int half) {
        return gated(p.activation, sums[0] + 4 * i + 2 * half, sums[1] + 4 * i + 2 * half);
      };
      if constexpr (kEnergies) {
        EnergySums energies(lane, place);
        store<T>(p, place, column, staged, group, [&](int i, int half) {
          const float2 pair = h(i, half);
          energies.add(i, half, pair);
          return pack<T>(pair.x, pair.y);
        });
        store_energies<T>(p, place, column, staged, lane, energies);
      } else {
        store<T>(p, place, column, staged, group, [&](int i, int half) {
          const float2 pair = h(i, half);
          return pack<T>(pair.x, pair.y);
        });
      }
    } else {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int column = place.first_column + group * kBoxRows + m * kOutColumns;
        store<T>(p, place, column, staged, group,
                 [&](int i, int half) { return pack<T>(sums[m][4 * i + 2 * half], sums[m][4 * i + 2 * half + 1]); });
      }
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Compiled for sm_90a only; elsewhere it is empty, and fits_hopper() keeps it from being launched.
template <typename T, Product kProduct, bool kEnergies>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_gemm_kernel([[maybe_unused]] const __grid_constant__ CUtensorMap weights, [[maybe_unused]] GemmParams p,
                       [[maybe_unused]] unsigned tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr bool kGateUp = kProduct == Product::kGateUp;
  extern __shared__ __align__(1024) char memory[];
  const uint32_t shared = ptx::shared_address(memory);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&weights);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(full(shared, stage), 1 + kGroupThreads / kWarpSize);
      ptx::barrier_init(empty(shared, stage), kConsumers * kGroupThreads / kWarpSize);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  // The same in all lanes, which the compiler has to know: wgmma's operands go through uniform registers.
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  if (group == kConsumers) {
    ptx::give_registers<kProducerRegisters>();
    produce<T, kProduct>(p, &weights, shared, tiles);
  } else {
    ptx::take_registers<kConsumerRegisters>();
    consume<T, kGateUp, kEnergies>(p, memory, group, tiles);
  }
#endif
}

// The map over all rows of weights, (rows, inner) of 16-bit elements, in boxes of kBoxRows by kInner.
CUtensorMap weights_map(const void* weights, int64_t rows, int64_t inner, DType dtype) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
        "cudaGetDriverEntryPointByVersion");
  if (found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(
        "moe_ext: this driver lacks cuTensorMapEncodeTiled; install a driver for CUDA 12 or newer");
  }
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(inner), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(inner) * 2};
  const cuuint32_t box[2] = {kInner, kBoxRows};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      &map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(weights), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("moe_ext: cuTensorMapEncodeTiled failed with CUresult " + std::to_string(result));
  }
  return map;
}

template <typename T, Product kProduct, bool kEnergies>
void launch_product(const GemmParams& p, const CUtensorMap& weights, int multiprocessors, cudaStream_t stream) {
  constexpr int kColumns = kProduct == Product::kGateUp ? kBoxRows : kWeightRows;
  const unsigned tiles = grid_size(p.max_tiles * ((p.columns + kColumns - 1) / kColumns));
  allow_shared(hopper_gemm_kernel<T, kProduct, kEnergies>, kSharedBytes);
  const unsigned blocks = std::min(tiles, static_cast<unsigned>(multiprocessors));
  launch_next<hopper_gemm_kernel<T, kProduct, kEnergies>>("hopper_gemm_kernel", blocks, kThreads, kSharedBytes, stream,
                                                          weights, p, tiles);
}

}  // namespace

void launch_hopper_gemm(Product product, const GemmParams& p, DType dtype, int multiprocessors, cudaStream_t stream) {
  const CUtensorMap weights = weights_map(p.b, p.num_experts * weight_rows(product, p.columns), p.inner, dtype);
  for_16_bit_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (product == Product::kDown) {
      launch_product<T, Product::kDown, false>(p, weights, multiprocessors, stream);
    } else if (p.energies.sums == nullptr) {
      launch_product<T, Product::kGateUp, false>(p, weights, multiprocessors, stream);
    } else {
      launch_product<T, Product::kGateUp, true>(p, weights, multiprocessors, stream);
    }
  });
}

}  // namespace moe_ext::cuda
