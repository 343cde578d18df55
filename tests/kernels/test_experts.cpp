// experts against double-precision brute force, for every instruction set that runs here.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "moe.h"
#include "setting.h"

using namespace setting;
using moe_ext::Activation;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr Activation kActivations[] = {Activation::kSilu, Activation::kGeluErf, Activation::kGeluTanh};

struct Shape {
  int64_t tokens, num_experts, top_k, hidden, intermediate;
};

// Random inputs; every slot's expert is any of [0, E], so a token may have one twice, and some slots are empty.
struct Case {
  Case(const Shape& s, DType dtype, Activation activation = Activation::kSilu, DType weights_dtype = DType::kFloat32)
      : shape(s),
        dtype(dtype),
        weights_dtype(weights_dtype),
        activation(activation),
        random(static_cast<uint32_t>(s.tokens * 7919 + s.num_experts * 613 + s.hidden * 31 + s.intermediate)),
        x(random.array(dtype, s.tokens * s.hidden, 2.0f)),
        gate_up(random.array(dtype, s.num_experts * 2 * s.intermediate * s.hidden, scale(s.hidden))),
        down(random.array(dtype, s.num_experts * s.hidden * s.intermediate, scale(s.intermediate))),
        weights(random.array(weights_dtype, s.tokens * s.top_k, 1.0f)),
        experts(s.tokens * s.top_k),
        counted(new bool[static_cast<size_t>(s.tokens)]) {
    for (int64_t& expert : experts) expert = random.below(s.num_experts + 1);
    for (int64_t token = 0; token < s.tokens; ++token) counted[token] = random.below(3) != 0;
  }

  static float scale(int64_t terms) { return 2.0f / std::sqrt(static_cast<float>(terms)); }

  Shape shape;
  DType dtype, weights_dtype;
  Activation activation;
  Random random;
  Array x;                          // (T, H)
  Array gate_up;                    // (E, 2 I, H)
  Array down;                       // (E, H, I)
  Array weights;                    // (T, K)
  std::vector<int64_t> experts;     // (T, K)
  std::unique_ptr<bool[]> counted;  // (T)
};

struct Result {
  Array out;                    // (T, H)
  std::vector<double> moments;  // (E, 3, 3)
  std::vector<double> pairs;    // (E, E)

  bool same_bits(const Result& other) const {
    return out.bytes() == other.out.bytes() &&
           std::memcmp(moments.data(), other.moments.data(), moments.size() * sizeof(double)) == 0 &&
           std::memcmp(pairs.data(), other.pairs.data(), pairs.size() * sizeof(double)) == 0;
  }
};

struct Options {
  bool observe = true;
  bool masked = false;
  bool int64_experts = true;
  double moments_before = 0.0;
};

Options unobserved() {
  Options options;
  options.observe = false;
  return options;
}

Options masked(double moments_before = 0.0) {
  Options options;
  options.masked = true;
  options.moments_before = moments_before;
  return options;
}

Options with_int32_experts() {
  Options options;
  options.int64_experts = false;
  return options;
}

Result run(const Case& c, const Threads& threads, const Options& options = {}) {
  Result result{Array(c.dtype, c.shape.tokens * c.shape.hidden),
                std::vector<double>(c.shape.num_experts * 9, options.moments_before),
                std::vector<double>(c.shape.num_experts * c.shape.num_experts, options.moments_before)};
  for (int64_t i = 0; i < result.out.size(); ++i) result.out.set(i, kNan);  // what is not written will be noticed
  const std::vector<int32_t> narrow(c.experts.begin(), c.experts.end());
  moe_ext::ExpertsParams p{};
  p.x = c.x.data();
  p.gate_up = c.gate_up.data();
  p.down = c.down.data();
  p.experts = options.int64_experts ? static_cast<const void*>(c.experts.data()) : narrow.data();
  p.weights = c.weights.data();
  p.out = result.out.data();
  p.moments = options.observe ? result.moments.data() : nullptr;
  p.pairs = options.observe ? result.pairs.data() : nullptr;
  p.counted = options.masked ? c.counted.get() : nullptr;
  p.tokens = c.shape.tokens;
  p.num_experts = c.shape.num_experts;
  p.top_k = c.shape.top_k;
  p.hidden = c.shape.hidden;
  p.intermediate = c.shape.intermediate;
  p.dtype = c.dtype;
  p.weights_dtype = c.weights_dtype;
  p.formula.activation = c.activation;
  p.experts_are_int64 = options.int64_experts;
  moe_ext::cpu::experts(p, threads);
  return result;
}

