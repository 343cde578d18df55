// Grouped products for large batches on sm_90a (H100, H200), bf16 and fp16, float32 accumulation:
//   gate_up   h[p, :] = act(gate[e] x) * (up[e] x),  x = x[token of p, :]          (positions, I)
//   down      y[p, :] = down[e] h[p, :]                                            (positions, H)
//
// The products are computed transposed: weights are wgmma's first operand, whose rows come in 64s, and positions its
// second, whose rows come in 16s here, because experts have any number of positions and weights do not. A block's tile
// is 256 rows of weights (in gate_up 128 of gate and the 128 of up for the same columns of c) by up to 192 positions of
// one expert. One block a multiprocessor takes every gridDim.x-th tile of the sort's list, numbered as in tiles.cuh;
// or, for experts of many positions, the list's tiles have up to 384, and the two blocks of a cluster take one
// together, each half of its positions and the same rows of weights:
//   producer    one warpgroup: weights by TMA, one map over all experts' (E * rows, k), of two blocks each one half, by
//               multicast into both; activations gathered row by row with 16-byte cp.async into the same swizzled
//               layout, zeros beyond the tile's rows and beyond k
//   consumers   two warpgroups, each 128 of the tile's rows of weights in two wgmmas m64: in gate_up one is gate and
//               the other up, so that a thread has both of the same element in its accumulators
// They meet at two mbarriers for each of kStages steps of 64 elements of k: `full` (filled) and `empty` (multiplied).
// Results are turned by stmatrix on their way through shared memory and leave in rows of 128 bytes. Where energies of
// channels are observed, the tensor cores of mma.sync weight and add up the squares of a warp's 16 columns, of operands
// that accumulators and energies.cu's table are as they stand. A position that is not counted has weight 0; where
// the sum is no number, which such a position alone may cause, a thread adds up once more, from what is staged.
//
// In instances of their own, which observe no energies (launch_energy_rows()), and which no GPU has run yet:
//   special      biases and limits, applied to copies of the accumulators: what is done to them in place makes ptxas
//                wait for every wgmma
//   transposed   weights (E, k, columns), with or without biases and limits: TMA brings boxes of 64 columns, zeros
//                beyond k, which wgmma takes as columns of its first operand. Of interleaved ones neighbouring rows of
//                accumulators are gate and up: of two lanes that have such rows for two columns of c, each sends the
//                other what it lacks for one of them
//
// Memory order: TMA counts its bytes on `full`, those of a multicast on that of each block. A producer's cp.async are
// its own writes: it waits for those of the step before, fences them towards wgmma's proxy and only then arrives, so
// that one step is always under way. Weights of other experts that a box covers beyond an expert's last row give
// columns that are not stored. Where two blocks share weights, consumers arrive at `empty` of both, so that neither
// writes into a stage that the other still reads; both go through the same tiles and steps, a block without rows too,
// and meet before the first access to the other's shared memory and after the last.
//
// Every element is a sum in order of k by one warpgroup: deterministic. Cost of a tile: 2 * 256 * rows * k FLOPs, with
// rows rounded up to a multiple of 16; reads (256 + rows) * k elements, at 192 rows 110 FLOPs a byte and at 128 rows
// 85; of two blocks each (128 + rows) * k, 154 and 128.
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
constexpr int kBoxBytes = kBoxRows * kInner * 2;
constexpr int kStages = 3;
constexpr int kWeightBytes = 2 * kBoxBytes;
constexpr int kStageBytes = kWeightBytes + kMaxRows * kInner * 2;
constexpr int kOutColumns = 64;  // of c that a consumer passes through shared memory at once: 128 bytes a row
constexpr int kOutBytes = kMaxRows * kOutColumns * 2;
constexpr int kBarriers = kStages * kStageBytes + kConsumers * kOutBytes;  // offset; before them the stages, then c
constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
static_assert(kSharedBytes <= 227 * 1024 && kStageBytes % 1024 == 0 && kWeightRows == 2 * kBoxRows);

