// Sort: the (token, slot) pairs that have an expert, by expert, in slot order within an expert; and the list of row
// tiles that the grouped products run over. A counting sort in three steps:
//   count   a block counts the experts of its share of the slots                                  (blocks, E)
//   scan    one block: where each expert, and each block within it, begins; the tiles
//   place   a block gives its slots their positions
// Few slots (at most kOneBlockSlots) take one launch of one block that does all three.
//
// Within a block every warp has neighbouring slots and a row of a table in shared memory, (warps, E): first its counts,
// then where its next slot of an expert goes. Lanes with the same expert find each other by match.any, so that there
// are no atomics and slot order is kept: the result is deterministic. As many warps are used as there is room for rows.
//
// Cost: reads P expert indices twice, writes 2 P ints, E ints a block and 16 bytes a tile. Bound by latency.
#include <algorithm>

#include "cuda/device/next_kernel.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/ptx_sm80.cuh"
#include "cuda/launch.h"
#include "cuda/params.h"

namespace moe_ext::cuda {
namespace {

constexpr int kSlotsPerBlock = 1024;
constexpr int kOneBlockSlots = 4096;
constexpr int kMaxWarps = 32;
constexpr int kTableBytes = 48 * 1024;
constexpr int kAtOnce = 8;  // block counts that a thread reads before it writes the first

struct Range {
  int64_t begin, end;
};

// The slots of this warp: whole rounds of 32, but for the last warp's.
__device__ Range slots_of_warp(Range block) {
  const int64_t warps = blockDim.x / kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t length = (block.end - block.begin + warps * kWarpSize - 1) / (warps * kWarpSize) * kWarpSize;
  return {min(block.end, block.begin + warp * length), min(block.end, block.begin + (warp + 1) * length)};
}

// Calls body(slot, expert, same, rank, is_last) for every slot of the warp, 32 at a time; expert E for sentinels. Of
// the lanes that have this expert, `same`, `rank` come before this one, and is_last says that none comes after.
template <typename Body>
__device__ __forceinline__ void for_each_slot(const SortParams& p, Range range, const Body& body) {
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t base = range.begin; base < range.end; base += kWarpSize) {
    const int64_t slot = base + lane;
    const bool present = slot < range.end;
    const int expert = present ? expert_of(p.experts, p.experts_are_int64, slot, p.num_experts) : -1;
    const uint32_t same = __match_any_sync(kAllLanes, expert);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (present) body(slot, expert, same, rank, (same >> lane) == 1u);
    __syncwarp();
  }
}

// table[w, e] = slots of expert e that warp w has. All threads call; complete after a __syncthreads().
__device__ void count_slots(const SortParams& p, Range block, int* table) {
  const int64_t size = blockDim.x / kWarpSize * p.num_experts;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) table[i] = 0;
  __syncthreads();
  int* counts = table + threadIdx.x / kWarpSize * p.num_experts;
  for_each_slot(p, slots_of_warp(block), [&](int64_t, int expert, uint32_t, int rank, bool is_last) {
    if (is_last && expert < p.num_experts) counts[expert] += rank + 1;
  });
}

// Replaces the counts of one expert by where each warp's slots begin, from `first` on; returns where the last ends.
__device__ int begin_warps(const SortParams& p, int64_t expert, int first, int* table) {
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) {
    const int count = table[warp * p.num_experts + expert];
    table[warp * p.num_experts + expert] = first;
    first += count;
  }
  return first;
}

// Positions of the block's slots. table[w, e]: that of the first slot of expert e that warp w has.
__device__ void place_slots(const SortParams& p, Range block, int* table) {
  int* next = table + threadIdx.x / kWarpSize * p.num_experts;
  for_each_slot(p, slots_of_warp(block), [&](int64_t slot, int expert, uint32_t same, int rank, bool is_last) {
    if (expert == p.num_experts) {
      p.position_of[slot] = -1;
      return;
    }
    const int position = next[expert] + rank;
    __syncwarp(same);  // all lanes of the expert have read
    if (is_last) next[expert] = position + 1;
    p.slot_of[position] = static_cast<int>(slot);
    p.position_of[slot] = position;
  });
}

// Exclusive sum over the block's threads, and the total in `total`. All threads call.
__device__ int block_exclusive_sum(int value, int* total) {
  __shared__ int warp_totals[kMaxWarps];
  const int lane = threadIdx.x % kWarpSize;
  const int inclusive = warp_inclusive_sum(value);
  __syncthreads();  // the totals of an earlier call have been read
  if (lane == kWarpSize - 1) warp_totals[threadIdx.x / kWarpSize] = inclusive;
  __syncthreads();
  int before = 0, all = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarpSize; ++warp) {
    if (warp == static_cast<int>(threadIdx.x) / kWarpSize) before = all;
    all += warp_totals[warp];
  }
  *total = all;
  return before + inclusive - value;
}

