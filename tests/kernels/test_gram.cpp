// gram, projection and subset_errors against double-precision brute force, for every instruction set that runs here.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "check.h"
#include "moe.h"
#include "setting.h"

using namespace setting;
using moe_ext::GramParams;
using moe_ext::ProjectionParams;
using moe_ext::SubsetsParams;

namespace {

struct Layer {
  Layer(int64_t tokens, int64_t num_experts, int64_t hidden, int64_t intermediate, DType dtype)
      : tokens(tokens),
        num_experts(num_experts),
        hidden(hidden),
        intermediate(intermediate),
        dtype(dtype),
        random(static_cast<uint32_t>(tokens * 7919 + num_experts * 613 + hidden)),
        x(random.array(dtype, tokens * hidden, 2.0f)),
        gate_up(random.array(dtype, num_experts * 2 * intermediate * hidden, 2.0f / std::sqrt(float(hidden)))),
        down(random.array(dtype, num_experts * hidden * intermediate, 2.0f / std::sqrt(float(intermediate)))),
        g(random.array(DType::kFloat32, tokens * hidden, 1.0f)) {}

  // f_e(x[t, :]), not rounded to the dtype.
  std::vector<double> output(int64_t e, int64_t t) const {
    std::vector<double> h(intermediate), y(hidden, 0.0);
    for (int64_t i = 0; i < intermediate; ++i) {
      double gate = 0.0, up = 0.0;
      for (int64_t k = 0; k < hidden; ++k) {
        gate += double(gate_up[((2 * e) * intermediate + i) * hidden + k]) * x[t * hidden + k];
        up += double(gate_up[((2 * e + 1) * intermediate + i) * hidden + k]) * x[t * hidden + k];
      }
      h[i] = gate / (1.0 + std::exp(-gate)) * up;
    }
    for (int64_t k = 0; k < hidden; ++k) {
      for (int64_t i = 0; i < intermediate; ++i) y[k] += down[(e * hidden + k) * intermediate + i] * h[i];
    }
    return y;
  }

  std::vector<double> gram(const moe_ext::Threads& threads) const {
    std::vector<double> out(tokens * num_experts * num_experts, std::nan(""));
    const GramParams p{
        {x.data(), gate_up.data(), down.data(), nullptr, nullptr, tokens, num_experts, hidden, intermediate, dtype, {}},
        out.data()};
    moe_ext::cpu::gram(p, threads);
    return out;
  }

  std::vector<double> projection(const moe_ext::Threads& threads) const {
    std::vector<double> out(tokens * num_experts, std::nan(""));
    const ProjectionParams p{
        {x.data(), gate_up.data(), down.data(), nullptr, nullptr, tokens, num_experts, hidden, intermediate, dtype, {}},
        g.data(),
        out.data(),
        DType::kFloat32};
    moe_ext::cpu::projection(p, threads);
    return out;
  }

