// A tile of a product with quantised weights that are unpacked in registers, with AVX-512: y[m, n] = or += a[m] . b[n]
// for M activation rows and N weight rows, over a chunk of columns.
//
// The sums of dot_tile on the unpacked rows, in its order: the same bits. One vector accumulator an element walks the
// chunk, then its lanes are summed, and what fills no vector is added by scalars. With every block of columns goes a
// fetch of a block of the N rows that are multiplied later.
#pragma once

#include "cpu/vector/quantised_spans_inl.h"
#include "cpu/vector/tile_inl.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

// Calls f(index) for the constants 0, 1, ... kCount - 1.
template <int kCount, typename F>
static inline void for_each_constant(const F& f) {
  if constexpr (kCount > 0) {
    for_each_constant<kCount - 1>(f);
    f(Constant<kCount - 1>());
  }
}

// out[n][i] = weight i of a block of row n, for i < columns at least, as packed_tile multiplies it; `column` is the
// block's in its chunk.
template <typename P, int N, typename A>
[[gnu::noinline]] static void unpack_block(const uint8_t* b, int64_t b_stride, int64_t column, int64_t columns,
                                           const TileScales<N>& scales, A (&out)[N][kSpanBlock]) {
  constexpr int kStep = DotOf<A, A>::kStep;
  Spans<A, P, N> spans;
  spans.open(b, b_stride);
  for_each_constant<kSpanBlock / kStep>([&](auto index) {
    constexpr int i = decltype(index)::value;
    if (i * kStep >= columns) return;  // a row of bytes may end there
    spans.template scale<i>(scales, column);
    for (int n = 0; n < N; ++n) store_span(spans.template span<i>(n), out[n] + i * kStep);
  });
}

// `later`: rows that are multiplied later, at the same stride; or null.
template <int M, int N, typename P, typename A>
[[gnu::noinline]] static void packed_tile(const A* a, int64_t a_stride, const uint8_t* b, int64_t b_stride,
                                          int64_t columns, const TileScales<N>& scales, bool add, float* y,
                                          const uint8_t* later) {
  using Dot = DotOf<A, A>;
  static_assert(N == 4, "lanes are summed as in tiles of four");
  constexpr int kSpans = kSpanBlock / Dot::kStep;
  Spans<A, P, N> spans;
  Vec acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[m][n] = Vec::zero();
  }
  const auto multiply_span = [&](auto index, int64_t column) {
    constexpr int i = decltype(index)::value;
    const A* at = a + column + i * Dot::kStep;
    spans.template scale<i>(scales, column);
    typename Dot::Row av[M];
    if constexpr (M <= 2) {  // of more, registers hold the sums alone
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) av[m] = Dot::load_row(at + m * a_stride);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const auto bv = spans.template span<i>(n);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        if constexpr (M > 2) av[m] = Dot::load_row(at + m * a_stride);
        acc[m][n] = Dot::add(acc[m][n], av[m], bv);
      }
    }
  };
  int64_t column = 0;
  for (; column + kSpanBlock <= columns; column += kSpanBlock, b += kSpanBlockBytes<P>) {
    if (later != nullptr) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        for (int64_t line = 0; line < kSpanBlockBytes<P>; line += kLineBytes) {
          __builtin_prefetch(later + n * b_stride + line, 0, 2);
        }
      }
      later += kSpanBlockBytes<P>;
    }
    spans.open(b, b_stride);
    for_each_constant<kSpans>([&](auto index) { multiply_span(index, column); });
  }
  alignas(64) A rest[N][kSpanBlock];  // weights of columns that fill no block
  int64_t left = columns - column;
  a += column;
  if (left > 0) {
    unpack_block<P>(b, b_stride, column, left, scales, rest);
    const A* at = rest[0];
    for (; left >= Dot::kStep; left -= Dot::kStep, a += Dot::kStep, at += Dot::kStep) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const auto bv = Dot::load_weight(at + n * kSpanBlock);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m][n] = Dot::add(acc[m][n], Dot::load_row(a + m * a_stride), bv);
      }
    }
  }
  const A* last = rest[0] + (columns - column) - left;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    float sums[N];
    sums_of(acc[m][0], acc[m][1], acc[m][2], acc[m][3], sums);
    for (int64_t j = 0; j < left; ++j) {
      for (int n = 0; n < N; ++n) sums[n] += to_float(a[m * a_stride + j]) * to_float(last[n * kSpanBlock + j]);
    }
    float* out = y + m * kBlockColumns;
    if (add) {
      for (int n = 0; n < N; ++n) out[n] += sums[n];
    } else {
      for (int n = 0; n < N; ++n) out[n] = sums[n];
    }
  }
}

// out[i] = weight i of a row's chunk, as packed_tile multiplies it.
template <typename P, typename A>
[[gnu::noinline]] static void unpack_chunk(const uint8_t* b, int64_t columns, const TileScales<1>& scales, A* out) {
  constexpr int kStep = DotOf<A, A>::kStep;
  Spans<A, P, 1> spans;
  int64_t column = 0;
  for (; column + kSpanBlock <= columns; column += kSpanBlock, b += kSpanBlockBytes<P>) {
    spans.open(b, 0);
    for_each_constant<kSpanBlock / kStep>([&](auto index) {
      constexpr int i = decltype(index)::value;
      spans.template scale<i>(scales, column);
      store_span(spans.template span<i>(0), out + column + i * kStep);
    });
  }
  if (column == columns) return;
  alignas(64) A rest[1][kSpanBlock];
  unpack_block<P>(b, 0, column, columns - column, scales, rest);
  memcpy(out + column, rest[0], static_cast<size_t>(columns - column) * sizeof(A));
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
