// route against sorting in double precision.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "check.h"
#include "moe.h"
#include "setting.h"

using namespace setting;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Routing {
  std::vector<float> weights;    // (T, K)
  std::vector<int64_t> experts;  // (T, K)
};

Routing route(const Array& logits, DType dtype, int64_t num_experts, int64_t top_k,
              const std::vector<float>* thresholds = nullptr, bool renormalise = true,
              const Threads& threads = serial()) {
  const int64_t tokens = logits.size() / num_experts;
  Routing got{std::vector<float>(tokens * top_k, kNan), std::vector<int64_t>(tokens * top_k, -7)};
  moe_ext::RouteParams p{};
  p.logits = logits.data();
  p.thresholds = thresholds != nullptr ? thresholds->data() : nullptr;
  p.weights = got.weights.data();
  p.experts = got.experts.data();
  p.tokens = tokens;
  p.num_experts = num_experts;
  p.top_k = top_k;
  p.dtype = dtype;
  p.renormalise = renormalise;
  moe_ext::cpu::route(p, threads);
  return got;
}

Array float_logits(const std::vector<float>& values) {
  Array logits(DType::kFloat32, static_cast<int64_t>(values.size()));
  for (size_t i = 0; i < values.size(); ++i) logits.set(static_cast<int64_t>(i), values[i]);
  return logits;
}

// Experts by logit: NaN first, then the larger, then the lower index.
std::vector<int64_t> sorted_experts(const Array& logits, int64_t first, int64_t num_experts) {
  std::vector<int64_t> order(num_experts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const float left = logits[first + a], right = logits[first + b];
    if (std::isnan(left) || std::isnan(right)) return std::isnan(left) && !std::isnan(right);
    return left > right;
  });
  return order;
}

void check_against_sorting(DType dtype, int64_t tokens, int64_t num_experts, int64_t top_k, bool skipping,
                           bool renormalise, const Threads& threads) {
  Random random(static_cast<uint64_t>(tokens * 131 + num_experts * 17 + top_k));
  const Array logits = random.array(dtype, tokens * num_experts, 4.0f);
  std::vector<float> thresholds(top_k - 1);
  for (float& threshold : thresholds) threshold = random.between(0.0f, 1.0f);
  const Routing got = route(logits, dtype, num_experts, top_k, skipping ? &thresholds : nullptr, renormalise, threads);

  for (int64_t token = 0; token < tokens; ++token) {
    std::vector<int64_t> order = sorted_experts(logits, token * num_experts, num_experts);
    const double largest = logits[token * num_experts + order[0]];
    double all = 0.0, selected = 0.0;
    std::vector<double> weights(num_experts);
    for (int64_t j = 0; j < num_experts; ++j) {
      weights[j] = std::exp(logits[token * num_experts + order[j]] - largest);
      all += weights[j];
      if (j < top_k) selected += weights[j];
    }
    double kept = 0.0;
    for (int64_t j = 0; j < top_k; ++j) {
      if (skipping && j > 0 && weights[j] < thresholds[j - 1] * weights[0]) {
        weights[j] = 0.0;
        order[j] = static_cast<int64_t>(num_experts);
      }
      kept += weights[j];
    }
    const double total = renormalise ? 1.0 : selected / all;
    for (int64_t j = 0; j < top_k; ++j) {
      const int64_t slot = token * top_k + j;
      CHECK(got.experts[slot] == order[j], name_of(dtype), " token ", token, " slot ", j, " went to expert ",
            got.experts[slot], ", expected ", order[j]);
      const double expected = weights[j] / kept * total;
      // A difference of logits is at most 8 and off by 4 * 2^-24, its exp by 2 more: so are a weight, and the sums that
      // it is divided by or multiplied with. Four roundings to float32.
      const double allowed = (4 * (4 + 2) + 4) * 0x1p-24 * expected;
      CHECK(std::fabs(got.weights[slot] - expected) <= allowed, name_of(dtype), " token ", token, " slot ", j,
            " has weight ", got.weights[slot], ", expected ", expected);
    }
  }
}

}  // namespace

TEST("route equals sorting, for every dtype, with and without thresholds and renormalisation") {
  for (const DType dtype : kDTypes) {
    for (const auto& [num_experts, top_k] : std::vector<std::pair<int64_t, int64_t>>{
             {1, 1}, {2, 1}, {2, 2}, {8, 2}, {9, 9}, {60, 4}, {131, 8}, {256, 1}, {600, 8}}) {
      for (const int64_t tokens : {0, 1, 63, 64, 65, 300}) {
        for (const bool skipping : {false, true}) {
          for (const bool renormalise : {false, true}) {
            check_against_sorting(dtype, tokens, num_experts, top_k, skipping, renormalise, serial());
          }
        }
      }
    }
  }
}

TEST("route gives the same bits for 1, 2 and 7 threads and for a pool that gives fewer than it has") {
  constexpr int64_t tokens = 1500, num_experts = 80, top_k = 6;  // 120000 logits: 7 threads' worth
  const Array logits = Random(3).array(DType::kBFloat16, tokens * num_experts, 4.0f);
  const std::vector<float> thresholds(top_k - 1, 0.5f);
  const auto run = [&](const Threads& threads) {
    return route(logits, DType::kBFloat16, num_experts, top_k, &thresholds, true, threads);
  };
  const Routing expected = run(serial());
  for (const Threads& threads : {std_threads(2), std_threads(7), serial(7)}) {
    const Routing got = run(threads);
    CHECK(got.weights == expected.weights, threads.count, " threads");
    CHECK(got.experts == expected.experts, threads.count, " threads");
  }
}

TEST("threads and sorting agree on many tokens") {
  check_against_sorting(DType::kFloat32, 1500, 80, 6, true, false, std_threads(3));
}