double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0 + std::exp(-x));
    case Activation::kGeluErf:
      return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
    default:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
  }
}

struct Reference {
  std::vector<double> out;              // (T, H)
  std::vector<double> bound;            // (T, H) sums of absolute values, through which every rounding error passes
  std::vector<double> h_bound;          // (T, H) likewise of |weight down h|: what a rounding of h passes through
  std::vector<double> moments;          // (E, 3, 3)
  std::vector<double> moments_h_bound;  // (E, 3, 3) likewise for the moments
  std::vector<double> shares;           // (T K) weight * norm of a slot that counts
  std::vector<double> shares_h_bound;   // (T K) likewise
};

Reference brute_force(const Case& c, bool masked) {
  const auto [tokens, num_experts, top_k, hidden, intermediate] = c.shape;
  Reference r{std::vector<double>(tokens * hidden), std::vector<double>(tokens * hidden),
              std::vector<double>(tokens * hidden), std::vector<double>(num_experts * 9),
              std::vector<double>(num_experts * 9), std::vector<double>(tokens * top_k),
              std::vector<double>(tokens * top_k)};
  std::vector<double> h(intermediate), h_bound(intermediate);
  for (int64_t slot = 0; slot < tokens * top_k; ++slot) {
    const int64_t token = slot / top_k, expert = c.experts[slot];
    if (expert == num_experts) continue;
    const double weight = c.weights[slot];
    for (int64_t i = 0; i < intermediate; ++i) {
      double gate = 0.0, up = 0.0, gate_bound = 0.0, up_bound = 0.0;
      for (int64_t j = 0; j < hidden; ++j) {
        const double x = c.x[token * hidden + j];
        const double gate_term = x * c.gate_up[(expert * 2 * intermediate + i) * hidden + j];
        const double up_term = x * c.gate_up[((expert * 2 + 1) * intermediate + i) * hidden + j];
        gate += gate_term;
        up += up_term;
        gate_bound += std::fabs(gate_term);
        up_bound += std::fabs(up_term);
      }
      h[i] = activate(c.activation, gate) * up;
      h_bound[i] = gate_bound * up_bound;
    }
    double squares = 0.0, squares_h_bound = 0.0;
    for (int64_t i = 0; i < hidden; ++i) {
      double y = 0.0, y_bound = 0.0, y_h_bound = 0.0;
      for (int64_t j = 0; j < intermediate; ++j) {
        const double element = c.down[(expert * hidden + i) * intermediate + j];
        y += element * h[j];
        y_bound += std::fabs(element) * h_bound[j];
        y_h_bound += std::fabs(element * h[j]);
      }
      r.out[token * hidden + i] += weight * y;
      r.bound[token * hidden + i] += std::fabs(weight) * y_bound;
      r.h_bound[token * hidden + i] += std::fabs(weight) * y_h_bound;
      squares += y * y;
      squares_h_bound += y_h_bound * y_h_bound;
    }
    if (masked && !c.counted[token]) continue;
    r.shares[slot] = weight * std::sqrt(squares);
    r.shares_h_bound[slot] = std::fabs(weight) * std::sqrt(squares_h_bound);
    for (int a = 0; a < 3; ++a) {
      for (int b = 0; b < 3; ++b) {
        r.moments[expert * 9 + a * 3 + b] += std::pow(weight, a) * std::pow(squares, b / 2.0);
        // A relative change d of every h moves the norm by at most d sqrt(squares_h_bound), its square by twice that
        // times the norm.
        const double moved = b == 0 ? 0.0 : b == 1 ? 1.0 : 2.01 * std::sqrt(squares);
        r.moments_h_bound[expert * 9 + a * 3 + b] +=
            std::pow(std::fabs(weight), a) * moved * std::sqrt(squares_h_bound);
      }
    }
  }
  // A sum of n float32 terms in any order errs by at most n 2^-24 of the sum of absolute values.
  const double terms = static_cast<double>(2 * hidden + intermediate + top_k + 16);
  for (double& bound : r.bound) bound *= terms * 0x1p-24;
  return r;
}

