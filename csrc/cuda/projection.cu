// Projections: out[t, e] = <g[t, :], f_e(x[t, :])>, float64                                                      (T, E)
//
// Tokens run in parts that bound the memory; all_experts.cu computes y of a part, as the experts operators round it.
// Then a warp takes a token and an expert: a lane sums the products of every 32nd column in float64, and the lanes are
// added in a fixed order. A product of two float32 is exact in float64: the bits do not depend on scheduling. Warps of
// a block share their token's g through L1 where there are experts enough.
//
// Cost: 6 E H I FLOPs a token for y; 2 E H float64 FLOPs and one read of y for the products, bound by bandwidth.
#include "cuda/all_experts.h"
#include "cuda/device/dispatch.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/launch.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

struct DotsParams {
  const void* y;  // (E, tokens, H)
  const void* g;  // (tokens, H)
  double* out;    // (tokens, E) out
  int64_t tokens;
  int64_t num_experts;
  int64_t hidden;
};

template <typename TY, typename TG>
__global__ void __launch_bounds__(kThreads) dots_kernel(DotsParams p) {
  const int64_t pair = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (pair >= p.tokens * p.num_experts) return;  // the whole warp
  const int64_t token = pair / p.num_experts, expert = pair % p.num_experts;
  const TY* y = static_cast<const TY*>(p.y) + (expert * p.tokens + token) * p.hidden;
  const TG* g = static_cast<const TG*>(p.g) + token * p.hidden;
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarpSize; i < p.hidden; i += kWarpSize) {
    sum += static_cast<double>(to_float(y[i])) * static_cast<double>(to_float(g[i]));
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) p.out[pair] = sum;
}

}  // namespace

void projection(const ProjectionParams& p, const Scratch& scratch, cudaStream_t stream) {
  for_all_experts("expert_projection", p, scratch, stream, [&](const AllOutputs& outputs) {
    const DotsParams dots{outputs.y,
                          static_cast<const char*>(p.g) + outputs.first * p.hidden * element_size(p.g_dtype),
                          p.out + outputs.first * p.num_experts,
                          outputs.tokens,
                          p.num_experts,
                          p.hidden};
    const unsigned blocks = grid_size((outputs.tokens * p.num_experts + kWarps - 1) / kWarps);
    for_dtype(outputs.dtype, [&](auto row) {
      for_dtype(p.g_dtype, [&](auto gradient) {
        dots_kernel<decltype(row), decltype(gradient)><<<blocks, kThreads, 0, stream>>>(dots);
      });
    });
    check_launch("dots_kernel");
  });
}

}  // namespace moe_ext::cuda