  int64_t tokens, num_experts, hidden, intermediate;
  DType dtype;
  Random random;
  Array x, gate_up, down, g;
};

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0.0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

void check_gram(const Layer& layer, const std::vector<double>& got, const char* isa) {
  const int64_t experts = layer.num_experts;
  // Outputs are rounded to the dtype; before that they err by some (H + I) float32 roundings of their norm's size.
  const double relative =
      2.5 * rounding(layer.dtype) + 16.0 * static_cast<double>(layer.hidden + layer.intermediate) * 0x1p-24;
  for (int64_t t = 0; t < layer.tokens; ++t) {
    std::vector<std::vector<double>> y;
    for (int64_t e = 0; e < experts; ++e) y.push_back(layer.output(e, t));
    for (int64_t i = 0; i < experts; ++i) {
      for (int64_t j = 0; j < experts; ++j) {
        const double value = got[(t * experts + i) * experts + j], expected = dot(y[i], y[j]);
        const double bound = relative * std::sqrt(dot(y[i], y[i]) * dot(y[j], y[j]));
        CHECK(std::abs(value - expected) <= bound, isa, " ", name_of(layer.dtype), ": ", value, " is not ", expected,
              " at token ", t, ", experts ", i, " and ", j);
        CHECK(value == got[(t * experts + j) * experts + i], isa, ": not symmetric at token ", t);
      }
    }
  }
}

void check_projection(const Layer& layer, const std::vector<double>& got, const char* isa) {
  // Outputs err by some (H + I) float32 roundings of their norm's size; with AVX-512 BF16, h is rounded to bfloat16.
  const double relative = 2.5 * (layer.dtype == DType::kBFloat16 ? 0x1p-8 : 0.0) +
                          16.0 * static_cast<double>(layer.hidden + layer.intermediate) * 0x1p-24;
  for (int64_t t = 0; t < layer.tokens; ++t) {
    std::vector<double> g(layer.hidden);
    for (int64_t i = 0; i < layer.hidden; ++i) g[i] = layer.g[t * layer.hidden + i];
    for (int64_t e = 0; e < layer.num_experts; ++e) {
      const std::vector<double> y = layer.output(e, t);
      const double value = got[t * layer.num_experts + e], expected = dot(y, g);
      CHECK(std::abs(value - expected) <= relative * std::sqrt(dot(y, y) * dot(g, g)), isa, " ", name_of(layer.dtype),
            ": ", value, " is not ", expected, " at token ", t, ", expert ", e);
    }
  }
}

// Rankings of random outputs: F of the first K ranks, F_s of the first K that a subset keeps.
struct Ranking {
  Ranking(int64_t tokens, int64_t num_experts, int64_t depth)
      : tokens(tokens), num_experts(num_experts), depth(depth), random(static_cast<uint32_t>(tokens + depth)) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t e = 0; e < num_experts * kColumns; ++e) outputs.push_back(random.between(-1.0f, 1.0f));
      std::vector<int64_t> order(num_experts);
      for (int64_t e = 0; e < num_experts; ++e) order[e] = e;
      for (int64_t e = num_experts - 1; e > 0; --e) std::swap(order[e], order[random.below(e + 1)]);
      ranks.insert(ranks.end(), order.begin(), order.begin() + depth);
      for (int64_t i = 0; i < depth; ++i) scores.push_back(std::exp(-0.3 * double(i)));
      for (int64_t i = 0; i < depth; ++i) {
        for (int64_t j = i + 1; j < depth; ++j) {
          double square = 0.0;
          for (int64_t c = 0; c < kColumns; ++c) {
            const double d = output(t, order[i], c) - output(t, order[j], c);
            square += d * d;
          }
          distances.push_back(square);
        }
      }
    }
  }

  double output(int64_t t, int64_t e, int64_t c) const { return outputs[(t * num_experts + e) * kColumns + c]; }

  std::vector<double> errors(const bool* keep, int64_t subsets, int64_t top_k, const float* thresholds,
                             const moe_ext::Threads& threads) const {
    std::vector<double> out(subsets, std::nan(""));
    const SubsetsParams p{distances.data(), ranks.data(), scores.data(), keep,  thresholds, out.data(),
                          tokens,           num_experts,  depth,         top_k, subsets,    nullptr};
    moe_ext::cpu::subset_errors(p, threads);
    return out;
  }

  double brute_force(const bool* keep, int64_t top_k, const float* thresholds) const {
    double error = 0.0;
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<double> change(kColumns, 0.0);
      for (const bool pruned : {false, true}) {
        std::vector<int64_t> chosen;
        for (int64_t i = 0; i < depth && static_cast<int64_t>(chosen.size()) < top_k; ++i) {
          if (!pruned || keep[ranks[t * depth + i]]) chosen.push_back(i);
        }
        std::vector<double> weights;
        double sum = 0.0;
        for (size_t slot = 0; slot < chosen.size(); ++slot) {
          const double score = scores[t * depth + chosen[slot]], first = scores[t * depth + chosen[0]];
          const bool skipped = pruned && thresholds != nullptr && slot > 0 && score < thresholds[slot - 1] * first;
          weights.push_back(skipped ? 0.0 : score);
          sum += weights.back();
        }
        for (size_t slot = 0; slot < chosen.size(); ++slot) {
          for (int64_t c = 0; c < kColumns; ++c) {
            const double part = weights[slot] / sum * output(t, ranks[t * depth + chosen[slot]], c);
            change[c] += pruned ? -part : part;
          }
        }
      }
      error += dot(change, change);
    }
    return error;
  }

  static constexpr int64_t kColumns = 3;
  int64_t tokens, num_experts, depth;
  Random random;
  std::vector<double> outputs, distances, scores;
  std::vector<int64_t> ranks;
};

}  // namespace

