// Route: weights[t, :], experts[t, :] = top-K of a router's formula of logits[t, :], weak ones skipped if asked  (T, K)
//
// A token at a time. Plain softmax (RouteParams::plain): the K largest logits are found by insertion into a sorted list
// of K (larger first; equal: lower index first; NaN counts as largest, as in torch.topk, so that a NaN reaches the
// output). Only then are exponentials taken: of the K selected logits if weights are renormalised, of all E otherwise.
// With thresholds (arXiv 2402.14800, section 3.3) the slot of rank j >= 2 is skipped when w_j < thresholds[j - 2] *
// w_1: it gets expert E and weight 0, and the kept weights are scaled so that they sum to what all K summed to. Sums
// are float64: in float32 those of hundreds of experts would lose a few 1e-6.
//
// Other formulas: the scores of all E, the choices, the groups' by a scan of their members; then the same insertion on
// the choices, and the skip rule on the slots by their weights, largest first, which the choice need not have sorted.
//
// Cost per token: reads E logits, at most E * K comparisons (E + K in the usual case), K or E exponentials. Other
// formulas: E exponentials, at most E * K + groups^2 comparisons. Memory: 2 E + groups floats a thread.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/numeric.h"
#include "cpu/workers.h"
#include "moe.h"

namespace moe_ext::cpu {
namespace {

constexpr int64_t kTokensPerTask = 64;
constexpr int64_t kLogitsPerWorker = 1 << 14;

bool ranks_before(float a, float b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

// The `wanted` largest of `count` numbers with their places, sorted.
template <typename T>
void select_largest(const T* numbers, int64_t count, int64_t wanted, float* values, int64_t* places) {
  int64_t found = 0;
  for (int64_t e = 0; e < count; ++e) {
    const float value = to_float(numbers[e]);
    if (found == wanted && !ranks_before(value, values[found - 1])) continue;
    int64_t at = found < wanted ? found++ : found - 1;
    for (; at > 0 && ranks_before(value, values[at - 1]); --at) {
      values[at] = values[at - 1];
      places[at] = places[at - 1];
    }
    values[at] = value;
    places[at] = e;
  }
}

// Of a thread, for formulas that are not plain.
struct Scratch {
  explicit Scratch(const RouteParams& p)
      : scores(p.num_experts),
        choices(p.num_experts),
        of_groups(p.groups),
        best(std::max({p.group_best, p.groups_per_token, p.top_k})),
        places(best.size()),
        chosen(p.groups) {}
  std::vector<float> scores, choices, of_groups, best;
  std::vector<int64_t> places;
  std::vector<bool> chosen;
};

template <typename T>
void score(const RouteParams& p, const T* logits, std::vector<float>& scores) {
  switch (p.score) {
    case Score::kSoftmax: {
      float largest = -std::numeric_limits<float>::infinity();
      for (int64_t e = 0; e < p.num_experts; ++e) largest = std::max(largest, to_float(logits[e]));
      double sum = 0.0;
      for (int64_t e = 0; e < p.num_experts; ++e) sum += scores[e] = std::exp(to_float(logits[e]) - largest);
      for (int64_t e = 0; e < p.num_experts; ++e) scores[e] /= static_cast<float>(sum);
      return;
    }
    case Score::kSigmoid:
      for (int64_t e = 0; e < p.num_experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-to_float(logits[e])));
      return;
    case Score::kSqrtSoftplus:
      for (int64_t e = 0; e < p.num_experts; ++e) {
        const float logit = to_float(logits[e]);
        scores[e] = std::sqrt(logit > 20.0f ? logit : std::log1p(std::exp(logit)));
      }
      return;
  }
}

// Takes the choices of experts outside a token's groups away.
void choose_groups(const RouteParams& p, Scratch& scratch) {
  const int64_t size = p.num_experts / p.groups;
  for (int64_t group = 0; group < p.groups; ++group) {
    select_largest(scratch.choices.data() + group * size, size, p.group_best, scratch.best.data(),
                   scratch.places.data());
    scratch.of_groups[group] = std::accumulate(scratch.best.begin(), scratch.best.begin() + p.group_best, 0.0f);
    scratch.chosen[group] = false;
  }
  select_largest(scratch.of_groups.data(), p.groups, p.groups_per_token, scratch.best.data(), scratch.places.data());
  for (int64_t i = 0; i < p.groups_per_token; ++i) scratch.chosen[scratch.places[i]] = true;
  const float outside = p.outside_zero ? 0.0f : -std::numeric_limits<float>::infinity();
  for (int64_t e = 0; e < p.num_experts; ++e) {
    if (!scratch.chosen[e / size]) scratch.choices[e] = outside;
  }
}

template <typename T>
void route_scored_token(const RouteParams& p, int64_t token, Scratch& scratch) {
  const T* logits = static_cast<const T*>(p.logits) + token * p.num_experts;
  float* weights = p.weights + token * p.top_k;
  int64_t* experts = p.experts + token * p.top_k;
  score(p, logits, scratch.scores);
  for (int64_t e = 0; e < p.num_experts; ++e) {
    scratch.choices[e] = (p.by_logits ? to_float(logits[e]) : scratch.scores[e]) + (p.bias ? p.bias[e] : 0.0f);
  }
  if (p.groups > 1) choose_groups(p, scratch);
  select_largest(scratch.choices.data(), p.num_experts, p.top_k, weights, experts);

  double selected = 0.0;
  for (int64_t j = 0; j < p.top_k; ++j) selected += weights[j] = scratch.scores[experts[j]];
  double kept = selected;
  if (p.thresholds != nullptr) {
    select_largest(weights, p.top_k, p.top_k, scratch.best.data(), scratch.places.data());  // slots by weight
    for (int64_t rank = 1; rank < p.top_k; ++rank) {
      if (scratch.best[rank] < p.thresholds[rank - 1] * scratch.best[0]) {
        const int64_t slot = scratch.places[rank];
        weights[slot] = 0.0f;
        experts[slot] = p.num_experts;
      }
    }
    kept = std::accumulate(weights, weights + p.top_k, 0.0);
  }
  const double share = kept == 0.0 ? 1.0 : selected / kept;
  const double sum = p.renormalise ? std::max(selected + p.epsilon, static_cast<double>(p.least)) : 1.0;
  const double scale = p.scale * share / sum;
  for (int64_t j = 0; j < p.top_k; ++j) weights[j] = static_cast<float>(weights[j] * scale);
}

template <typename T>
void route_token(const RouteParams& p, int64_t token) {
  const T* logits = static_cast<const T*>(p.logits) + token * p.num_experts;
  float* weights = p.weights + token * p.top_k;
  int64_t* experts = p.experts + token * p.top_k;
  select_largest(logits, p.num_experts, p.top_k, weights, experts);

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
  const float scale = p.scale * (share / static_cast<float>(kept));
  for (int64_t j = 0; j < p.top_k; ++j) weights[j] *= scale;
}

template <typename T>
void route_typed(const RouteParams& p, const Threads& threads) {
  const int64_t tasks = (p.tokens + kTokensPerTask - 1) / kTokensPerTask;
  const int64_t workers = workers_for(threads, p.tokens * p.num_experts, kLogitsPerWorker);
  std::vector<Scratch> scratch(p.plain() ? 0 : workers, Scratch(p));
  for_each_task(threads, workers, tasks, [&](int64_t task, int64_t worker) {
    const int64_t end = std::min(p.tokens, (task + 1) * kTokensPerTask);
    for (int64_t token = task * kTokensPerTask; token < end; ++token) {
      if (p.plain()) {
        route_token<T>(p, token);
      } else {
        route_scored_token<T>(p, token, scratch[worker]);
      }
    }
  });
}

}  // namespace

void route(const RouteParams& p, const Threads& threads) {
  with_type(p.dtype, [&](auto* type) { route_typed<Pointee<decltype(type)>>(p, threads); });
}

}  // namespace moe_ext::cpu
