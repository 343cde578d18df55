// Moments: moments[e, a, b] += sum over counted slots of expert e of weights^a * ||f_e||^b, a and b in {0, 1, 2}.
//
// A block an expert, in float64. Thread i takes every kThreads-th of the expert's slots, and the threads' sums are
// added in a fixed tree: deterministic. With a sorted list a block reads its own slots only; without one (small
// batches) it looks through all of them.
//
// Cost: reads a few numbers a slot and adds nine; nothing beside the products that gave them.
#include "cuda/device/next_kernel.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/ptx_sm80.cuh"
#include "cuda/launch.h"
#include "cuda/params.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) moments_kernel(MomentsParams p) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  const int64_t expert = blockIdx.x;
  const int64_t begin = p.first == nullptr ? 0 : p.first[expert];
  const int64_t end = p.first == nullptr ? p.slots : p.first[expert + 1];
  double sums[9] = {};
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int64_t slot = p.first == nullptr ? i : p.slot_of[i];
    if (p.first == nullptr && expert_of(p.experts, p.experts_are_int64, slot, p.num_experts) != expert) continue;
    if (p.counted != nullptr && !p.counted[slot / p.top_k]) continue;
    double square = 0.0;
#pragma unroll 8
    for (int64_t part = 0; part < p.parts; ++part) square += p.squares[slot * p.parts + part];
    const double norm = sqrt(square);
    const double gate = weight_of(p.weights, p.weights_dtype, slot);
    const double gates[3] = {1.0, gate, gate * gate};
    const double norms[3] = {1.0, norm, square};
#pragma unroll
    for (int a = 0; a < 3; ++a) {
#pragma unroll
      for (int b = 0; b < 3; ++b) sums[a * 3 + b] += gates[a] * norms[b];
    }
  }

  __shared__ double warp_sums[kThreads / kWarpSize][9];
#pragma unroll
  for (int i = 0; i < 9; ++i) {
    sums[i] = warp_sum(sums[i]);
    if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize][i] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x < 9) {
    double sum = 0.0;
    for (int warp = 0; warp < kThreads / kWarpSize; ++warp) sum += warp_sums[warp][threadIdx.x];
    p.moments[expert * 9 + threadIdx.x] += sum;
  }
}

}  // namespace

void launch_moments(const MomentsParams& p, cudaStream_t stream) {
  launch_next<moments_kernel>("moments_kernel", grid_size(p.num_experts), kThreads, 0, stream, p);
}

}  // namespace moe_ext::cuda