// What an instance is compiled for: gate and up as the products leave them, and no biases; biases or limits; transposed
// weights, with or without those.
enum class Experts { kUsual, kSpecial, kTransposed };

// Of transposed weights a TMA brings 64 columns of kInner rows, and a tile has four of those. That of slot s is wgmma
// s / 2 of consumer s % 2, as rows of weights in order are in gate_up.
constexpr int kSlotColumns = 64;

// 65536 registers: 2 * 128 * 232 + 128 * 40.
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kSlots = kWeightRows / kSlotColumns, kSlotBytes = kSlotColumns * kInner * 2;

// The ring of steps, as one role goes through it.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Of the blocks that share a tile: the rank in their cluster.
template <int kBlocks>
__device__ __forceinline__ int rank_of_block() {
  return static_cast<int>(blockIdx.x % kBlocks);
}

// What this block has of a tile of the sort's list: all of it or, where two blocks share it, its half of the rows, cut
// at a multiple of 16, so that the second block may have none.
struct BlockPlace : Place {  // `tile`: of all tiles' parts
  int fragment;              // of p.energies.fragments, in 16 rows
};

template <int kBlocks>
__device__ __forceinline__ BlockPlace place_of_block(const GemmParams& p, unsigned index, int columns) {
  BlockPlace place{place_of(p, index, kBlocks * kMaxRows, columns), 0};
  place.fragment = place.tile * (kBlocks * kMaxRows / kFragment);
  if constexpr (kBlocks > 1) {
    const int rank = rank_of_block<kBlocks>();
    const int height = (place.rows + kBlocks * kFragment - 1) / (kBlocks * kFragment) * kFragment;
    const int first = rank * height;
    place.rows = max(0, min(height, place.rows - first));
    place.first_position += first;
    place.fragment += first / kFragment;
    place.tile = place.tile * kBlocks + rank;
  }
  return place;
}

__device__ __forceinline__ uint32_t full(uint32_t shared, int stage) { return shared + kBarriers + stage * 8; }
__device__ __forceinline__ uint32_t empty(uint32_t shared, int stage) { return full(shared, kStages + stage); }

// Tells all blocks that bring weights into it that this warp is done with a stage. The whole warp calls.
template <int kBlocks>
__device__ __forceinline__ void give_back(uint32_t shared, int stage) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (kBlocks == 1) {
    if (lane == 0) ptx::barrier_arrive(empty(shared, stage));
  } else {
    if (lane < kBlocks) ptx::barrier_arrive_in_cluster(ptx::address_in_block(empty(shared, stage), lane));
  }
}

// Where the columns of a tile's slots begin: first + (s % 2) * odd + (s / 2) * next.
struct Slots {
  int first, odd, next;
};

template <Product kProduct>
__device__ __forceinline__ Slots slots_of(const GemmParams& p, int first_column) {
  if (kProduct == Product::kDown) return {first_column, 2 * kSlotColumns, kSlotColumns};
  if (p.interleaved) return {2 * first_column, 2 * kSlotColumns, kSlotColumns};
  return {first_column, kSlotColumns, static_cast<int>(p.columns)};
}

// This block's part of a step of transposed weights, from row `row` of the expert's matrix.
template <int kBlocks>
__device__ __forceinline__ void load_slots(uint32_t stage, const CUtensorMap* weights, const Slots& slots, int row,
                                           int expert, uint32_t barrier) {
#pragma unroll
  for (int i = 0; i < kSlots / kBlocks; ++i) {
    if constexpr (kBlocks == 1) {
      ptx::load_box(stage + i * kSlotBytes, weights, slots.first + i % 2 * slots.odd + i / 2 * slots.next, row, expert,
                    barrier);
    } else {
      static_assert(kSlots / kBlocks == 2);
      const int rank = rank_of_block<kBlocks>();
      ptx::load_box_into_blocks(stage + (2 * rank + i) * kSlotBytes, weights,
                                slots.first + i * slots.odd + rank * slots.next, row, expert, barrier,
                                (1 << kBlocks) - 1);
    }
  }
}

