// A tile of a product: y[m, n] = or += a[m] . b[n] for M activation rows and N weight rows, over a chunk of k elements.
//
// Every element of the tile has one vector accumulator, which walks the chunk in order, a vector a step; then its lanes
// are summed in a fixed order, and what is left of the chunk is added by scalars, a product and a sum each: built with
// -ffp-contract=off, or the compiler would fuse them in some tiles only. Every step prefetches one cache line of each
// of N weight rows, and one of an activation row, that are multiplied later. Cost: M + N loads for M * N fused
// multiply-adds a step.
#pragma once

#include <type_traits>

#include "cpu/vector/dot.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr int64_t kLineBytes = 64;

// Weights that are multiplied later: `lines` cache lines of each of a tile's rows, one with every step of the
// reduction. They are fetched to L2, which has more requests under way than L1: reading is up to twice as fast.
template <typename W>
struct Fetch {
  const W* rows = nullptr;
  int64_t lines = 0;
};

// Instead of a pointer into an activation row that the next tile multiplies, a line of which is fetched with every
// step.
struct NoRowAhead {};

// y[m, n] = or += the lanes of acc[m][n], and the `left` elements that follow at a and b: whole vectors of them are
// added to the lanes first.
template <int M, int N, typename A, typename W>
[[gnu::always_inline]] static inline void finish_tile(Vec (&acc)[M][N], const A* a, int64_t a_stride, const W* b,
                                                      int64_t b_stride, int64_t left, bool add, float* y) {
  using Dot = DotOf<A, W>;
  for (; left >= Dot::kStep; left -= Dot::kStep, a += Dot::kStep, b += Dot::kStep) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const typename Dot::Weight bv = Dot::load_weight(b + n * b_stride);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][n] = Dot::add(acc[m][n], Dot::load_row(a + m * a_stride), bv);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    float sums[N];
    if constexpr (N % 4 == 0) {
#pragma GCC unroll 8
      for (int n = 0; n < N; n += 4) sums_of(acc[m][n], acc[m][n + 1], acc[m][n + 2], acc[m][n + 3], sums + n);
    } else {
      for (int n = 0; n < N; ++n) sums[n] = acc[m][n].sum();
    }
    for (int64_t j = 0; j < left; ++j) {
      for (int n = 0; n < N; ++n) sums[n] += to_float(a[m * a_stride + j]) * to_float(b[n * b_stride + j]);
    }
    float* out = y + m * kBlockColumns;
    if (add) {
      for (int n = 0; n < N; ++n) out[n] += sums[n];
    } else {
      for (int n = 0; n < N; ++n) out[n] = sums[n];
    }
  }
}

// y[m, n] = or += a[m] . b[n] over k elements; a_stride, b_stride: elements from row to row.
template <int M, int N, typename A, typename W, typename RowAhead>
static inline void dot_tile(const A* a, int64_t a_stride, const W* b, int64_t b_stride, int64_t k, bool add, float* y,
                            Fetch<W> fetch, RowAhead row_ahead) {
  using Dot = DotOf<A, W>;
  Vec acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[m][n] = Vec::zero();
  }
  const auto step = [&] {
    if constexpr (std::is_pointer_v<RowAhead>) {
      __builtin_prefetch(row_ahead, 0, 2);
      row_ahead += Dot::kStep;
    }
    typename Dot::Weight bv[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) bv[n] = Dot::load_weight(b + n * b_stride);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename Dot::Row av = Dot::load_row(a + m * a_stride);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] = Dot::add(acc[m][n], av, bv[n]);
    }
    a += Dot::kStep;
    b += Dot::kStep;
  };
  const int64_t steps = k / Dot::kStep;
  const int64_t fetching = fetch.lines < steps ? fetch.lines : steps;
  const char* line = reinterpret_cast<const char*>(fetch.rows);
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i < fetching; ++i) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) __builtin_prefetch(line + n * b_stride * static_cast<int64_t>(sizeof(W)), 0, 2);
    line += kLineBytes;
    step();
  }
#pragma GCC unroll 4
  for (; i < steps; ++i) step();
  finish_tile(acc, a, a_stride, b, b_stride, k % Dot::kStep, add, y);
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
