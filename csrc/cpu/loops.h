// The hot loops of the experts operators, compiled once per instruction set (loops_*.cpp) and reached through a table.
//
// All of them are built on one tile: a few float32 activation rows times a few weight rows, both contiguous along the
// reduction, so weights are read as transformers stores them, once per block of rows that fits the cache. Every output
// element has one vector accumulator that walks the reduction in order, whatever the tile it falls in: a token's result
// has the same bits in any batch and for any number of threads.
#pragma once

#include <stdint.h>

#include "moe.h"

namespace moe_ext::cpu {

// Weight rows that one task works on: 32 rows of 4096 bfloat16 are 256 KiB, a quarter of a usual L2.
inline constexpr int64_t kColumnBlock = 32;

struct Loops {
  // dst[i] = float(src[i]), i < n; src of `dtype`.
  void (*widen)(DType dtype, const void* src, float* dst, int64_t n);

  // h[r, i] = act(rows[r] . gate[i]) * (rows[r] . up[i])  for r < row_count, i < columns <= kColumnBlock.
  // rows[r] (hidden) float32; gate, up (columns, hidden) of `dtype`; h float32 with stride h_stride.
  void (*gate_up)(DType dtype, Activation activation, const float* const* rows, int64_t row_count, const void* gate,
                  const void* up, int64_t columns, int64_t hidden, float* h, int64_t h_stride);

  // y[r, i] = h[r] . down[i]  for r < row_count, i < columns <= kColumnBlock.
  // h (row_count, intermediate), y float32 with stride y_stride; down (columns, intermediate) of `dtype`.
  void (*down)(DType dtype, const float* h, int64_t row_count, const void* down, int64_t columns, int64_t intermediate,
               float* y, int64_t y_stride);

  // sum[i] += weight * y[i]; returns the sum of y[i]^2 if `observe`, else 0.
  float (*accumulate)(float weight, const float* y, float* sum, int64_t n, bool observe);

  // dst[i] = dtype(src[i]), round to nearest even.
  void (*narrow)(DType dtype, const float* src, void* dst, int64_t n);
};

extern const Loops kPortableLoops;
#if defined(__x86_64__)
extern const Loops kAvx2Loops;
extern const Loops kAvx512Loops;
#endif

// The loops of active_isa().
const Loops& active_loops();

}  // namespace moe_ext::cpu
