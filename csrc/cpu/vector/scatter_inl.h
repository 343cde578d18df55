// Loops::scatter: adds the weighted rows of a down product to their tokens' sums and, when observing, takes the rows'
// squared norms from the same registers.
#pragma once

#include "cpu/vector/loops.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

template <bool kObserve>
static void scatter_rows(const float* y, const float* weights, const int64_t* tokens, int64_t row_count,
                         int64_t columns, float* sums, float* squares) {
  for (int64_t r = 0; r < row_count; ++r, y += kBlockColumns) {
    float* sum = sums + tokens[r] * kBlockColumns;
    const Vec scale = Vec::all(weights[r]);
    Vec square = Vec::zero();
    int64_t i = 0;
    for (; i + Vec::kLanes <= columns; i += Vec::kLanes) {
      const Vec value = Vec::load(y + i);
      fma(scale, value, Vec::load(sum + i)).store(sum + i);
      if (kObserve) square = fma(value, value, square);
    }
    float total = kObserve ? square.sum() : 0.0f;
    for (; i < columns; ++i) {
      sum[i] += weights[r] * y[i];
      if (kObserve) total += y[i] * y[i];
    }
    if (kObserve) squares[r] = total;
  }
}

static void scatter(const float* y, const float* weights, const int64_t* tokens, int64_t row_count, int64_t columns,
                    float* sums, float* squares) {
  if (squares != nullptr) {
    scatter_rows<true>(y, weights, tokens, row_count, columns, sums, squares);
  } else {
    scatter_rows<false>(y, weights, tokens, row_count, columns, sums, nullptr);
  }
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
