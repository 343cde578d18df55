// Route: weights[t, :], experts[t, :] = top-K of a router's formula of logits[t, :], weak ones skipped if asked  (T, K)
//
// Plain softmax (RouteParams::plain). A warp a token; nothing but the logits is read and nothing but the result is
// written. Lane l holds the logits of experts l, l + 32, ... as 32-bit keys that order as the logits do (NaN above all,
// as in torch.topk). Each of K rounds takes the largest key of the warp and, among equal ones, the lowest expert index:
// two warp reductions. The winner of round j stays in lane j % 32. Then softmax over the K winners (renormalise) or
// over all E, and with thresholds (arXiv 2402.14800, section 3.3) the slot of rank j >= 2 is skipped when w_j <
// thresholds[j - 2] * w_1: it gets expert E and weight 0, and the kept weights are scaled so that they sum to what all
// K summed to. Sums run over lanes in a fixed order.
//
// Other formulas. The same warp holds the scores of its experts, too, and the keys are those of the choices. A group's
// best are found by the same rounds among its members, its sum stays in lane `group`, and rounds over the lanes take
// the best groups; the keys of the others then fall. The skip rule ranks the K slots by weight, again by rounds.
//
// Cost per token: reads E logits, writes 12 K bytes; K * (E / 32 + 10) instructions a lane. Other formulas: twice that
// with thresholds, and group_best * groups more rounds.
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

// The largest key of the warp and, among equal ones, the lowest index; its key is taken away. Lane l holds the keys of
// indices l, l + 32, ...
template <int kPerLane>
__device__ __forceinline__ int take_largest(uint32_t (&keys)[kPerLane], int lane, uint32_t* largest) {
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
  const uint32_t index = __reduce_min_sync(kAllLanes, candidate);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (index == static_cast<uint32_t>(j * kWarpSize + lane)) keys[j] = kTaken;
  }
  *largest = winner;
  return static_cast<int>(index);
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
      uint32_t winner;
      const int expert = take_largest(keys, lane, &winner);
      if (rank == lane) {
        won[i] = winner;
        expert_won[i] = expert;
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

  const float scale = p.scale * ((p.renormalise ? 1.0f : selected / denominator) / kept);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int rank = i * kWarpSize + lane;
    if (rank < top_k) {
      p.weights[token * top_k + rank] = weights[i] * scale;
      p.experts[token * top_k + rank] = expert_won[i];
    }
  }
}

// Scores of the logits in place.
template <int kPerLane>
__device__ __forceinline__ void score(const RouteParams& p, int lane, float (&scores)[kPerLane]) {
  if (p.score == Score::kSoftmax) {
    float largest = __uint_as_float(0xff800000u);  // -inf
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i * kWarpSize + lane < p.num_experts) largest = fmaxf(largest, scores[i]);
    }
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      scores[i] = i * kWarpSize + lane < p.num_experts ? expf(scores[i] - largest) : 0.0f;
      sum += scores[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) scores[i] /= sum;
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const float logit = scores[i];
    scores[i] =
        p.score == Score::kSigmoid ? 1.0f / (1.0f + expf(-logit)) : sqrtf(logit > 20.0f ? logit : log1pf(expf(logit)));
  }
}

// Lowers the keys of experts outside a token's groups.
template <int kPerLane>
__device__ __forceinline__ void choose_groups(const RouteParams& p, int lane, uint32_t (&keys)[kPerLane]) {
  const int size = static_cast<int>(p.num_experts / p.groups), groups = static_cast<int>(p.groups);
  uint32_t of_group[1] = {kTaken};  // of group `lane`
  for (int group = 0; group < groups; ++group) {
    uint32_t members[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) members[i] = (i * kWarpSize + lane) / size == group ? keys[i] : kTaken;
    float sum = 0.0f;
    for (int rank = 0; rank < p.group_best; ++rank) {
      uint32_t winner;
      take_largest(members, lane, &winner);
      sum += logit_of(winner);
    }
    if (lane == group) of_group[0] = key_of(sum);
  }
  uint32_t chosen = 0;  // a bit a group
  for (int i = 0; i < p.groups_per_token; ++i) {
    uint32_t winner;
    chosen |= 1u << take_largest(of_group, lane, &winner);
  }
  const uint32_t outside = p.outside_zero ? key_of(0.0f) : key_of(__uint_as_float(0xff800000u));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    if (expert < p.num_experts && (chosen >> (expert / size) & 1u) == 0) keys[i] = outside;
  }
}

