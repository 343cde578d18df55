// Tiles of packed weights with AVX2, and the same weights unpacked: of four bits (four_bits_avx2_inl.h) and of fp8
// (float8_avx2_inl.h), which become floats half a cache line at a time.
//
// A Half<...> has a Table, one for all rows, and of a line the scales and zeros of its groups; first_steps() and
// last_steps() call f(column, weights) with 8 columns each, `column` being a constant: of the line, less kColumns for
// its second half. The order of the calls is the order in which a row is multiplied.
#pragma once

#include <immintrin.h>

#include "cpu/numeric.h"
#include "cpu/vector/conversion_inl.h"
#include "cpu/vector/float8_avx2_inl.h"
#include "cpu/vector/four_bits_avx2_inl.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/product_inl.h"
#include "cpu/vector/tile_inl.h"
#include "cpu/vector/unpack_inl.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr int64_t kHalfBytes = kLineBytes / 2;

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<Half>()) for the one of a format, which is not int8.
template <typename F>
static inline void with_half(const WeightFormat& format, bool zeros, const F& f) {
  const auto with_groups = [&](auto kind) {
    constexpr FourBits kKind = decltype(kind)::value;
    if (format.group_size == 32) return f(Type<FourBitHalf<kKind, 0>>());
    if (format.group_size == 64) return f(Type<FourBitHalf<kKind, 1>>());
    f(Type<FourBitHalf<kKind, 2>>());
  };
  if (format.type == WeightType::kFloat8) {
    if (format.group_size == 0) return f(Type<Float8Half<false>>());
    f(Type<Float8Half<true>>());
  } else if (format.type == WeightType::kMxfp4) {
    f(Type<FourBitHalf<FourBits::kTimesScale, 0>>());
  } else if (!zeros) {
    with_groups(std::integral_constant<FourBits, FourBits::kTimesScale>());
  } else if (format.scales != ScaleType::kFloat32) {
    with_groups(std::integral_constant<FourBits, FourBits::kZeroIsExact>());
  } else {
    with_groups(std::integral_constant<FourBits, FourBits::kZeroAndRounded>());
  }
}

// The scales and zeros of a row's groups over a chunk of columns, by group; of groups that no column is in, zeros.
struct GroupScales {
  static constexpr int64_t kMost = kUnpackedColumns / kPackedSpan;
  float scales[kMost];
  float zeros[kMost];  // of kZeroIsExact minus their products with the scale

  void load(const WeightFormat& format, const QuantisedRow& row, int64_t first, int64_t count) {
    if (format.group_size == 0) return;
    const int64_t group = first / format.group_size, from = row.first_scale + group;
    const int64_t groups = (count + format.group_size - 1) / format.group_size;
    load_scales(format.scales, row.scales, from, groups);
    for (int64_t g = groups; g % 4 != 0; ++g) scales[g] = zeros[g] = 0.0f;  // to the end of a line
    if (format.type == WeightType::kFloat8) {
      for (int64_t g = 0; g < groups; ++g) scales[g] *= kFloat8Factor;
    }
    if (row.zeros == nullptr) return;
    const bool exact = format.scales != ScaleType::kFloat32;
    for (int64_t g = 0; g < groups; ++g) {
      const float zero = row.zeros[group + g];
      zeros[g] = exact ? -zero * scales[g] : zero;
    }
  }

 private:
  void load_scales(ScaleType type, const void* from, int64_t first, int64_t count) {
    switch (type) {
      case ScaleType::kFloat32:
        return widen(DType::kFloat32, static_cast<const float*>(from) + first, scales, count);
      case ScaleType::kBFloat16:
        return widen(DType::kBFloat16, static_cast<const BFloat16*>(from) + first, scales, count);
      case ScaleType::kFloat16:
        return widen(DType::kFloat16, static_cast<const Float16*>(from) + first, scales, count);
      case ScaleType::kE8M0: {
        int64_t i = 0;
        for (; i + Vec::kLanes <= count; i += Vec::kLanes) {
          powers_of_two(static_cast<const uint8_t*>(from) + first + i).store(scales + i);
        }
        for (; i < count; ++i) scales[i] = scale_at(type, from, first + i);
        return;
      }
    }
  }
  // 2^(s - 127); 2^-127 of 0, and no number of 255, have no exponent field of their own, but the same mantissa.
  static Vec powers_of_two(const uint8_t* exponents) {
    const __m256i s = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(exponents)));
    const __m256i usual =
        _mm256_and_si256(_mm256_cmpgt_epi32(s, _mm256_setzero_si256()), _mm256_cmpgt_epi32(_mm256_set1_epi32(255), s));
    const __m256i mantissa = _mm256_andnot_si256(usual, _mm256_set1_epi32(0x00400000));
    return {_mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(s, 23), mantissa))};
  }
};

