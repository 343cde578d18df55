// Quantised weights: packing, and experts on them against double-precision brute force, for every instruction set that
// runs here. Arrays are of exactly the size that is asked for, so that a sanitizer sees any access beyond it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "moe.h"
#include "setting.h"

using namespace setting;
using moe_ext::PackingParams;
using moe_ext::ScaleType;
using moe_ext::WeightFormat;
using moe_ext::WeightType;

namespace {

using Bytes = std::vector<uint8_t>;

struct Format {
  const char* name;
  WeightFormat format;
  bool zeros;
};

const Format kFormats[] = {
    {"int8", {WeightType::kInt8, 0, false, ScaleType::kFloat32}, false},
    {"int4 of 32", {WeightType::kInt4, 32, false, ScaleType::kFloat32}, false},
    {"int4 of 32 with zeros", {WeightType::kInt4, 32, false, ScaleType::kFloat32}, true},
    {"int4 of 64 with zeros", {WeightType::kInt4, 64, false, ScaleType::kBFloat16}, true},
    {"int4 of 128", {WeightType::kInt4, 128, false, ScaleType::kFloat16}, false},
    {"fp8", {WeightType::kFloat8, 0, false, ScaleType::kFloat32}, false},
    {"fp8 in blocks", {WeightType::kFloat8, 128, true, ScaleType::kFloat32}, false},
    {"mxfp4", {WeightType::kMxfp4, 32, false, ScaleType::kE8M0}, false},
};

double e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double size = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return bits < 128 ? size : -size;
}

double e2m1(int bits) {
  const double sizes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return bits < 8 ? sizes[bits] : -sizes[bits - 8];
}

// Random weights of (E, rows, columns), as they are given, as they are packed, and what they stand for.
struct Matrix {
  Matrix(const Format& f, int64_t num_experts, int64_t rows, int64_t columns, Random& random)
      : given(num_experts * rows * moe_ext::cpu::given_row_bytes(f.format.type, columns)),
        packed(num_experts * rows * moe_ext::cpu::packed_row_bytes(f.format.type, columns)),
        scales(num_experts * f.format.scale_count(rows, columns) * f.format.scale_bytes()),
        zeros(f.zeros ? num_experts * f.format.scale_count(rows, columns) : 0),
        weights(num_experts * rows * columns) {
    const WeightFormat& format = f.format;
    for (uint8_t& byte : given) {
      byte = static_cast<uint8_t>(random.bits());
      if (format.type == WeightType::kFloat8 && (byte & 127) == 127) byte = 0;  // no number
    }
    for (uint8_t& zero : zeros) zero = random.bits() & 15;
    const int64_t count = num_experts * format.scale_count(rows, columns);
    std::vector<double> scale_of(count);
    for (int64_t i = 0; i < count; ++i) scale_of[i] = set_scale(format, i, columns, random);
    const PackingParams p{format.type, num_experts * rows, columns};
    moe_ext::cpu::pack_weights(p, given.data(), packed.data(), serial());

    const int64_t groups = format.groups(columns), given_bytes = moe_ext::cpu::given_row_bytes(format.type, columns);
    for (int64_t row = 0; row < num_experts * rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t expert = row / rows, group = format.group_size == 0 ? 0 : column / format.group_size;
        const int64_t of_expert = format.row_blocks ? row % rows / WeightFormat::kRowBlock : row % rows;
        const int64_t scale = expert * format.scale_count(rows, columns) + of_expert * groups + group;
        weights[row * columns + column] = number(f, given.data() + row * given_bytes, column, scale) * scale_of[scale];
      }
    }
  }

  double number(const Format& f, const uint8_t* row, int64_t column, int64_t scale) const {
    const int nibble = row[column / 2] >> (column % 2 * 4) & 15;
    switch (f.format.type) {
      case WeightType::kInt8:
        return static_cast<int8_t>(row[column]);
      case WeightType::kFloat8:
        return e4m3(row[column]);
      case WeightType::kMxfp4:
        return e2m1(nibble);
      default:
        return nibble - (f.zeros ? zeros[scale] : 8);
    }
  }

  // Stores a random scale, of which weights of about 1 / sqrt(columns) come, and returns it.
  double set_scale(const WeightFormat& format, int64_t index, int64_t columns, Random& random) {
    const double largest = format.type == WeightType::kFloat8 ? 448.0 : format.type == WeightType::kInt8 ? 127.0 : 8.0;
    const double wanted = random.between(0.5f, 1.5f) / (largest * std::sqrt(static_cast<double>(columns)));
    if (format.scales == ScaleType::kE8M0) {
      const int exponent = static_cast<int>(std::floor(std::log2(wanted)));
      scales[index] = static_cast<uint8_t>(127 + exponent);
      return std::ldexp(1.0, exponent);
    }
    const DType dtype = format.scales == ScaleType::kFloat32    ? DType::kFloat32
                        : format.scales == ScaleType::kBFloat16 ? DType::kBFloat16
                                                                : DType::kFloat16;
    Array one(dtype, 1);
    one.set(0, static_cast<float>(wanted));
    std::copy(one.bytes().begin(), one.bytes().end(), scales.begin() + index * format.scale_bytes());
    return one[0];
  }

  Bytes given, packed, scales, zeros;
  std::vector<double> weights;  // (E, rows, columns)
};

