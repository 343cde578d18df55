// Where the weights, their scales and the biases of an expert lie that a task multiplies: rows, or columns where they
// are transposed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/numeric.h"
#include "cpu/vector/loops.h"
#include "moe.h"

namespace moe_ext::cpu {

inline constexpr WeightRows kNoWeights{};

inline int64_t row_bytes(const LayerParams& p, int64_t columns) {
  return p.format.quantised() ? packed_row_bytes(p.format.type, columns) : columns * element_size(p.dtype);
}

// An expert's part of the scales or zeros of a matrix of so many rows and columns for each; null if there are none.
inline const char* scales_of(const LayerParams& p, const void* scales, int64_t expert, int64_t rows, int64_t columns) {
  if (scales == nullptr) return nullptr;
  return static_cast<const char*>(scales) + expert * p.format.scale_count(rows, columns) * p.format.scale_bytes();
}

inline const uint8_t* zeros_of(const LayerParams& p, const uint8_t* zeros, int64_t expert, int64_t rows,
                               int64_t columns) {
  return zeros == nullptr ? nullptr : zeros + expert * p.format.scale_count(rows, columns);
}

// The layer of one of its experts.
inline LayerParams only_expert(const LayerParams& p, int64_t expert) {
  LayerParams one = p;
  const int64_t rows = p.formula.rows(p.intermediate);
  one.num_experts = 1;
  one.gate_up = static_cast<const char*>(p.gate_up) + expert * rows * row_bytes(p, p.hidden);
  one.down = static_cast<const char*>(p.down) + expert * p.hidden * row_bytes(p, p.intermediate);
  one.gate_up_scales = scales_of(p, p.gate_up_scales, expert, rows, p.hidden);
  one.down_scales = scales_of(p, p.down_scales, expert, p.hidden, p.intermediate);
  one.gate_up_zeros = zeros_of(p, p.gate_up_zeros, expert, rows, p.hidden);
  one.down_zeros = zeros_of(p, p.down_zeros, expert, p.hidden, p.intermediate);
  if (p.gate_up_bias != nullptr) one.gate_up_bias = offset(p.gate_up_bias, p.dtype, expert * rows);
  if (p.down_bias != nullptr) one.down_bias = offset(p.down_bias, p.dtype, expert * p.hidden);
  return one;
}

// How the rows of the layer's two matrices lie, for Product::quantised.
class QuantisedLayer {
 public:
  explicit QuantisedLayer(const LayerParams& p)
      : quantised_(p.format.quantised()), gate_up_(rows_of(p, p.hidden)), down_(rows_of(p, p.intermediate)) {
    if (!quantised_) return;
    unpacked_bytes_ = kUnpackedBytes;
    if (!p.int8_activations) return;
    const int64_t groups = std::max(gate_up_.groups, down_.groups);
    unpacked_bytes_ =
        std::max<int64_t>(unpacked_bytes_, kByteTileColumns * widened_scales(groups) * element_size(DType::kFloat32));
  }

  const QuantisedRows* gate_up() const { return quantised_ ? &gate_up_ : nullptr; }
  const QuantisedRows* down() const { return quantised_ ? &down_ : nullptr; }
  // Of each thread.
  int64_t unpacked_bytes() const { return unpacked_bytes_; }

 private:
  static QuantisedRows rows_of(const LayerParams& p, int64_t columns) {
    return {p.format, row_bytes(p, columns), p.format.groups(columns)};
  }

  bool quantised_;
  QuantisedRows gate_up_, down_;
  int64_t unpacked_bytes_ = 0;
};

// Those of some columns of h, `count` from `first` on: gate rows and then as many up rows, or both in turn, or up
// alone.
inline WeightRows gate_up_rows(const LayerParams& p, int64_t expert, int64_t first, int64_t count) {
  const Formula& f = p.formula;
  const int64_t of_expert = f.rows(p.intermediate), row = f.gated && f.interleaved ? 2 * first : first;
  const int64_t bytes = row_bytes(p, p.hidden), step = f.transposed ? element_size(p.dtype) : bytes;
  const char* weights = static_cast<const char*>(p.gate_up) + expert * of_expert * bytes;
  return {weights + row * step,
          weights + (row + p.intermediate) * step,
          f.gated && f.interleaved ? 2 * count : count,
          row,
          row + p.intermediate,
          scales_of(p, p.gate_up_scales, expert, of_expert, p.hidden),
          zeros_of(p, p.gate_up_zeros, expert, of_expert, p.hidden)};
}

inline WeightRows gate_up_bias(const LayerParams& p, int64_t expert, int64_t first, int64_t count) {
  if (p.gate_up_bias == nullptr) return kNoWeights;
  const Formula& f = p.formula;
  const int64_t row = expert * f.rows(p.intermediate) + (f.gated && f.interleaved ? 2 * first : first);
  WeightRows bias{};
  bias.first = offset(p.gate_up_bias, p.dtype, row);
  bias.second = offset(p.gate_up_bias, p.dtype, row + p.intermediate);
  bias.split = f.gated && f.interleaved ? 2 * count : count;
  return bias;
}

// What Product::transposed is for gate_up.
inline int64_t gate_up_stride(const LayerParams& p) {
  return p.formula.transposed ? p.formula.rows(p.intermediate) : 0;
}

// Those of up to a block of the expert's output columns, from `first` on.
inline WeightRows down_rows(const LayerParams& p, int64_t expert, int64_t first) {
  const int64_t bytes = row_bytes(p, p.intermediate);
  const int64_t step = p.formula.transposed ? element_size(p.dtype) : bytes;
  return {static_cast<const char*>(p.down) + expert * p.hidden * bytes + first * step,
          nullptr,
          kBlockColumns,
          first,
          0,
          scales_of(p, p.down_scales, expert, p.hidden, p.intermediate),
          zeros_of(p, p.down_zeros, expert, p.hidden, p.intermediate)};
}

inline WeightRows down_bias(const LayerParams& p, int64_t expert, int64_t first) {
  if (p.down_bias == nullptr) return kNoWeights;
  WeightRows bias{};
  bias.first = offset(p.down_bias, p.dtype, expert * p.hidden + first);
  bias.split = kBlockColumns;
  return bias;
}

inline int64_t down_stride(const LayerParams& p) { return p.formula.transposed ? p.hidden : 0; }

}  // namespace moe_ext::cpu