template <typename T, Product kProduct, int kBlocks, bool kTransposed>
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

  for (unsigned index = blockIdx.x / kBlocks; index < tiles; index += gridDim.x / kBlocks) {
    const BlockPlace place = place_of_block<kBlocks>(p, index, kColumns);
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
    [[maybe_unused]] Slots slots;
    if constexpr (kTransposed) slots = slots_of<kProduct>(p, place.first_column);
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
        if constexpr (kTransposed) {
          load_slots<kBlocks>(stage, weights, slots, step * kInner, place.expert, barrier);
        } else if constexpr (kBlocks == 1) {
          ptx::load_box(stage, weights, step * kInner, box, barrier);
          ptx::load_box(stage + kBoxBytes, weights, step * kInner, next_box, barrier);
        } else {
          const int rank = rank_of_block<kBlocks>();
          ptx::load_box_into_blocks(stage + rank * kBoxBytes, weights, step * kInner, rank == 0 ? box : next_box,
                                    barrier, (1 << kBlocks) - 1);
        }
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
template <typename T, bool kGateUp, int kBlocks, bool kTransposed, int kRows>
__device__ __forceinline__ void multiply(float (&sums)[2][kMaxRows / 2], uint32_t shared, int group, int steps,
                                         Ring& ring) {
  constexpr bool kBlocksApart = kGateUp || kTransposed;
  constexpr int kNextBlock = (kBlocksApart ? kBoxRows : 64) * kInner * 2;  // from the one m64 to the other
  constexpr int kNextK = kTransposed ? 128 : 2;                            // wgmma_operand()
  const int first_row = group * (kBlocksApart ? 64 : kBoxRows);
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
        ptx::wgmma<kRows, T, kTransposed>(sums[m], a + offset + m * (kNextBlock >> 4) + k * kNextK, b + offset + k * 2,
                                          step + k > 0);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (step > 0) give_back<kBlocks>(shared, previous);
    previous = ring.stage;
    ring.advance();
  }
  ptx::wgmma_wait<0>();
  give_back<kBlocks>(shared, previous);
}

// The steps of a tile of which this block has no rows: it brings its part of the weights for the other.
template <int kBlocks>
__device__ __forceinline__ void pass_over(uint32_t shared, int steps, Ring& ring) {
  for (int step = 0; step < steps; ++step) {
    ptx::barrier_wait(full(shared, ring.stage), ring.parity);
    __syncwarp();  // no lane may wait for a phase that the next but one has followed
    give_back<kBlocks>(shared, ring.stage);
    ring.advance();
  }
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
  const uint4* weights;  // of its first fragment, for this lane
  uint4 of_fragment;
  uint32_t squares[4];
  float sums[4] = {};

  __device__ __forceinline__ EnergySums(const EnergyLane& lane, const BlockPlace& place)
      : weights(lane.weights + place.fragment * static_cast<unsigned>(kEnergyFragment)) {}
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
  } while (++row < rows);  // there is one
  return energy;
}

// Leaves this lane's of the energies of columns [column, column + 64) of the tile.
__device__ __forceinline__ void leave_energy(const GemmParams& p, const Place& place, int column,
                                             const EnergyLane& lane, float energy) {
  const int at = column + lane.column;
  if (at < lane.columns) p.energies.sums[static_cast<unsigned>(place.tile) * lane.columns + at] = energy;
}

// The same of what store() has staged.
template <typename T>
__device__ __forceinline__ void store_energies(const GemmParams& p, const Place& place, int column, const char* staged,
                                               const EnergyLane& lane, const EnergySums& energies) {
  if (column + lane.column >= lane.columns) return;
  float energy = lane.half == 0 ? energies.energy(0) : energies.energy(1);
  if (__builtin_expect(!isfinite(energy), false)) {
    energy = energy_of_staged<T>(p.energies.weights + place.first_position, place.rows, staged, lane.column);
  }
  leave_energy(p, place, column, lane, energy);
}