// What rounding h to the operands' type may change it by, relative: only avx512_bf16 does so.
double h_rounding(DType dtype, const std::string& isa) {
  return isa == "avx512_bf16" && dtype == DType::kBFloat16 ? rounding(dtype) : 0.0;
}

void check_out(const Case& c, const Result& got, const Reference& expected, const std::string& isa) {
  for (int64_t i = 0; i < got.out.size(); ++i) {
    const double allowed = expected.bound[i] + h_rounding(c.dtype, isa) * expected.h_bound[i] + smallest(c.dtype) +
                           rounding(c.dtype) * (std::fabs(expected.out[i]) + expected.bound[i] +
                                                h_rounding(c.dtype, isa) * expected.h_bound[i]);
    CHECK(std::fabs(got.out[i] - expected.out[i]) <= allowed, isa, " ", name_of(c.dtype), " T ", c.shape.tokens,
          ": out[", i, "] is ", got.out[i], ", expected ", expected.out[i], " within ", allowed);
  }
}

void check_moments(const Case& c, const Result& got, const Reference& expected, double before, const std::string& isa) {
  for (size_t i = 0; i < got.moments.size(); ++i) {
    const double wanted = before + expected.moments[i];
    // Norms are float32 sums of squares of float32 outputs. Weights have both signs, so that sums may cancel.
    const double allowed = 1e-5 * (std::fabs(wanted) + 1.0) + h_rounding(c.dtype, isa) * expected.moments_h_bound[i];
    CHECK(std::fabs(got.moments[i] - wanted) <= allowed, isa, " ", name_of(c.dtype), ": moments[", i / 9, ", ",
          i % 9 / 3, ", ", i % 3, "] is ", got.moments[i], ", expected ", wanted);
  }
}

void check_pairs(const Case& c, const Result& got, const Reference& expected, double before, const std::string& isa) {
  const int64_t num_experts = c.shape.num_experts, top_k = c.shape.top_k;
  std::vector<double> wanted(num_experts * num_experts, before), bound(num_experts * num_experts);
  for (int64_t one = 0; one < c.shape.tokens * top_k; ++one) {
    for (int64_t other = one / top_k * top_k; other < (one / top_k + 1) * top_k; ++other) {
      if (c.experts[one] == num_experts || c.experts[other] == num_experts) continue;
      const int64_t i = c.experts[one] * num_experts + c.experts[other];
      wanted[i] += expected.shares[one] * expected.shares[other];
      bound[i] += 1.01 * (std::fabs(expected.shares[one]) * expected.shares_h_bound[other] +
                          std::fabs(expected.shares[other]) * expected.shares_h_bound[one]);
    }
  }
  for (int64_t i = 0; i < num_experts * num_experts; ++i) {
    const double allowed = 1e-5 * (std::fabs(wanted[i]) + 1.0) + h_rounding(c.dtype, isa) * bound[i];
    CHECK(std::fabs(got.pairs[i] - wanted[i]) <= allowed, isa, " ", name_of(c.dtype), ": pairs[", i / num_experts, ", ",
          i % num_experts, "] is ", got.pairs[i], ", expected ", wanted[i]);
    CHECK(got.pairs[i] == got.pairs[i % num_experts * num_experts + i / num_experts], "pairs are not symmetric");
  }
}

const std::vector<Shape> kOddShapes = {
    {1, 1, 1, 1, 1},    {1, 4, 2, 8, 16},   {2, 3, 1, 17, 5},    {7, 2, 3, 31, 33},
    {13, 3, 2, 75, 43}, {40, 2, 2, 64, 97}, {3, 2, 1, 2081, 37}, {9, 2, 2, 38, 2500},  // several chunks of a row
};

}  // namespace

