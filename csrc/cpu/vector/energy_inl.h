// Loops::energy: adds the weighted squares of a block of activations to its channels' sums, in float64.
//
// A column has one sum, which walks the rows in order: its bits depend neither on the block's width nor on threads. The
// rows were just written by Loops::gate and come from L1 or L2. Cost: 2 FLOPs an element, to the 4 H of its products.
#pragma once

#include "cpu/numeric.h"
#include "cpu/vector/loops.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr int64_t kEnergyLanes = 8;
typedef double EnergySums __attribute__((vector_size(kEnergyLanes * sizeof(double))));

template <typename H>
static void energy_typed(const H* h, int64_t h_stride, const double* weights, int64_t row_count, int64_t columns,
                         double* sums) {
  int64_t i = 0;
  for (; i + kEnergyLanes <= columns; i += kEnergyLanes) {
    EnergySums sum = {};
    for (int64_t r = 0; r < row_count; ++r) {
      if (weights[r] < 0.0) continue;
      const H* row = h + r * h_stride + i;
      EnergySums value;
      for (int64_t lane = 0; lane < kEnergyLanes; ++lane) value[lane] = to_float(row[lane]);
      sum += weights[r] * (value * value);
    }
    for (int64_t lane = 0; lane < kEnergyLanes; ++lane) sums[i + lane] += sum[lane];
  }
  for (; i < columns; ++i) {
    double sum = 0.0;
    for (int64_t r = 0; r < row_count; ++r) {
      const double value = to_float(h[r * h_stride + i]);
      if (weights[r] >= 0.0) sum += weights[r] * (value * value);
    }
    sums[i] += sum;
  }
}

static void energy(DType operand, const void* h, int64_t h_stride, const double* weights, int64_t row_count,
                   int64_t columns, double* sums) {
  if (operand == DType::kBFloat16) {
    energy_typed(static_cast<const BFloat16*>(h), h_stride, weights, row_count, columns, sums);
  } else {
    energy_typed(static_cast<const float*>(h), h_stride, weights, row_count, columns, sums);
  }
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