// Which 8 of a consumer's 64 columns a warp has as value(i, half) of store().
__device__ __forceinline__ int chunk_of(int warp, int half, bool interleaved) {
  return interleaved ? warp + 4 * half : 2 * warp + half;
}

// Columns [column, column + 64) of c from pairs of 16-bit results: value(i, half) is row lane / 4 + 8 * half of the
// warp's 16 columns (chunk_of()) at positions 8 i + 2 (lane % 4) and the next.
template <typename T, typename Value>
__device__ __forceinline__ void store(const GemmParams& p, const Place& place, int column, char* staged, int group,
                                      const Value& value, bool interleaved = false) {
  const int thread = threadIdx.x % kGroupThreads, lane = thread % kWarpSize, warp = thread / kWarpSize;
  ptx::named_barrier(1 + group, kGroupThreads);  // what was staged before has been read
#pragma unroll
  for (int i = 0; i < kMaxRows / 8; i += 2) {
    if (i * 8 >= place.rows) break;
    const uint32_t matrices[4] = {value(i, 0), value(i, 1), value(i + 1, 0), value(i + 1, 1)};
    const int row = (i + lane / 16) * 8 + lane % 8, chunk = chunk_of(warp, lane / 8 % 2, interleaved);
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

// From accumulators of interleaved weights: rows lane / 4 and lane / 4 + 8 of a warp's 16 (`first`, `second`), even
// ones gate, odd ones up. Of the 8 columns that they give, this lane gets gate and up of column_of_pair().
__device__ __forceinline__ void exchange_pair(float first, float second, float& gate, float& up) {
  const bool odd = threadIdx.x / 4 % 2 == 1;
  const float received = __shfl_xor_sync(kAllLanes, odd ? first : second, 4);
  gate = odd ? received : first;
  up = odd ? second : received;
}

__device__ __forceinline__ int column_of_pair() {
  const int lane = threadIdx.x % kWarpSize;
  return lane / 8 + lane / 4 % 2 * 4;
}

// What the lane with lane / 4 = n has for column_of_pair(), to that with lane / 4 = column.
__device__ __forceinline__ uint32_t sort_pairs(uint32_t value) {
  const int lane = threadIdx.x % kWarpSize, column = lane / 4;
  return __shfl_sync(kAllLanes, value, (column % 4 * 2 + column / 4) * 4 + lane % 4);
}

// c of a tile of experts with biases or a shaping, or of transposed weights.
template <typename T, Product kProduct, Experts kExperts>
__device__ __forceinline__ void store_special(const GemmParams& p, const Place& place,
                                              const float (&sums)[2][kMaxRows / 2], char* staged, int group) {
  constexpr bool kGateUp = kProduct == Product::kGateUp;
  const int warp = threadIdx.x % kGroupThreads / kWarpSize;
  const bool interleaved = kExperts == Experts::kTransposed && kGateUp && p.interleaved;
  const int own_column = interleaved ? column_of_pair() : static_cast<int>(threadIdx.x) % kWarpSize / 4;  // of a chunk
  const auto biases_of = [&](int column, bool up, float (&biases)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int columns = static_cast<int>(p.columns);
      const int at = min(column + chunk_of(warp, half, interleaved) * 8 + own_column, columns - 1);
      biases[half] = bias_at<T>(p.bias, weight_row<kProduct, int>(place.expert, columns, at, up, interleaved));
    }
  };
  if constexpr (kGateUp) {
    const int column = place.first_column + group * kOutColumns;
    float gate_biases[2], up_biases[2];
    biases_of(column, false, gate_biases), biases_of(column, true, up_biases);
    const auto h = [&](int i, int half) {
      float gate[2], up[2];
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        if (interleaved) {
          exchange_pair(sums[half][4 * i + next], sums[half][4 * i + 2 + next], gate[next], up[next]);
        } else {
          gate[next] = sums[0][4 * i + 2 * half + next], up[next] = sums[1][4 * i + 2 * half + next];
        }
      }
      if (kExperts == Experts::kSpecial || p.special) {
        Shaping shaping = p.shaping;
        shaping.capped = false;
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          gate[next] += gate_biases[half], up[next] += up_biases[half];
          shape(shaping, gate[next], up[next]);
        }
      }
      const float2 pair = gated(p.activation, gate, up);
      const uint32_t packed = pack<T>(pair.x, pair.y);
      return interleaved ? sort_pairs(packed) : packed;
    };
    store<T>(p, place, column, staged, group, h, interleaved);
  } else {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int column = place.first_column + (group * 2 + m) * kOutColumns;
      float biases[2];
      biases_of(column, false, biases);
      store<T>(p, place, column, staged, group, [&](int i, int half) {
        const float* y = sums[m] + 4 * i + 2 * half;
        return pack<T>(y[0] + biases[half], y[1] + biases[half]);
      });
    }
  }
}

