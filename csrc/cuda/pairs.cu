// Pairs: pairs[i, j] += sum over counted tokens with slots of both i and j of (g_i ||f_i||) (g_j ||f_j||), in float64.
//
// Two kernels. The first: a thread a slot, shares[slot] = g ||f_e||, 0 where the slot is empty or not counted. The
// second: a block a row i, thread j of it column j, j + kThreads and so on. The block goes through its expert's slots
// in their order, and in each all threads look at the token's slots, of which each adds what is its column's: no two
// add to one sum, so that the result does not depend on scheduling, and the halves have the same bits. With a sorted
// list a block reads its own slots only; without one (small batches) it looks through all of them.
//
// Cost: K comparisons a slot and thread, about T K^2 E / 32 a warp in all; next to nothing is read. Blocks are as even
// as the routing: with all slots on one expert one block does it all.
#include "cuda/device/next_kernel.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/ptx_sm80.cuh"
#include "cuda/launch.h"
#include "cuda/params.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) shares_kernel(PairsParams p) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  const MomentsParams& m = p.slots;
  const int64_t slot = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (slot >= m.slots) return;
  const bool counts = (m.counted == nullptr || m.counted[slot / m.top_k]) &&
                      expert_of(m.experts, m.experts_are_int64, slot, m.num_experts) < m.num_experts;
  double square = 0.0;
  if (counts) {
    for (int64_t part = 0; part < m.parts; ++part) square += m.squares[slot * m.parts + part];
  }
  p.shares[slot] = counts ? double{weight_of(m.weights, m.weights_dtype, slot)} * sqrt(square) : 0.0;
}

__global__ void __launch_bounds__(kThreads) pairs_kernel(PairsParams p) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  const MomentsParams& m = p.slots;
  const int64_t row = blockIdx.x;
  const int64_t begin = m.first == nullptr ? 0 : m.first[row];
  const int64_t end = m.first == nullptr ? m.slots : m.first[row + 1];
  for (int64_t column = threadIdx.x; column < m.num_experts; column += kThreads) {
    double sum = 0.0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = m.first == nullptr ? i : m.slot_of[i];
      if (m.first == nullptr && expert_of(m.experts, m.experts_are_int64, slot, m.num_experts) != row) continue;
      const int64_t first = slot / m.top_k * m.top_k;
      const double share = p.shares[slot];
      for (int64_t other = first; other < first + m.top_k; ++other) {
        if (expert_of(m.experts, m.experts_are_int64, other, m.num_experts) == column) sum += share * p.shares[other];
      }
    }
    p.pairs[row * m.num_experts + column] += sum;
  }
}

}  // namespace

void launch_pairs(const PairsParams& p, cudaStream_t stream) {
  const unsigned blocks = grid_size((p.slots.slots + kThreads - 1) / kThreads);
  launch_next<shares_kernel>("shares_kernel", blocks, kThreads, 0, stream, p);
  launch_next<pairs_kernel>("pairs_kernel", grid_size(p.slots.num_experts), kThreads, 0, stream, p);
}

}  // namespace moe_ext::cuda
