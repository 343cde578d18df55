// Loops::project: the scalar product of every row of a down product with the same columns of its token's g.
//
// A product of two float32 is exact in float64; a row has kProjectLanes partial sums, added in a fixed order, and then
// what is left of its columns: the bits are the same for any instruction set, given y. The rows were just written by
// Loops::multiply. Cost: 2 FLOPs an element, to the 2 I of its products.
#pragma once

#include "cpu/numeric.h"
#include "cpu/vector/loops.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr int64_t kProjectLanes = 8;
typedef double ProjectSums __attribute__((vector_size(kProjectLanes * sizeof(double))));
typedef float ProjectFloats __attribute__((vector_size(kProjectLanes * sizeof(float))));

static void project(const float* y, const float* g, int64_t g_stride, int64_t row_count, int64_t columns,
                    double* sums) {
  for (int64_t r = 0; r < row_count; ++r, y += kBlockColumns, g += g_stride) {
    ProjectSums partial = {};
    int64_t i = 0;
    for (; i + kProjectLanes <= columns; i += kProjectLanes) {
      ProjectFloats left, right;
      memcpy(&left, y + i, sizeof(left));
      memcpy(&right, g + i, sizeof(right));
      partial += __builtin_convertvector(left, ProjectSums) * __builtin_convertvector(right, ProjectSums);
    }
    double sum = ((partial[0] + partial[1]) + (partial[2] + partial[3])) +
                 ((partial[4] + partial[5]) + (partial[6] + partial[7]));
    for (; i < columns; ++i) sum += static_cast<double>(y[i]) * static_cast<double>(g[i]);
    sums[r] = sum;
  }
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