// first[e] and every expert's tiles from counts[e], which may be in shared memory. All threads call.
__device__ void scan_experts(const SortParams& p, const int* counts) {
  int positions = 0, gate_up_tiles = 0, down_tiles = 0;
  for (int64_t base = 0; base < p.num_experts; base += blockDim.x) {
    const int64_t expert = base + threadIdx.x;
    const int count = expert < p.num_experts ? counts[expert] : 0;
    int total;
    const int first = positions + block_exclusive_sum(count, &total);
    positions += total;
    if (expert < p.num_experts) p.first[expert] = first;
    const auto list = [&](const TileList& tiles, int* found) {
      const int of_expert = static_cast<int>((count + tiles.rows - 1) / tiles.rows);
      const int first_tile = *found + block_exclusive_sum(of_expert, &total);
      *found += total;
      for (int i = 0; i < of_expert; ++i) {
        tiles.tiles[first_tile + i] = {static_cast<int>(expert), first_tile, first, count};
      }
    };
    list(p.gate_up, &gate_up_tiles);
    list(p.down, &down_tiles);
  }
  if (threadIdx.x == 0) p.first[p.num_experts] = positions;
  const auto end_list = [&](const TileList& tiles, int found) {
    for (int64_t i = found + threadIdx.x; i < tiles.max_tiles; i += blockDim.x) tiles.tiles[i] = {-1, 0, 0, 0};
  };
  end_list(p.gate_up, gate_up_tiles);
  end_list(p.down, down_tiles);
}

__device__ Range slots_of_block(const SortParams& p) {
  const int64_t begin = int64_t{blockIdx.x} * kSlotsPerBlock;
  return {begin, min(p.slots, begin + kSlotsPerBlock)};
}

__global__ void __launch_bounds__(kMaxWarps* kWarpSize) sort_in_one_block_kernel(SortParams p) {
  ptx::let_next_kernel_start();
  extern __shared__ int table[];  // (warps, E)
  const Range all{0, p.slots};
  count_slots(p, all, table);
  __syncthreads();
  for (int64_t e = threadIdx.x; e < p.num_experts; e += blockDim.x) {
    p.block_counts[e] = begin_warps(p, e, 0, table);
  }
  __syncthreads();
  scan_experts(p, p.block_counts);
  __syncthreads();
  for (int64_t i = threadIdx.x; i < blockDim.x / kWarpSize * p.num_experts; i += blockDim.x) {
    table[i] += p.first[i % p.num_experts];
  }
  __syncthreads();
  place_slots(p, all, table);
}

__global__ void __launch_bounds__(kMaxWarps* kWarpSize) count_kernel(SortParams p) {
  ptx::let_next_kernel_start();
  extern __shared__ int table[];  // (warps, E)
  count_slots(p, slots_of_block(p), table);
  __syncthreads();
  int* counts = p.block_counts + blockIdx.x * p.num_experts;
  for (int64_t e = threadIdx.x; e < p.num_experts; e += blockDim.x) counts[e] = begin_warps(p, e, 0, table);
}

__global__ void __launch_bounds__(kMaxWarps* kWarpSize) scan_kernel(SortParams p, int64_t blocks) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  extern __shared__ int counts[];  // (E)
  for (int64_t e = threadIdx.x; e < p.num_experts; e += blockDim.x) {
    int before = 0;  // slots of this expert in earlier blocks
    for (int64_t block = 0; block < blocks; block += kAtOnce) {
      int* first = p.block_counts + block * p.num_experts + e;
      int of_block[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) of_block[i] = block + i < blocks ? first[i * p.num_experts] : 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (block + i < blocks) first[i * p.num_experts] = before;
        before += of_block[i];
      }
    }
    counts[e] = before;
  }
  __syncthreads();
  scan_experts(p, counts);
}

__global__ void __launch_bounds__(kMaxWarps* kWarpSize) place_kernel(SortParams p) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  extern __shared__ int table[];  // (warps, E)
  count_slots(p, slots_of_block(p), table);
  __syncthreads();
  const int* before = p.block_counts + blockIdx.x * p.num_experts;
  for (int64_t e = threadIdx.x; e < p.num_experts; e += blockDim.x) begin_warps(p, e, p.first[e] + before[e], table);
  __syncthreads();
  place_slots(p, slots_of_block(p), table);
}

}  // namespace

int64_t sort_blocks(int64_t slots) { return (slots + kSlotsPerBlock - 1) / kSlotsPerBlock; }

int64_t max_tiles(int64_t slots, int64_t num_experts, int64_t rows) {
  return slots / rows + std::min(slots, num_experts);
}

void launch_sort(const SortParams& p, cudaStream_t stream) {
  const int row_bytes = static_cast<int>(p.num_experts * sizeof(int));
  const int warps = std::max(1, std::min(kMaxWarps, kTableBytes / row_bytes));
  const int threads = warps * kWarpSize, bytes = warps * row_bytes;
  if (p.slots <= kOneBlockSlots) {
    sort_in_one_block_kernel<<<1, threads, bytes, stream>>>(p);
    return check_launch("sort_in_one_block_kernel");
  }
  const int64_t blocks = sort_blocks(p.slots);
  count_kernel<<<grid_size(blocks), threads, bytes, stream>>>(p);
  check_launch("count_kernel");
  launch_next<scan_kernel>("scan_kernel", 1, kMaxWarps * kWarpSize, row_bytes, stream, p, blocks);
  launch_next<place_kernel>("place_kernel", grid_size(blocks), threads, bytes, stream, p);
}

}  // namespace moe_ext::cuda
