// The active experts of a small batch, those that have a slot, and the slots of one of them: a block finds both itself,
// from the P expert indices, in lists in shared memory. Both lists are ascending: by warp scan and by ballot, so that
// the atomics, which set bits, leave no trace of their order. All threads of a block of kThreads call.
#pragma once

#include <cstdint>

#include "cuda/device/numeric.cuh"
#include "moe.h"

namespace moe_ext::cuda {

struct Lists {
  int* expert_of_slot;  // (P), E for sentinels
  int* active;          // (min(E, P)) experts that have a slot, ascending
  int* slots;           // (P) of the expert under way, ascending
  uint32_t* mask;       // (E / 32) bit e: expert e is active
};

constexpr int64_t mask_words(int64_t num_experts) { return (num_experts + 31) / 32; }

constexpr int64_t lists_bytes(int64_t slots, int64_t num_experts) {
  const int64_t active = slots < num_experts ? slots : num_experts;
  return (4 * (2 * slots + active + mask_words(num_experts)) + 15) / 16 * 16;
}

__device__ __forceinline__ Lists lists_at(char* shared, int64_t slots, int64_t num_experts) {
  Lists lists;
  lists.expert_of_slot = reinterpret_cast<int*>(shared);
  lists.slots = lists.expert_of_slot + slots;
  lists.active = lists.slots + slots;
  lists.mask = reinterpret_cast<uint32_t*>(lists.active + min(slots, num_experts));
  return lists;
}

// Fills expert_of_slot and active; returns the number of active experts.
template <int kThreads>
__device__ int find_active(const ExpertsParams& p, int slots, const Lists& lists) {
  __shared__ int found;
  const int words = static_cast<int>(mask_words(p.num_experts));
  for (int i = threadIdx.x; i < words; i += kThreads) lists.mask[i] = 0;
  __syncthreads();
  for (int slot = threadIdx.x; slot < slots; slot += kThreads) {
    const int expert = expert_of(p.experts, p.experts_are_int64, slot, p.num_experts);
    lists.expert_of_slot[slot] = expert;
    if (expert < p.num_experts) atomicOr(&lists.mask[expert / 32], 1u << expert % 32);
  }
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    int total = 0;
    for (int base = 0; base < words; base += kWarpSize) {
      const int word = base + threadIdx.x;
      uint32_t bits = word < words ? lists.mask[word] : 0;
      const int upto = warp_inclusive_sum(__popc(bits));
      int at = total + upto - __popc(bits);
      for (; bits != 0; bits &= bits - 1) lists.active[at++] = word * 32 + __ffs(bits) - 1;
      total += __shfl_sync(kAllLanes, upto, kWarpSize - 1);
    }
    if (threadIdx.x == 0) found = total;
  }
  __syncthreads();
  return found;
}

// Fills slots with those of `expert`; returns how many.
template <int kThreads>
__device__ int find_slots(int expert, int slots, const Lists& lists) {
  __shared__ int found;
  __syncthreads();  // the lists of the expert before are not read any more
  if (threadIdx.x < kWarpSize) {
    int total = 0;
    for (int base = 0; base < slots; base += kWarpSize) {
      const int slot = base + threadIdx.x;
      const bool here = slot < slots && lists.expert_of_slot[slot] == expert;
      const uint32_t lanes = __ballot_sync(kAllLanes, here);
      if (here) lists.slots[total + __popc(lanes & ((1u << threadIdx.x) - 1))] = slot;
      total += __popc(lanes);
    }
    if (threadIdx.x == 0) found = total;
  }
  __syncthreads();
  return found;
}

}  // namespace moe_ext::cuda