TEST("experts, moments and pairs equal brute force, for every instruction set, dtype, activation and odd size") {
  with_every_isa([](const char* isa) {
    for (const DType dtype : kDTypes) {
      for (const Activation activation : kActivations) {
        for (const Shape& shape : kOddShapes) {
          const Case c(shape, dtype, activation);
          const Reference expected = brute_force(c, false);
          const Result got = run(c, serial());
          check_out(c, got, expected, isa);
          check_moments(c, got, expected, 0.0, isa);
          check_pairs(c, got, expected, 0.0, isa);
        }
      }
    }
  });
}

TEST("experts on std::threads equals brute force") {
  with_every_isa([](const char* isa) {
    for (const DType dtype : kDTypes) {
      const Case c({90, 3, 2, 70, 66}, dtype);
      const Reference expected = brute_force(c, true);
      const Result got = run(c, std_threads(3), masked());
      check_out(c, got, expected, isa);
      check_moments(c, got, expected, 0.0, isa);
    }
  });
}

TEST("only counted tokens enter the moments and pairs, which are added to") {
  with_every_isa([](const char* isa) {
    const Case c({50, 3, 2, 20, 24}, DType::kFloat32);
    const Result got = run(c, serial(), masked(7.5));
    check_moments(c, got, brute_force(c, true), 7.5, isa);
    check_pairs(c, got, brute_force(c, true), 7.5, isa);
  });
}

TEST("with no token counted, the moments stay as they were") {
  Case c({5, 3, 2, 20, 24}, DType::kFloat32);
  for (int64_t token = 0; token < 5; ++token) c.counted[token] = false;
  const Result got = run(c, serial(), masked(7.5));
  for (const double moment : got.moments) CHECK(moment == 7.5, moment);
}

TEST("observing does not change a bit of the output") {
  with_every_isa([](const char* isa) {
    for (const DType dtype : kDTypes) {
      const Case c({23, 3, 2, 45, 37}, dtype);
      CHECK(run(c, serial()).out.bytes() == run(c, serial(), unobserved()).out.bytes(), isa, " ", name_of(dtype));
    }
  });
}

TEST("int32 and int64 expert indices give the same bits") {
  const Case c({23, 3, 2, 45, 37}, DType::kBFloat16);
  CHECK(run(c, serial()).same_bits(run(c, serial(), with_int32_experts())), "they differ");
}

TEST("weights in the dtype of x give the same bits as the same values in float32") {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const Case narrow({23, 3, 2, 45, 37}, dtype, Activation::kSilu, dtype);
    Case wide({23, 3, 2, 45, 37}, dtype);
    for (int64_t i = 0; i < wide.weights.size(); ++i) wide.weights.set(i, narrow.weights[i]);
    CHECK(run(narrow, serial()).same_bits(run(wide, serial())), name_of(dtype));
  }
}

TEST("zero tokens and zero slots are no work and leave the moments as they were") {
  for (const DType dtype : kDTypes) {
    for (const Shape& shape : {Shape{0, 3, 2, 8, 8}, Shape{4, 3, 0, 8, 8}}) {
      const Case c(shape, dtype);
      const Result got = run(c, std_threads(2), masked(7.5));
      for (int64_t i = 0; i < got.out.size(); ++i) CHECK(got.out[i] == 0.0f, got.out[i]);
      for (const double moment : got.moments) CHECK(moment == 7.5, moment);
    }
  }
}

TEST("a token whose slots are all empty gives zeros, and an empty slot's weight is not read") {
  Case c({4, 3, 2, 16, 16}, DType::kFloat32);
  for (size_t slot = 0; slot < c.experts.size(); ++slot) c.experts[slot] = slot / 2 == 2 ? 3 : slot % 3;
  c.weights.set(4, kNan);
  c.weights.set(5, kNan);
  const Result got = run(c, serial());
  for (int64_t i = 0; i < got.out.size(); ++i) {
    CHECK(i / 16 == 2 ? got.out[i] == 0.0f : std::isfinite(got.out[i]), "out[", i, "] is ", got.out[i]);
  }
  for (const double moment : got.moments) CHECK(std::isfinite(moment), moment);
}

