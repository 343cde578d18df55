// Route: weights[t, :], experts[t, :] = top-K of softmax(logits[t, :]), optionally with weak experts skipped.     (T,
// K)
//
// A warp a token; nothing but the logits is read and nothing but the result is written. Lane l holds the logits of
// experts l, l + 32, ... as 32-bit keys that order as the logits do (NaN above all, as in torch.topk). Each of K rounds
// takes the largest key of the warp and, among equal ones, the lowest expert index: two warp reductions. The winner of
// round j stays in lane j % 32. Then softmax over the K winners (renormalise) or over all E, and with thresholds (arXiv
// 2402.14800, section 3.3) the slot of rank j >= 2 is skipped when w_j < thresholds[j - 2] * w_1: it gets expert E and
// weight 0, and the kept weights are scaled so that they sum to what all K summed to. Sums run over lanes in a fixed
// order.
//
// Cost per token: reads E logits, writes 12 K bytes; K * (E / 32 + 10) instructions a lane.
#include "cuda/device/dispatch.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/launch.h"

namespace moe_ext::cuda {
namespace {

constexpr int kWarps = 4;
constexpr uint32_t kTaken = 0;  // below the key of -inf

__device__ __forceinline__ uint32_t key_of(float logit) {
  if (isnan(logit)) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 + 0 = +0: the two rank as equals
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of(uint32_t key) {
  if (key == 0xffffffffu) return __uint_as_float(0x7fc00000u);
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// kPerLane: logits, and winners, that a lane holds: E <= 32 * kPerLane.
template <typename T, int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarpSize, 4) route_kernel(RouteParams p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (token >= p.tokens) return;
  const int num_experts = static_cast<int>(p.num_experts);
  const int top_k = static_cast<int>(p.top_k);

  uint32_t keys[kPerLane];
  const T* logits = static_cast<const T*>(p.logits) + token * num_experts;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    keys[i] = expert < num_experts ? key_of(to_float(logits[expert])) : kTaken;
  }

  float denominator = 0.0f;  // sum over all E of exp(logit - largest), when it is needed
  float largest = 0.0f;
  if (!p.renormalise) {
    uint32_t best = kTaken;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best = max(best, keys[i]);
    largest = logit_of(__reduce_max_sync(kAllLanes, best));
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i * kWarpSize + lane < num_experts) denominator += expf(logit_of(keys[i]) - largest);
    }
    denominator = warp_sum(denominator);
  }

  uint32_t won[kPerLane];  // keys and experts of ranks lane, lane + 32, ...
  int expert_won[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    won[i] = kTaken;
    expert_won[i] = num_experts;
    const int ranks = min(kWarpSize, top_k - i * kWarpSize);
    for (int rank = 0; rank < ranks; ++rank) {
      uint32_t best = keys[0];
      int slot = 0;
#pragma unroll
      for (int j = 1; j < kPerLane; ++j) {
        if (keys[j] > best) {
          best = keys[j];
          slot = j;
        }
      }
      const uint32_t winner = __reduce_max_sync(kAllLanes, best);
      const uint32_t candidate = best == winner ? static_cast<uint32_t>(slot * kWarpSize + lane) : 0xffffffffu;
      const uint32_t expert = __reduce_min_sync(kAllLanes, candidate);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (expert == static_cast<uint32_t>(j * kWarpSize + lane)) keys[j] = kTaken;
      }
      if (rank == lane) {
        won[i] = winner;
        expert_won[i] = static_cast<int>(expert);
      }
    }
  }

  if (p.renormalise) largest = logit_of(__shfl_sync(kAllLanes, won[0], 0));
  float weights[kPerLane];
  float selected = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    weights[i] = i * kWarpSize + lane < top_k ? expf(logit_of(won[i]) - largest) : 0.0f;
    selected += weights[i];
  }
  selected = warp_sum(selected);

  float kept = selected;
  if (p.thresholds != nullptr) {
    const float first = __shfl_sync(kAllLanes, weights[0], 0);
    kept = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int rank = i * kWarpSize + lane;
      if (rank > 0 && rank < top_k && weights[i] < p.thresholds[rank - 1] * first) {
        weights[i] = 0.0f;
        expert_won[i] = num_experts;
      }
      kept += weights[i];
    }
    kept = warp_sum(kept);
  }

  const float scale = (p.renormalise ? 1.0f : selected / denominator) / kept;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int rank = i * kWarpSize + lane;
    if (rank < top_k) {
      p.weights[token * top_k + rank] = weights[i] * scale;
      p.experts[token * top_k + rank] = expert_won[i];
    }
  }
}

template <typename T>
void launch_typed(const RouteParams& p, cudaStream_t stream) {
  const unsigned blocks = grid_size((p.tokens + kWarps - 1) / kWarps);
  constexpr int kThreads = kWarps * kWarpSize;
  const int64_t per_lane = (p.num_experts + kWarpSize - 1) / kWarpSize;
  if (per_lane <= 1) {
    route_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(p);
  } else if (per_lane <= 2) {
    route_kernel<T, 2><<<blocks, kThreads, 0, stream>>>(p);
  } else if (per_lane <= 4) {
    route_kernel<T, 4><<<blocks, kThreads, 0, stream>>>(p);
  } else if (per_lane <= 8) {
    route_kernel<T, 8><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    route_kernel<T, 16><<<blocks, kThreads, 0, stream>>>(p);
  }
  check_launch("route_kernel");
}

}  // namespace

void route(const RouteParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return;
  for_dtype(p.dtype, [&](auto type) { launch_typed<decltype(type)>(p, stream); });
}

}  // namespace moe_ext::cuda
