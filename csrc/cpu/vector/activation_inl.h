// Loops::gate: h = act(gate) * up, and its variants. Where nothing is limited and gate and up stand apart, which most
// models have, vectors go straight from y to h; otherwise a row's gates and ups are laid out first. exp is the loops'
// own, to 2 ulp, so that it has vectors and the same bits with any libm; erf and tanh of caps have no vectors and are
// libm's.
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

template <typename F>
static inline Vec lane_by_lane(Vec x, const F& f) {
  float lanes[Vec::kLanes];
  x.store(lanes);
  for (float& lane : lanes) lane = f(lane);
  return Vec::load(lanes);
}

static inline Vec sigmoid_times(Vec x, Vec by) { return x / (Vec::all(1.0f) + exp(Vec::zero() - by)); }

static inline Vec apply(Activation activation, Vec x) {
  switch (activation) {
    case Activation::kSilu:
      return sigmoid_times(x, x);
    case Activation::kGeluTanh: {
      const Vec inner = x * fma(Vec::all(0.044715f) * x, x, Vec::all(1.0f)) * Vec::all(0.79788456080286536f);
      const Vec tanh = Vec::all(1.0f) - Vec::all(2.0f) / (exp(inner + inner) + Vec::all(1.0f));
      return Vec::all(0.5f) * x * (Vec::all(1.0f) + tanh);
    }
    case Activation::kGeluErf:
      return lane_by_lane(x, [](float lane) { return 0.5f * lane * (1.0f + erff(lane * 0.70710678118654752f)); });
    case Activation::kRelu2: {
      const Vec positive = x.clamped(0.0f, Formula::kNone);
      return positive * positive;
    }
  }
  return x;
}

static inline Vec capped(Vec x, float cap) {
  if (cap == Formula::kNone) return x;
  return lane_by_lane(x, [cap](float lane) { return cap * tanhf(lane / cap); });
}

// h of formulas that limit, cap or scale.
static inline Vec apply(const Formula& f, Vec gate, Vec up) {
  if (!f.gated && f.alpha == 1.0f) return apply(f.activation, up);
  const float lowest = -Formula::kNone;
  if (!f.gated) return sigmoid_times(up, Vec::all(f.alpha) * up);
  if (!f.limit_after) gate = gate.clamped(lowest, f.limit);
  up = up.clamped(-f.limit, f.limit);
  const bool scaled = f.alpha != 1.0f || f.gate_cap != Formula::kNone;
  Vec a = scaled ? sigmoid_times(capped(gate, f.gate_cap), Vec::all(f.alpha) * gate) : apply(f.activation, gate);
  if (f.limit_after) a = a.clamped(lowest, f.limit);
  return a * (capped(up, f.up_cap) + Vec::all(f.up_offset));
}

template <typename H>
static void gate_rows(const Formula& f, const float* y, int64_t row_count, int64_t columns, H* h, int64_t h_stride) {
  const int64_t step = f.gated && f.interleaved ? 2 : 1;
  const int64_t up_at = !f.gated ? 0 : f.interleaved ? 1 : columns;
  for (int64_t r = 0; r < row_count; ++r, y += kBlockColumns, h += h_stride) {
    float gates[kBlockColumns] = {}, ups[kBlockColumns] = {};
    for (int64_t i = 0; i < columns; ++i) {
      gates[i] = y[i * step];
      ups[i] = y[up_at + i * step];
    }
    int64_t i = 0;
    for (; i + Vec::kLanes <= columns; i += Vec::kLanes) {
      apply(f, Vec::load(gates + i), Vec::load(ups + i)).store(h + i);
    }
    if (i == columns) continue;
    apply(f, Vec::load(gates + i), Vec::load(ups + i)).store(gates + i);  // beyond the columns there are zeros
    for (; i < columns; ++i) from_float(gates[i], h + i);
  }
}

// h = act(gate) * up of half a block's columns.
template <typename H>
static void gate_half_block(Activation activation, const float* y, int64_t row_count, H* h, int64_t h_stride) {
  constexpr int64_t kHalf = kBlockColumns / 2;
  static_assert(kHalf % Vec::kLanes == 0, "half a block is whole vectors");
  for (int64_t r = 0; r < row_count; ++r, y += kBlockColumns, h += h_stride) {
    for (int64_t i = 0; i < kHalf; i += Vec::kLanes) {
      (apply(activation, Vec::load(y + i)) * Vec::load(y + kHalf + i)).store(h + i);
    }
  }
}

template <typename H>
static void gate_typed(const Formula& f, const float* y, int64_t row_count, int64_t columns, H* h, int64_t h_stride) {
  if (f.gated && !f.interleaved && f.unlimited() && columns == kBlockColumns / 2) {
    gate_half_block(f.activation, y, row_count, h, h_stride);
  } else {
    gate_rows(f, y, row_count, columns, h, h_stride);
  }
}

static void gate(const Formula& formula, const float* y, int64_t row_count, int64_t columns, DType operand, void* h,
                 int64_t h_stride) {
  if (operand == DType::kBFloat16) {
    gate_typed(formula, y, row_count, columns, static_cast<BFloat16*>(h), h_stride);
  } else {
    gate_typed(formula, y, row_count, columns, static_cast<float*>(h), h_stride);
  }
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
