// Loops::gate: h = act(gate) * up. exp is the loops' own, to 2 ulp, so that it has vectors and the same bits with any
// libm; erf has no vectors and is libm's.
#pragma once

#include <math.h>

#include "cpu/vector/loops.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

// e^x to 2 ulp on [-87, 88]; below it stays at e^-87 and above at e^88, which every use here rounds away. NaN stays
// NaN. x = n ln 2 + r with |r| <= ln 2 / 2, then the Taylor polynomial of e^r to degree 7 (remainder under 2^-26 of the
// value).
static inline Vec exp(Vec x) {
  x = x.clamped(-87.0f, 88.0f);
  const Vec n = (x * Vec::all(1.44269504088896341f)).rounded();
  Vec r = fma(n, Vec::all(-0.693145751953125f), x);  // ln 2 in two parts, so that n * high is exact
  r = fma(n, Vec::all(-1.42860682030941723e-6f), r);
  Vec y = Vec::all(1.0f / 5040.0f);
  y = fma(y, r, Vec::all(1.0f / 720.0f));
  y = fma(y, r, Vec::all(1.0f / 120.0f));
  y = fma(y, r, Vec::all(1.0f / 24.0f));
  y = fma(y, r, Vec::all(1.0f / 6.0f));
  y = fma(y, r, Vec::all(0.5f));
  y = fma(y, r, Vec::all(1.0f));
  y = fma(y, r, Vec::all(1.0f));
  return y * n.power_of_two();
}

static inline Vec apply(Activation activation, Vec x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (Vec::all(1.0f) + exp(Vec::zero() - x));
    case Activation::kGeluTanh: {
      const Vec inner = x * fma(Vec::all(0.044715f) * x, x, Vec::all(1.0f)) * Vec::all(0.79788456080286536f);
      const Vec tanh = Vec::all(1.0f) - Vec::all(2.0f) / (exp(inner + inner) + Vec::all(1.0f));
      return Vec::all(0.5f) * x * (Vec::all(1.0f) + tanh);
    }
    case Activation::kGeluErf: {
      float lanes[Vec::kLanes];
      x.store(lanes);
      for (float& lane : lanes) lane = 0.5f * lane * (1.0f + erff(lane * 0.70710678118654752f));
      return Vec::load(lanes);
    }
  }
  return x;
}

template <typename H>
static void gate_typed(Activation activation, const float* y, int64_t row_count, int64_t columns, H* h,
                       int64_t h_stride) {
  constexpr int64_t kHalf = kBlockColumns / 2;
  static_assert(kHalf % Vec::kLanes == 0, "half a block is whole vectors");
  for (int64_t r = 0; r < row_count; ++r, y += kBlockColumns, h += h_stride) {
    if (columns == kHalf) {
      for (int64_t i = 0; i < kHalf; i += Vec::kLanes) {
        (apply(activation, Vec::load(y + i)) * Vec::load(y + kHalf + i)).store(h + i);
      }
      continue;
    }
    float gates[kHalf] = {}, ups[kHalf] = {};
    for (int64_t i = 0; i < columns; ++i) {
      gates[i] = y[i];
      ups[i] = y[columns + i];
    }
    for (int64_t i = 0; i < kHalf; i += Vec::kLanes) {
      (apply(activation, Vec::load(gates + i)) * Vec::load(ups + i)).store(gates + i);
    }
    for (int64_t i = 0; i < columns; ++i) from_float(gates[i], h + i);
  }
}

static void gate(Activation activation, const float* y, int64_t row_count, int64_t columns, DType operand, void* h,
                 int64_t h_stride) {
  if (operand == DType::kBFloat16) {
    gate_typed(activation, y, row_count, columns, static_cast<BFloat16*>(h), h_stride);
  } else {
    gate_typed(activation, y, row_count, columns, static_cast<float*>(h), h_stride);
  }
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
