// Where the weights and biases of an expert lie that a task multiplies: rows, or columns where they are transposed.
#pragma once

#include <cstdint>

#include "cpu/numeric.h"
#include "cpu/vector/loops.h"
#include "moe.h"

namespace moe_ext::cpu {

inline constexpr WeightRows kNoWeights{};

// Those of some columns of h, `count` from `first` on: gate rows and then as many up rows, or both in turn, or up
// alone.
inline WeightRows gate_up_rows(const LayerParams& p, int64_t expert, int64_t first, int64_t count) {
  const Formula& f = p.formula;
  const int64_t of_expert = f.rows(p.intermediate), row = f.gated && f.interleaved ? 2 * first : first;
  const int64_t weights = expert * of_expert * p.hidden, step = f.transposed ? 1 : p.hidden;
  return {offset(p.gate_up, p.dtype, weights + row * step),
          offset(p.gate_up, p.dtype, weights + (row + p.intermediate) * step),
          f.gated && f.interleaved ? 2 * count : count};
}

inline WeightRows gate_up_bias(const LayerParams& p, int64_t expert, int64_t first, int64_t count) {
  if (p.gate_up_bias == nullptr) return kNoWeights;
  const Formula& f = p.formula;
  const int64_t row = expert * f.rows(p.intermediate) + (f.gated && f.interleaved ? 2 * first : first);
  return {offset(p.gate_up_bias, p.dtype, row), offset(p.gate_up_bias, p.dtype, row + p.intermediate),
          f.gated && f.interleaved ? 2 * count : count};
}

// What Product::transposed is for gate_up.
inline int64_t gate_up_stride(const LayerParams& p) {
  return p.formula.transposed ? p.formula.rows(p.intermediate) : 0;
}

// Those of up to a block of the expert's output columns, from `first` on.
inline WeightRows down_rows(const LayerParams& p, int64_t expert, int64_t first) {
  const int64_t step = p.formula.transposed ? 1 : p.intermediate;
  return {offset(p.down, p.dtype, expert * p.hidden * p.intermediate + first * step), nullptr, kBlockColumns};
}

inline WeightRows down_bias(const LayerParams& p, int64_t expert, int64_t first) {
  if (p.down_bias == nullptr) return kNoWeights;
  return {offset(p.down_bias, p.dtype, expert * p.hidden + first), nullptr, kBlockColumns};
}

inline int64_t down_stride(const LayerParams& p) { return p.formula.transposed ? p.hidden : 0; }

}  // namespace moe_ext::cpu