template <typename T, Product kProduct, bool kEnergies, int kBlocks, Experts kExperts>
__device__ __forceinline__ void consume(const GemmParams& p, char* memory, int group, unsigned tiles) {
  constexpr bool kGateUp = kProduct == Product::kGateUp;
  constexpr bool kTransposed = kExperts == Experts::kTransposed;
  constexpr int kColumns = kGateUp ? kBoxRows : kWeightRows;
  const uint32_t shared = ptx::shared_address(memory);
  char* staged = memory + kStages * kStageBytes + group * kOutBytes;
  const int steps = (static_cast<int>(p.inner) + kInner - 1) / kInner;
  [[maybe_unused]] EnergyLane lane;
  if constexpr (kEnergies) lane = energy_lane(p);
  Ring ring;
  for (unsigned index = blockIdx.x / kBlocks; index < tiles; index += gridDim.x / kBlocks) {
    const BlockPlace place = place_of_block<kBlocks>(p, index, kColumns);
    if (place.expert < 0) break;
    if (kBlocks > 1 && place.rows == 0) {
      pass_over<kBlocks>(shared, steps, ring);
      if constexpr (kEnergies) leave_energy(p, place, place.first_column + group * kOutColumns, lane, 0.0f);
      continue;
    }
    float sums[2][kMaxRows / 2];  // those of rows beyond the tile's are neither set nor used
    static_assert(kMaxRows == 192);
    switch ((place.rows + 15) / 16) {
#define MOE_EXT_ROWS(n)                                                              \
  case n / 16:                                                                       \
    multiply<T, kGateUp, kBlocks, kTransposed, n>(sums, shared, group, steps, ring); \
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
    if constexpr (kExperts != Experts::kUsual) {
      static_assert(!kEnergies);
      store_special<T, kProduct, kExperts>(p, place, sums, staged, group);
    } else if constexpr (kGateUp) {
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
template <typename T, Product kProduct, bool kEnergies, int kBlocks, Experts kExperts>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_gemm_kernel([[maybe_unused]] const __grid_constant__ CUtensorMap weights, [[maybe_unused]] GemmParams p,
                       [[maybe_unused]] unsigned tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char memory[];
  const uint32_t shared = ptx::shared_address(memory);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&weights);
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(full(shared, stage), 1 + kGroupThreads / kWarpSize);
      ptx::barrier_init(empty(shared, stage), kBlocks * kConsumers * kGroupThreads / kWarpSize);
    }
    ptx::barrier_init_fence();
  }
  kBlocks == 1 ? __syncthreads() : ptx::cluster_barrier();
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  // The same in all lanes, which the compiler has to know: wgmma's operands go through uniform registers.
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  if (group == kConsumers) {
    ptx::give_registers<kProducerRegisters>();
    produce<T, kProduct, kBlocks, kExperts == Experts::kTransposed>(p, &weights, shared, tiles);
  } else {
    ptx::take_registers<kConsumerRegisters>();
    consume<T, kProduct, kEnergies, kBlocks, kExperts>(p, memory, group, tiles);
  }
  if constexpr (kBlocks > 1) ptx::cluster_barrier();  // until then the other block may arrive at barriers here
#endif
}

// The map over all experts' weights, of 16-bit elements: over their rows, (E * rows, inner) in boxes of kBoxRows by
// kInner, or where they are transposed over (E, inner, rows) in boxes of kInner by kSlotColumns.
CUtensorMap weights_map(Product product, const GemmParams& p, DType dtype) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
        "cudaGetDriverEntryPointByVersion");
  if (found != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(
        "moe_ext: this driver lacks cuTensorMapEncodeTiled; install a driver for CUDA 12 or newer");
  }
  CUtensorMap map;
  const cuuint64_t experts = p.num_experts, rows = weight_rows(product, p.columns), inner = p.inner;
  const cuuint32_t dimensions = p.transposed ? 3 : 2;
  const cuuint64_t sizes[3] = {p.transposed ? rows : inner, p.transposed ? inner : experts * rows, experts};
  const cuuint64_t strides[2] = {sizes[0] * 2, sizes[0] * sizes[1] * 2};  // in bytes, of all but the first
  cuuint32_t box[3] = {kInner, kBoxRows, 1};
  if (p.transposed) box[0] = kSlotColumns, box[1] = kInner;
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      &map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, dimensions,
      const_cast<void*>(p.b), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("moe_ext: cuTensorMapEncodeTiled failed with CUresult " + std::to_string(result));
  }
  return map;
}