TEST("Gram matrices equal brute force, for every instruction set, dtype and odd size") {
  with_every_isa([](const char* isa) {
    for (const DType dtype : kDTypes) {
      for (const auto& [tokens, experts, hidden, intermediate] :
           std::vector<std::array<int64_t, 4>>{{1, 1, 1, 1}, {3, 2, 17, 5}, {5, 7, 75, 43}, {2, 9, 530, 8}}) {
        const Layer layer(tokens, experts, hidden, intermediate, dtype);
        check_gram(layer, layer.gram(serial()), isa);
      }
    }
  });
}

TEST("Gram matrices have the same bits on any number of threads") {
  with_every_isa([](const char* isa) {
    const Layer layer(90, 5, 70, 66, DType::kBFloat16);
    const std::vector<double> expected = layer.gram(serial());
    check_gram(layer, expected, isa);
    for (const moe_ext::Threads& threads : {serial(3), std_threads(2), std_threads(5)}) {
      CHECK(layer.gram(threads) == expected, isa, ": other bits");
    }
  });
}

TEST("no token has no Gram matrix") { CHECK(Layer(0, 3, 8, 8, DType::kFloat32).gram(serial()).empty(), "a value"); }

TEST("projections equal double-precision brute force, with the same bits on any number of threads") {
  with_every_isa([](const char* isa) {
    for (const DType dtype : kDTypes) {
      for (const auto& [tokens, experts, hidden, intermediate] :
           std::vector<std::array<int64_t, 4>>{{0, 3, 8, 8}, {1, 1, 1, 1}, {3, 2, 17, 5}, {37, 7, 75, 43}}) {
        const Layer layer(tokens, experts, hidden, intermediate, dtype);
        const std::vector<double> expected = layer.projection(serial());
        check_projection(layer, expected, isa);
        for (const moe_ext::Threads& threads : {serial(3), std_threads(2), std_threads(5)}) {
          CHECK(layer.projection(threads) == expected, isa, ": other bits");
        }
      }
    }
  });
}

TEST("subset errors equal brute force and have the same bits on any number of threads") {
  constexpr int64_t kExperts = 6, kDepth = 5, kTopK = 3, kSubsets = 22;  // all that drop two or fewer
  std::unique_ptr<bool[]> keep(new bool[kSubsets * kExperts]);
  int64_t subset = 0;
  for (int64_t a = 0; a < kExperts; ++a) {
    for (int64_t b = a; b < kExperts; ++b, ++subset) {
      for (int64_t e = 0; e < kExperts; ++e) keep[subset * kExperts + e] = e != a && e != b;
    }
  }
  for (int64_t e = 0; e < kExperts; ++e) keep[subset * kExperts + e] = true;
  const float thresholds[kTopK - 1] = {0.8f, 0.5f};
  for (const int64_t tokens : {0, 1, 3000}) {
    const Ranking ranking(tokens, kExperts, kDepth);
    for (const float* skip : {static_cast<const float*>(nullptr), thresholds}) {
      const std::vector<double> got = ranking.errors(keep.get(), kSubsets, kTopK, skip, serial());
      for (int64_t s = 0; s < kSubsets; ++s) {
        const double expected = ranking.brute_force(keep.get() + s * kExperts, kTopK, skip);
        CHECK(std::abs(got[s] - expected) <= 1e-12 * expected + 1e-28, got[s], " is not ", expected, " for subset ", s);
      }
      for (const moe_ext::Threads& threads : {serial(3), std_threads(2), std_threads(5)}) {
        CHECK(ranking.errors(keep.get(), kSubsets, kTopK, skip, threads) == got, "other bits");
      }
    }
  }
}