struct Shape {
  int64_t tokens, num_experts, top_k, hidden, intermediate;
};

// h = max(0, up x)^2; a token's slots are any experts, or empty.
struct Case {
  Case(const Format& f, const Shape& s, DType dtype)
      : format(f.format),
        shape(s),
        dtype(dtype),
        random(static_cast<uint32_t>(s.tokens * 7919 + s.hidden * 31 + s.intermediate)),
        x(random.array(dtype, s.tokens * s.hidden, 2.0f)),
        up(f, s.num_experts, s.intermediate, s.hidden, random),
        down(f, s.num_experts, s.hidden, s.intermediate, random),
        weights(random.array(DType::kFloat32, s.tokens * s.top_k, 1.0f)),
        experts(s.tokens * s.top_k) {
    for (int64_t& expert : experts) expert = random.below(s.num_experts + 1);
  }

  // Operands of bfloat16 dot products are bfloat16; the scales of mxfp4 leave weights exact.
  double weight_rounding() const {
    const bool narrow =
        dtype == DType::kBFloat16 && std::string(moe_ext::cpu::isa_name(moe_ext::cpu::active_isa())) == "avx512_bf16";
    return narrow && format.group_size > 0 && format.type != WeightType::kMxfp4 ? 0x1p-8 : 0.0;
  }

  WeightFormat format;
  Shape shape;
  DType dtype;
  Random random;
  Array x;
  Matrix up, down;
  Array weights;
  std::vector<int64_t> experts;
};

Array run(const Case& c, const Format& f, const Threads& threads) {
  Array out(c.dtype, c.shape.tokens * c.shape.hidden);
  moe_ext::ExpertsParams p{};
  p.x = c.x.data();
  p.gate_up = c.up.packed.data();
  p.down = c.down.packed.data();
  p.format = f.format;
  p.gate_up_scales = c.up.scales.data();
  p.down_scales = c.down.scales.data();
  if (f.zeros) p.gate_up_zeros = c.up.zeros.data();
  if (f.zeros) p.down_zeros = c.down.zeros.data();
  p.formula.activation = moe_ext::Activation::kRelu2;
  p.formula.gated = false;
  p.experts = c.experts.data();
  p.weights = c.weights.data();
  p.out = out.data();
  p.tokens = c.shape.tokens;
  p.num_experts = c.shape.num_experts;
  p.top_k = c.shape.top_k;
  p.hidden = c.shape.hidden;
  p.intermediate = c.shape.intermediate;
  p.dtype = c.dtype;
  p.weights_dtype = DType::kFloat32;
  p.experts_are_int64 = true;
  moe_ext::cpu::experts(p, threads);
  return out;
}

// Sum of products a * b, a weights, and how far float32 can take it away: every product of two rounded factors is
// rounded, and every sum; a weight by a_rounding of it, if that is more.
struct Sum {
  double a_rounding;
  double value = 0.0, size = 0.0, error = 0.0;
  void add(double a, double b, double b_error) {
    value += a * b;
    size += std::abs(a) * (std::abs(b) + b_error);
    error += std::abs(a) * (b_error + a_rounding * (std::abs(b) + b_error));
  }
  double bound(int64_t terms) const { return error + static_cast<double>(terms + 4) * 0x1p-24 * size; }
};