TEST("experts without tokens are not read") {
  Case c({37, 4, 1, 24, 40}, DType::kFloat32);
  std::fill(c.experts.begin(), c.experts.end(), 2);
  const Reference expected = brute_force(c, false);
  for (int64_t expert : {0, 1, 3}) {
    for (int64_t i = 0; i < 24 * 40; ++i) {
      c.gate_up.set(expert * 2 * 24 * 40 + i, kNan);
      c.gate_up.set((expert * 2 + 1) * 24 * 40 + i, kNan);
      c.down.set(expert * 24 * 40 + i, kNan);
    }
  }
  check_out(c, run(c, serial()), expected, "float32");
}

TEST("a NaN in x reaches its own row only") {
  with_every_isa([](const char* isa) {
    for (const DType dtype : kDTypes) {
      Case c({12, 2, 1, 40, 36}, dtype);
      for (int64_t& expert : c.experts) expert %= 2;
      c.x.set(4 * 40 + 7, kNan);
      const Result got = run(c, serial());
      for (int64_t i = 0; i < got.out.size(); ++i) {
        CHECK(std::isnan(got.out[i]) == (i / 40 == 4), isa, " ", name_of(dtype), " out[", i, "] is ", got.out[i]);
      }
    }
  });
}

TEST("very large gates neither overflow the activation nor lose its limits") {
  with_every_isa([](const char* isa) {
    for (const Activation activation : kActivations) {
      for (const float gate : {1e4f, -1e4f, 100.0f, -100.0f, 20.0f, -20.0f}) {
        Case c({1, 1, 1, 1, 1}, DType::kFloat32, activation);
        c.experts[0] = 0;
        c.x.set(0, 1.0f);
        c.gate_up.set(0, gate);
        c.gate_up.set(1, 1.0f);
        c.down.set(0, 1.0f);
        c.weights.set(0, 1.0f);
        const float expected = gate > 0 ? gate : 0.0f;
        const float got = run(c, serial()).out[0];
        CHECK(std::fabs(got - expected) <= 1e-6f * std::fabs(gate), isa, " act(", gate, ") is ", got);
      }
    }
  });
}

TEST("experts gives the same bits for 1, 2 and 7 threads and for a pool that gives fewer than it has") {
  with_every_isa([](const char* isa) {
    for (const DType dtype : kDTypes) {
      const Case c({900, 4, 2, 160, 75}, dtype);  // enough for 7 threads in every pass
      const Result expected = run(c, serial());
      for (const Threads& threads : {std_threads(2), std_threads(7), serial(7)}) {
        CHECK(run(c, threads).same_bits(expected), isa, " ", name_of(dtype), " ", threads.count, " threads");
      }
    }
  });
}

TEST("a token has the same bits alone as in any batch") {
  with_every_isa([](const char* isa) {
    for (const DType dtype : kDTypes) {
      // Whole vectors, and every remainder of them in H and I, in tiles of every height.
      std::vector<Shape> shapes = {{31, 3, 2, 64, 48}, {31, 3, 2, 75, 43}};
      for (int64_t i = 1; i < 32; ++i) shapes.push_back({1 + i * 5 % 33, 1 + i % 3, 1, 32 + i, 63 - i});
      for (const Shape& shape : shapes) {
        const Case c(shape, dtype);
        const Result batch = run(c, serial());
        for (int64_t token = 0; token < shape.tokens; ++token) {
          Case one(c.shape, dtype);
          one.shape.tokens = 1;
          one.x = Array(dtype, shape.hidden);
          one.weights = Array(DType::kFloat32, shape.top_k);
          one.experts.assign(c.experts.begin() + token * shape.top_k, c.experts.begin() + (token + 1) * shape.top_k);
          for (int64_t i = 0; i < shape.hidden; ++i) one.x.set(i, c.x[token * shape.hidden + i]);
          for (int64_t i = 0; i < shape.top_k; ++i) one.weights.set(i, c.weights[token * shape.top_k + i]);
          const Result alone = run(one, serial());
          for (int64_t i = 0; i < shape.hidden; ++i) {
            CHECK(alone.out[i] == batch.out[token * shape.hidden + i], isa, " ", name_of(dtype), " H ", shape.hidden,
                  ": token ", token, " column ", i, " is ", alone.out[i], " alone, ",
                  batch.out[token * shape.hidden + i], " in the batch");
          }
        }
      }
    }
  });
}