template <typename T, Product kProduct, bool kEnergies, int kBlocks, Experts kExperts>
void launch_instance(const GemmParams& p, const CUtensorMap& weights, int multiprocessors, cudaStream_t stream) {
  constexpr int kColumns = kProduct == Product::kGateUp ? kBoxRows : kWeightRows;
  const unsigned tiles = grid_size(p.max_tiles * ((p.columns + kColumns - 1) / kColumns));
  allow_shared(hopper_gemm_kernel<T, kProduct, kEnergies, kBlocks, kExperts>, kSharedBytes);
  const unsigned at_once = std::max(1u, static_cast<unsigned>(multiprocessors) / kBlocks);
  launch_next<hopper_gemm_kernel<T, kProduct, kEnergies, kBlocks, kExperts>, kBlocks>(
      "hopper_gemm_kernel", kBlocks * std::min(tiles, at_once), kThreads, kSharedBytes, stream, weights, p, tiles);
}

template <typename T, Product kProduct, int kBlocks>
void launch_product(const GemmParams& p, const CUtensorMap& weights, int multiprocessors, cudaStream_t stream) {
  if (p.transposed) {
    launch_instance<T, kProduct, false, kBlocks, Experts::kTransposed>(p, weights, multiprocessors, stream);
  } else if (p.special) {
    launch_instance<T, kProduct, false, kBlocks, Experts::kSpecial>(p, weights, multiprocessors, stream);
  } else if (p.energies.sums == nullptr) {
    launch_instance<T, kProduct, false, kBlocks, Experts::kUsual>(p, weights, multiprocessors, stream);
  } else if constexpr (kProduct == Product::kGateUp) {
    launch_instance<T, kProduct, true, kBlocks, Experts::kUsual>(p, weights, multiprocessors, stream);
  }
}

template <int kBlocks>
void launch_shared_by(Product product, const GemmParams& p, DType dtype, const CUtensorMap& weights,
                      int multiprocessors, cudaStream_t stream) {
  for_16_bit_dtype(dtype, [&](auto type) {
    for_product(product, [&](auto which) {
      launch_product<decltype(type), which.value, kBlocks>(p, weights, multiprocessors, stream);
    });
  });
}

}  // namespace

void launch_hopper_gemm(Product product, int shape, const GemmParams& p, DType dtype, int multiprocessors,
                        cudaStream_t stream) {
  const CUtensorMap weights = weights_map(product, p, dtype);
  if (hopper_blocks(shape) == 1) {
    launch_shared_by<1>(product, p, dtype, weights, multiprocessors, stream);
  } else {
    launch_shared_by<2>(product, p, dtype, weights, multiprocessors, stream);
  }
}

}  // namespace moe_ext::cuda