void check_equals_brute_force(const Case& c, const Array& got, const std::string& what) {
  const Shape& s = c.shape;
  std::vector<double> h(s.intermediate), h_error(s.intermediate);
  for (int64_t token = 0; token < s.tokens; ++token) {
    std::vector<double> out(s.hidden), bound(s.hidden);
    for (int64_t slot = token * s.top_k; slot < (token + 1) * s.top_k; ++slot) {
      const int64_t expert = c.experts[slot];
      if (expert == s.num_experts) continue;
      for (int64_t i = 0; i < s.intermediate; ++i) {
        Sum up{c.weight_rounding()};
        const double* row = c.up.weights.data() + (expert * s.intermediate + i) * s.hidden;
        for (int64_t k = 0; k < s.hidden; ++k) up.add(row[k], c.x[token * s.hidden + k], 0.0);
        const double error = up.bound(s.hidden);
        h[i] = up.value < 0 ? 0.0 : up.value * up.value;
        h_error[i] = error * (2 * std::abs(up.value) + error) + 0x1p-22 * h[i];
        if (c.dtype == DType::kBFloat16) h_error[i] += 0x1p-8 * (h[i] + h_error[i]);  // an operand of dot products
      }
      for (int64_t n = 0; n < s.hidden; ++n) {
        Sum down{c.weight_rounding()};
        const double* row = c.down.weights.data() + (expert * s.hidden + n) * s.intermediate;
        for (int64_t i = 0; i < s.intermediate; ++i) down.add(row[i], h[i], h_error[i]);
        out[n] += c.weights[slot] * down.value;
        bound[n] += std::abs(c.weights[slot]) * down.bound(s.intermediate + s.top_k);
      }
    }
    for (int64_t n = 0; n < s.hidden; ++n) {
      const double allowed = bound[n] + rounding(c.dtype) * (std::abs(out[n]) + bound[n]) + smallest(c.dtype);
      const double difference = std::abs(got[token * s.hidden + n] - out[n]);
      CHECK(difference <= allowed, what, " token ", token, " column ", n, ": off by ", difference, " of ", allowed);
    }
  }
}

}  // namespace

TEST("packed weights come back to the bit, on any number of threads") {
  Random random(1);
  for (const Format& f : kFormats) {
    for (const int64_t columns : {0, 1, 2, 63, 64, 65, 127, 128, 129, 300}) {
      const PackingParams p{f.format.type, 700, columns};
      Bytes given(p.rows * moe_ext::cpu::given_row_bytes(p.type, columns)), back(given.size());
      Bytes packed(p.rows * moe_ext::cpu::packed_row_bytes(p.type, columns)), on_threads(packed.size());
      for (uint8_t& byte : given) byte = static_cast<uint8_t>(random.bits());
      moe_ext::cpu::pack_weights(p, given.data(), packed.data(), serial());
      moe_ext::cpu::pack_weights(p, given.data(), on_threads.data(), std_threads(3));
      CHECK(packed == on_threads, f.name, " ", columns);
      moe_ext::cpu::unpack_weights(p, packed.data(), back.data(), std_threads(3));
      CHECK(given == back, f.name, " ", columns);
    }
  }
}

TEST("experts on quantised weights equal brute force, for every instruction set, format, dtype and odd size") {
  const Shape shapes[] = {{9, 3, 2, 75, 139}, {1, 1, 1, 128, 32}, {7, 2, 1, 1100, 33}, {3, 2, 2, 1, 1}};
  with_every_isa([&](const std::string& isa) {
    for (const Format& f : kFormats) {
      for (const Shape& shape : shapes) {
        for (const DType dtype : kDTypes) {
          const Case c(f, shape, dtype);
          check_equals_brute_force(c, run(c, f, serial()), isa + " " + f.name + " " + name_of(dtype));
        }
      }
    }
  });
}

TEST("experts on quantised weights give the same bits on std::threads") {
  with_every_isa([&](const std::string& isa) {
    for (const Format& f : kFormats) {
      const Case c(f, {40, 3, 2, 200, 300}, DType::kBFloat16);
      CHECK(run(c, f, serial()).bytes() == run(c, f, std_threads(3)).bytes(), isa, " ", f.name);
    }
  });
}