// The columns of a chunk of a row, to the end of the last line. `later`: the same of a row that is multiplied later, or
// null.
template <typename Half>
[[gnu::noinline]] static void unpack_packed(const uint8_t* b, int64_t columns, const typename Half::Table& table,
                                            const float* scales, const float* zeros, float* out, const uint8_t* later) {
  for (int64_t column = 0; column < columns; column += Half::kLineColumns) {
    if (later != nullptr) {
      __builtin_prefetch(later, 0, 2);
      later += kLineBytes;
    }
    const int64_t group = Half::group_of(column);
    const Half line{table, scales + group, zeros + group};
    for (int half = 0; half < 2; ++half, b += kHalfBytes) {
      const typename Half::Bytes bytes = Half::load(b);
      float* to = out + column + half * Half::kColumns;
      const auto store = [&](auto at, Vec weights) { weights.store(to + decltype(at)::value); };
      line.first_steps(bytes, store);
      line.last_steps(bytes, store);
    }
  }
}

// y[m, n] = or += a[m] . b[n] for M activation rows and N rows of unpacked weights, over a chunk of columns: a line of
// four bits after the other in `order`, what is left in order.
template <int M, int N>
[[gnu::noinline]] static void unpacked_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                            int64_t columns, bool add, float* y, const LineOrder& order) {
  Vec acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[m][n] = Vec::zero();
  }
  const auto step = [&](int64_t column) {  // M + 1 vectors beside the sums: 16 registers for three rows
    Vec av[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) av[m] = Vec::load(a + m * a_stride + column);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vec bv = Vec::load(b + n * b_stride + column);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][n] = fma(av[m], bv, acc[m][n]);
    }
  };
  for (; columns >= kPackedLineColumns; columns -= kPackedLineColumns) {
#pragma GCC unroll 2
    for (int i = 0; i < 16; ++i) step(order.columns[i]);  // all of it unrolled, GCC 12 would load weights M times
    a += kPackedLineColumns;
    b += kPackedLineColumns;
  }
  finish_tile(acc, a, a_stride, b, b_stride, columns, add, y);
}

// y[m, n] = or += a[m] . b[n] for M activation rows and four weight rows, over a chunk of columns: the sums of
// unpacked_tile, to the bit. `later`: rows that are multiplied later, at the same
// stride, or null.
template <int M, typename Half>
[[gnu::noinline]] static void packed_tile(const float* a, int64_t a_stride, const uint8_t* b, int64_t b_stride,
                                          int64_t columns, const typename Half::Table& table,
                                          const GroupScales (&scales)[kTileColumns], bool add, float* y,
                                          const uint8_t* later) {
  constexpr int N = kTileColumns;
  const typename Half::Table own = table;  // in registers
  Vec acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[m][n] = Vec::zero();
  }
  int64_t column = 0;
  for (; column + Half::kLineColumns <= columns; column += Half::kLineColumns, b += kLineBytes) {
    if (later != nullptr) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) __builtin_prefetch(later + n * b_stride, 0, 2);
      later += kLineBytes;
    }
    const int64_t group = Half::group_of(column);
#pragma GCC unroll 1
    for (int half = 0; half < 2; ++half) {
      const float* from = a + column + half * Half::kColumns;
      typename Half::Bytes bytes[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) bytes[n] = Half::load(b + n * b_stride + half * kHalfBytes);
      // A few steps of every row in turn: an accumulator waits for its last product while others are computed.
      const auto multiply = [&](int n) {
        return [&, n](auto at, Vec weights) __attribute__((always_inline)) {
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            acc[m][n] = fma(Vec::load(from + m * a_stride + decltype(at)::value), weights, acc[m][n]);
          }
        };
      };
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        Half{own, scales[n].scales + group, scales[n].zeros + group}.first_steps(bytes[n], multiply(n));
      }
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        Half{own, scales[n].scales + group, scales[n].zeros + group}.last_steps(bytes[n], multiply(n));
      }
    }
  }
  alignas(32) float rest[N][Half::kLineColumns];  // of columns that fill no line
  if (column < columns) {
    const int64_t group = Half::group_of(column);
    for (int n = 0; n < N; ++n) {
      unpack_packed<Half>(b + n * b_stride, columns - column, own, scales[n].scales + group, scales[n].zeros + group,
                          rest[n], nullptr);
    }
  }
  finish_tile(acc, a + column, a_stride, rest[0], Half::kLineColumns, columns - column, add, y);
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