// A router's formula that is not plain; kPerLane as above.
template <typename T, int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarpSize, 4) route_scored_kernel(RouteParams p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (token >= p.tokens) return;
  const int num_experts = static_cast<int>(p.num_experts);
  const int top_k = static_cast<int>(p.top_k);

  float scores[kPerLane], logits[kPerLane];
  const T* row = static_cast<const T*>(p.logits) + token * num_experts;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    scores[i] = logits[i] = expert < num_experts ? to_float(row[expert]) : 0.0f;
  }
  score(p, lane, scores);
  uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int expert = i * kWarpSize + lane;
    if (expert < num_experts) {
      const float choice = p.by_logits ? logits[i] : scores[i];
      keys[i] = key_of(p.bias != nullptr ? choice + p.bias[expert] : choice);
    } else {
      keys[i] = kTaken;
    }
  }
  if (p.groups > 1) choose_groups(p, lane, keys);

  float weights[kPerLane];  // of slots lane, lane + 32, ...
  int expert_won[kPerLane];
  float selected = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    weights[i] = 0.0f;
    expert_won[i] = num_experts;
    const int ranks = min(kWarpSize, top_k - i * kWarpSize);
    for (int rank = 0; rank < ranks; ++rank) {
      uint32_t winner;
      const int expert = take_largest(keys, lane, &winner);
      float mine = 0.0f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (expert == j * kWarpSize + lane) mine = scores[j];
      }
      mine = __shfl_sync(kAllLanes, mine, expert % kWarpSize);
      if (rank == lane) {
        weights[i] = mine;
        expert_won[i] = expert;
      }
    }
    selected += weights[i];
  }
  selected = warp_sum(selected);

  float kept = selected;
  if (p.thresholds != nullptr) {
    uint32_t slots[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) slots[i] = i * kWarpSize + lane < top_k ? key_of(weights[i]) : kTaken;
    float first = 0.0f;
    for (int rank = 0; rank < top_k; ++rank) {
      uint32_t winner;
      const int slot = take_largest(slots, lane, &winner);
      if (rank == 0) first = logit_of(winner);
      if (rank == 0 || !(logit_of(winner) < p.thresholds[rank - 1] * first)) continue;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (slot == i * kWarpSize + lane) {
          weights[i] = 0.0f;
          expert_won[i] = num_experts;
        }
      }
    }
    kept = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) kept += weights[i];
    kept = warp_sum(kept);
  }

  const float scale = p.scale * (kept == 0.0f ? 1.0f : selected / kept);
  float sum = p.renormalise ? selected + p.epsilon : 1.0f;
  if (p.renormalise && sum < p.least) sum = p.least;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int slot = i * kWarpSize + lane;
    if (slot < top_k) {
      p.weights[token * top_k + slot] = weights[i] * scale / sum;
      p.experts[token * top_k + slot] = expert_won[i];
    }
  }
}

template <typename T, int kPerLane>
void launch_sized(const RouteParams& p, cudaStream_t stream) {
  const unsigned blocks = grid_size((p.tokens + kWarps - 1) / kWarps);
  if (p.plain()) {
    route_kernel<T, kPerLane><<<blocks, kWarps * kWarpSize, 0, stream>>>(p);
  } else {
    route_scored_kernel<T, kPerLane><<<blocks, kWarps * kWarpSize, 0, stream>>>(p);
  }
}

template <typename T>
void launch_typed(const RouteParams& p, cudaStream_t stream) {
  const int64_t per_lane = (p.num_experts + kWarpSize - 1) / kWarpSize;
  if (per_lane <= 1) {
    launch_sized<T, 1>(p, stream);
  } else if (per_lane <= 2) {
    launch_sized<T, 2>(p, stream);
  } else if (per_lane <= 4) {
    launch_sized<T, 4>(p, stream);
  } else if (per_lane <= 8) {
    launch_sized<T, 8>(p, stream);
  } else {
    launch_sized<T, 16>(p, stream);
  }
  check_launch("route_kernel");
}

}  // namespace

void route(const RouteParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return;
  for_dtype(p.dtype, [&](auto type) { launch_typed<decltype(type)>(p, stream); });
}

}  // namespace moe_ext::cuda
