// Route: weights[t, :], experts[t, :] = top-K of softmax(logits[t, :]), weak experts skipped if asked for      (T, K)
//
// A token at a time. The K largest logits are found by insertion into a sorted list of K (larger first; equal: lower
// index first; NaN counts as largest, as in torch.topk, so that a NaN reaches the output). Only then are exponentials
// taken: of the K selected logits if weights are renormalised, of all E otherwise. With thresholds (arXiv 2402.14800,
// section 3.3) the slot of rank j >= 2 is skipped when w_j < thresholds[j - 2] * w_1: it gets expert E and weight 0,
// and the kept weights are scaled so that they sum to what all K summed to. Sums are float64: in float32 those of
// hundreds of experts would lose a few 1e-6.
//
// Cost per token: reads E logits, at most E * K comparisons (E + K in the usual case), K or E exponentials.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/numeric.h"
#include "cpu/workers.h"
#include "moe.h"

namespace moe_ext::cpu {
namespace {

constexpr int64_t kTokensPerTask = 64;
constexpr int64_t kLogitsPerWorker = 1 << 14;

bool ranks_before(float a, float b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

template <typename T>
void select_top_k(const T* logits, const RouteParams& p, float* values, int64_t* experts) {
  int64_t found = 0;
  for (int64_t e = 0; e < p.num_experts; ++e) {
    const float value = to_float(logits[e]);
    if (found == p.top_k && !ranks_before(value, values[found - 1])) continue;
    int64_t at = found < p.top_k ? found++ : found - 1;
    for (; at > 0 && ranks_before(value, values[at - 1]); --at) {
      values[at] = values[at - 1];
      experts[at] = experts[at - 1];
    }
    values[at] = value;
    experts[at] = e;
  }
}

template <typename T>
void route_token(const RouteParams& p, int64_t token) {
  const T* logits = static_cast<const T*>(p.logits) + token * p.num_experts;
  float* weights = p.weights + token * p.top_k;
  int64_t* experts = p.experts + token * p.top_k;
  select_top_k(logits, p, weights, experts);

  const float largest = weights[0];
  double denominator = 0.0;
  if (!p.renormalise) {
    for (int64_t e = 0; e < p.num_experts; ++e) denominator += std::exp(to_float(logits[e]) - largest);
  }
  double selected = 0.0;
  for (int64_t j = 0; j < p.top_k; ++j) selected += weights[j] = std::exp(weights[j] - largest);

  double kept = selected;
  if (p.thresholds != nullptr) {
    kept = weights[0];
    for (int64_t j = 1; j < p.top_k; ++j) {
      if (weights[j] < p.thresholds[j - 1] * weights[0]) {
        weights[j] = 0.0f;
        experts[j] = p.num_experts;
      }
      kept += weights[j];
    }
  }
  const float share = p.renormalise ? 1.0f : static_cast<float>(selected / denominator);
  const float scale = share / static_cast<float>(kept);
  for (int64_t j = 0; j < p.top_k; ++j) weights[j] *= scale;
}

template <typename T>
void route_typed(const RouteParams& p, const Threads& threads) {
  const int64_t tasks = (p.tokens + kTokensPerTask - 1) / kTokensPerTask;
  const int64_t workers = workers_for(threads, p.tokens * p.num_experts, kLogitsPerWorker);
  for_each_task(threads, workers, tasks, [&](int64_t task, int64_t) {
    const int64_t end = std::min(p.tokens, (task + 1) * kTokensPerTask);
    for (int64_t token = task * kTokensPerTask; token < end; ++token) route_token<T>(p, token);
  });
}

}  // namespace

void route(const RouteParams& p, const Threads& threads) {
  with_type(p.dtype, [&](auto* type) { route_typed<Pointee<decltype(type)>>(p, threads); });
}

}  // namespace moe_ext::cpu
