// fp8 weights (e4m3) in registers with AVX2: half a cache line of a row at a time, 32 columns in order. A weight
// becomes a float16 with an exponent that is 8 too small; of its codes one is no number.
//
// Cost of 8 columns: five instructions, and one for the scale of a block.
#pragma once

#include <immintrin.h>

#include "cpu/vector/loops.h"
#include "cpu/vector/product_inl.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr float kFloat8Factor = 256.0f;  // what scales have to make up for

// e4m3 as float16, 2^-8 of the number, of bytes that were sign-extended.
static inline __m256i halves_of_fp8(__m256i codes) {
  const __m256i moved = _mm256_slli_epi16(codes, 7);  // the sign in bits 14 and 15
  const __m256i magnitude = _mm256_and_si256(moved, _mm256_set1_epi16(0x3f80));
  const __m256i none = _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(0x3f00));
  return _mm256_or_si256(_mm256_andnot_si256(_mm256_set1_epi16(0x4000), moved), none);  // all bits set are no number
}

struct NoTable {
  static NoTable of(const WeightFormat&, bool) { return {}; }
};

// Half a line of a row. kBlocks: scales of 128 columns; or weights are kFloat8Factor too small.
template <bool kBlocks>
struct Float8Half {
  static constexpr int64_t kLineColumns = 64, kColumns = 32;
  using Table = NoTable;
  using Bytes = const uint8_t*;

  const NoTable& table;
  const float* scales;
  const float* zeros;

  static int64_t group_of(int64_t column) { return kBlocks ? column / WeightFormat::kRowBlock : 0; }
  static Bytes load(const uint8_t* half) { return half; }
  template <typename F>
  [[gnu::always_inline]] void first_steps(Bytes bytes, const F& f) const {
    two_steps<0>(bytes, f);
  }
  template <typename F>
  [[gnu::always_inline]] void last_steps(Bytes bytes, const F& f) const {
    two_steps<16>(bytes, f);
  }

 private:
  template <int kColumn, typename F>
  [[gnu::always_inline]] void two_steps(Bytes bytes, const F& f) const {
    const auto* codes = reinterpret_cast<const __m128i*>(bytes + kColumn);
    const __m256i halves = halves_of_fp8(_mm256_cvtepi8_epi16(_mm_loadu_si128(codes)));
    f(Constant<kColumn>(), weights(_mm256_castsi256_si128(halves)));
    f(Constant<kColumn + 8>(), weights(_mm256_extracti128_si256(halves, 1)));
  }
  [[gnu::always_inline]] Vec weights(__m128i halves) const {
    const Vec small{_mm256_cvtph_ps(halves)};
    return kBlocks ? small * Vec::all(scales[0]) : small;
  }
};

}  // namespace moe_ext::cpu::MOE_EXT_ISA
