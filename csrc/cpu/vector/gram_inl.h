// Loops::gram: the scalar products of every pair of a token's rows.
//
// kGramChunk columns of the rows at a time are widened to float64 and multiplied in square tiles of rows, of which
// those on and above the diagonal are computed. A product of two float32 is exact in float64, and every sum has
// kGramLanes partial sums, chunk by chunk, added in a fixed order: the bits are the same for any instruction set and
// any tile.
//
// Cost: E (E + 1) H FLOPs; every row is read once, its chunk from L1 or L2 once a tile.
#pragma once

#include "cpu/numeric.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

// The sums of a tile and an operand of each of its rows and columns stay within the register file.
#if defined(MOE_EXT_ISA_AVX512)
constexpr int kGramTile = 4;
#else
constexpr int kGramTile = 2;
#endif
static_assert(kGramTile <= kTallestGramTile, "scratch has rows for whole tiles");

constexpr int64_t kGramLanes = 8;
typedef double Doubles __attribute__((vector_size(kGramLanes * sizeof(double))));  // lowered to what the target has

// sum += a * b; fused where there are instructions for it, or not: the products are exact.
static inline void add_product(const Doubles& a, const Doubles& b, Doubles& sum) {
#if defined(MOE_EXT_ISA_AVX512)
  sum = (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#elif defined(MOE_EXT_ISA_AVX2)
  struct Halves {
    __m256d low, high;
  };
  const Halves x = __builtin_bit_cast(Halves, a), y = __builtin_bit_cast(Halves, b),
               z = __builtin_bit_cast(Halves, sum);
  sum = __builtin_bit_cast(Doubles,
                           Halves{_mm256_fmadd_pd(x.low, y.low, z.low), _mm256_fmadd_pd(x.high, y.high, z.high)});
#else
  sum += a * b;
#endif
}

// rows[e, i] = y[e, first + i], zero from `count` to `padded`.
template <typename T>
static inline void widen_rows(const TokenRows& y, int64_t first, int64_t count, int64_t padded, double* rows) {
  for (int64_t e = 0; e < y.num_experts; ++e) {
    const T* source = static_cast<const T*>(y.first) + e * y.stride + first;
    double* row = rows + e * kGramChunk;
    for (int64_t i = 0; i < count; ++i) row[i] = to_float(source[i]);
    for (int64_t i = count; i < padded; ++i) row[i] = 0.0;
  }
}

// sums[r, c] = a[r] . b[c] for the kGramTile rows of a and of b, over `count` columns, a multiple of kGramLanes.
static inline void gram_tile(const double* a, const double* b, int64_t count, double (&sums)[kGramTile][kGramTile]) {
  Doubles partial[kGramTile][kGramTile] = {};
  for (int64_t i = 0; i < count; i += kGramLanes) {
    Doubles left[kGramTile], right[kGramTile];
    for (int r = 0; r < kGramTile; ++r) left[r] = *reinterpret_cast<const Doubles*>(a + r * kGramChunk + i);
    for (int c = 0; c < kGramTile; ++c) right[c] = *reinterpret_cast<const Doubles*>(b + c * kGramChunk + i);
    for (int r = 0; r < kGramTile; ++r) {
      for (int c = 0; c < kGramTile; ++c) add_product(left[r], right[c], partial[r][c]);
    }
  }
  for (int r = 0; r < kGramTile; ++r) {
    for (int c = 0; c < kGramTile; ++c) {
      const Doubles& p = partial[r][c];
      sums[r][c] = ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
    }
  }
}

template <typename T>
static inline void gram_typed(const TokenRows& y, double* rows, double* gram) {
  const int64_t experts = y.num_experts;
  for (int64_t i = 0; i < experts * experts; ++i) gram[i] = 0.0;
  for (int64_t first = 0; first < y.hidden; first += kGramChunk) {
    const int64_t count = y.hidden - first < kGramChunk ? y.hidden - first : kGramChunk;
    const int64_t padded = (count + kGramLanes - 1) / kGramLanes * kGramLanes;
    widen_rows<T>(y, first, count, padded, rows);
    for (int64_t i = 0; i < experts; i += kGramTile) {
      for (int64_t j = i; j < experts; j += kGramTile) {
        double sums[kGramTile][kGramTile];
        gram_tile(rows + i * kGramChunk, rows + j * kGramChunk, padded, sums);
        for (int64_t r = 0; r < kGramTile && i + r < experts; ++r) {
          for (int64_t c = 0; c < kGramTile && j + c < experts; ++c) gram[(i + r) * experts + j + c] += sums[r][c];
        }
      }
    }
  }
  for (int64_t i = 0; i < experts; ++i) {
    for (int64_t j = 0; j < i; ++j) gram[i * experts + j] = gram[j * experts + i];
  }
}

static void gram(DType dtype, const TokenRows& y, double* rows, double* gram) {
  with_type(dtype, [&](auto* type) { gram_typed<Pointee<decltype(type)>>(y, rows, gram); });
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