TEST("equal logits rank by expert index") {
  const Routing got = route(float_logits({0, 0, 0, 0, 0, 1, 3, 1, 3, 1}), DType::kFloat32, 5, 4);
  const std::vector<int64_t> expected = {0, 1, 2, 3, 1, 3, 0, 2};
  CHECK(got.experts == expected, got.experts[4], got.experts[5], got.experts[6], got.experts[7]);
}

TEST("negative zero and zero are equal") {
  const Routing got = route(float_logits({-0.0f, 0.0f}), DType::kFloat32, 2, 2);
  CHECK(got.experts == (std::vector<int64_t>{0, 1}), got.experts[0]);
}

TEST("NaN logits rank first by index and make the weights of their token NaN, of no other") {
  const std::vector<float> thresholds = {1.0f, 1.0f};
  for (const bool renormalise : {false, true}) {
    for (const std::vector<float>* skip : {static_cast<const std::vector<float>*>(nullptr), &thresholds}) {
      const Array logits = float_logits({1, 2, 3, 4, 1, kNan, 9, kNan, kNan, kNan, kNan, kNan, 5, 6, 7, 8});
      const Routing got = route(logits, DType::kFloat32, 4, 3, skip, renormalise);
      const std::vector<int64_t> chosen(got.experts.begin() + 3, got.experts.begin() + 9);
      CHECK(chosen == (std::vector<int64_t>{1, 3, 2, 0, 1, 2}), chosen[0], chosen[1], chosen[2]);
      for (int64_t slot = 0; slot < 12; ++slot) {
        const bool in_nan_token = slot >= 3 && slot < 9;
        CHECK(std::isnan(got.weights[slot]) == in_nan_token, "slot ", slot, " has weight ", got.weights[slot]);
      }
    }
  }
}

TEST("NaN below the K largest still reaches weights that are a softmax over all experts") {
  const Routing got = route(float_logits({kNan, kNan, 5}), DType::kFloat32, 3, 1, nullptr, false);
  CHECK(got.experts[0] == 0, got.experts[0]);
  CHECK(std::isnan(got.weights[0]), got.weights[0]);
}

TEST("an expert masked with -infinity gets weight 0") {
  const Routing got = route(float_logits({-kInfinity, 2, -kInfinity, 2}), DType::kFloat32, 4, 3);
  CHECK(got.experts == (std::vector<int64_t>{1, 3, 0}), got.experts[0], got.experts[1], got.experts[2]);
  CHECK(got.weights == (std::vector<float>{0.5f, 0.5f, 0.0f}), got.weights[0], " ", got.weights[2]);
}

TEST("the largest floats do not overflow") {
  const Routing got = route(float_logits({3e38f, -3e38f, 3e38f}), DType::kFloat32, 3, 3);
  CHECK(got.weights == (std::vector<float>{0.5f, 0.5f, 0.0f}), got.weights[0], " ", got.weights[1]);
}

TEST("a slot is skipped below its threshold, kept at it, and the kept weights take its share") {
  const std::vector<float> thresholds = {1.0f, 0.5f};
  // Weights before skipping: 0.4, 0.4, 0.2, the last exactly half of the first.
  const Array logits = float_logits({0, 0, -std::log(2.0f), -9});
  const Routing at = route(logits, DType::kFloat32, 4, 3, &thresholds);
  CHECK(at.experts[1] == 1, "a ratio of 1 is not below 1");
  const std::vector<float> higher = {1.0f, 0.75f};
  const Routing below = route(logits, DType::kFloat32, 4, 3, &higher);
  CHECK(below.experts == (std::vector<int64_t>{0, 1, 4}), below.experts[0], below.experts[1], below.experts[2]);
  CHECK(below.weights == (std::vector<float>{0.5f, 0.5f, 0.0f}), below.weights[0], " ", below.weights[2]);
}

TEST("a skipped slot in the middle leaves the later ones in place") {
  const std::vector<float> thresholds = {2.0f, 0.0f};  // 2: always skipped; 0: never
  const Routing got = route(float_logits({3, 3, 3}), DType::kFloat32, 3, 3, &thresholds);
  CHECK(got.experts == (std::vector<int64_t>{0, 3, 2}), got.experts[0], got.experts[1], got.experts[2]);
  CHECK(got.weights == (std::vector<float>{0.5f, 0.0f, 0.5f}), got.weights[0], " ", got.weights[2]);
}

TEST("a formula whose bias is 0 routes as the plain softmax does, skipping included") {
  constexpr int64_t tokens = 200, num_experts = 37, top_k = 5;
  const Array logits = Random(11).array(DType::kFloat32, tokens * num_experts, 4.0f);
  const std::vector<float> zeros(num_experts, 0.0f), thresholds(top_k - 1, 0.5f);
  for (const bool renormalise : {false, true}) {
    const Routing expected = route(logits, DType::kFloat32, num_experts, top_k, &thresholds, renormalise);
    Routing got = expected;
    moe_ext::RouteParams p{};
    p.logits = logits.data();
    p.thresholds = thresholds.data();
    p.bias = zeros.data();
    p.weights = got.weights.data();
    p.experts = got.experts.data();
    p.tokens = tokens;
    p.num_experts = num_experts;
    p.top_k = top_k;
    p.renormalise = renormalise;
    CHECK(!p.plain(), "a bias");
    moe_ext::cpu::route(p, std_threads(2));
    CHECK(got.experts == expected.experts, "other experts");
    for (size_t slot = 0; slot < got.weights.size(); ++slot) {
      CHECK(std::fabs(got.weights[slot] - expected.weights[slot]) <= 0x1p-20 * expected.weights[slot], "slot ", slot);
    }
  }
}
