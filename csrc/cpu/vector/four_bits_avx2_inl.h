// Four-bit weights in registers with AVX2: half a cache line of a row at a time, the 16 words of which have 16 columns
// of each of the line's four spans. They become what unpack_inl.h says, to the bit.
//
// A number is looked up as the two bytes of a bfloat16, which holds all of them; two bfloat16 in 32 bits, of spans i
// and i + 2, are two floats after a shift and a mask. With quarters 1 and 2 of the half line exchanged, the columns
// come out in order. Then a group's scale multiplies them; where groups have zeros, the numbers are 0 to 15, and the
// zero is taken away before, or in the same instruction where that is exact.
//
// Cost of 8 columns: 4.6 instructions, one of them the multiplication by the scale.
#pragma once

#include <immintrin.h>

#include "cpu/numeric.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/product_inl.h"
#include "cpu/vector/unpack_inl.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

// What a number becomes with its scale and zero.
enum class FourBits {
  kTimesScale,     // a number of its own sign
  kZeroIsExact,    // minus a zero whose product with the scale is exact in float32: of bfloat16 and float16 scales
  kZeroAndRounded  // minus a zero
};

// Bytes of bfloat16 numbers, by number.
struct FourBitTable {
  __m256i low, high;

  explicit FourBitTable(const float (&numbers)[16]) {
    alignas(16) uint8_t lows[16], highs[16];
    for (int i = 0; i < 16; ++i) {
      lows[i] = static_cast<uint8_t>(bits_of_float(numbers[i]) >> 16);
      highs[i] = static_cast<uint8_t>(bits_of_float(numbers[i]) >> 24);
    }
    low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(lows)));
    high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(highs)));
  }
  static FourBitTable of(const WeightFormat& format, bool zeros) {
    constexpr float kFromZero[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    constexpr float kFromEight[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return FourBitTable(format.type == WeightType::kMxfp4 ? kE2M1 : zeros ? kFromZero : kFromEight);
  }
};

// Where step i of a line begins: the order in which the columns of a line come out, and are multiplied.
constexpr int line_column(int i) {
  return i / 8 * static_cast<int>(kPackedSpan / 2) + i / 4 % 2 * 32 + i / 2 % 2 * 8 + i % 2 * 64;
}

struct LineOrder {
  int64_t columns[16];
};
constexpr LineOrder line_order() {
  LineOrder order{};
  for (int i = 0; i < 16; ++i) order.columns[i] = line_column(i);
  return order;
}
constexpr LineOrder kLineOrder = line_order();
constexpr LineOrder kInOrder = {{0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120}};

// Half a line of a row, of which packed_tile_avx2_inl.h says more; a group has kPackedSpan << kGroupShift columns.
template <FourBits kKind, int kGroupShift>
struct FourBitHalf {
  static constexpr int64_t kLineColumns = kPackedLineColumns, kColumns = kPackedSpan / 2;
  using Table = FourBitTable;
  using Bytes = __m256i;

  const FourBitTable& table;
  const float* scales;
  const float* zeros;

  static int64_t group_of(int64_t column) { return column / kPackedSpan >> kGroupShift; }
  // Quarters 0, 2, 1 and 3.
  static __m256i load(const uint8_t* half) {
    return _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)), 0xd8);
  }
  template <typename F>
  [[gnu::always_inline]] void first_steps(__m256i bytes, const F& f) const {
    four_steps<0>(bytes, f);
  }
  template <typename F>
  [[gnu::always_inline]] void last_steps(__m256i bytes, const F& f) const {
    four_steps<1>(_mm256_srli_epi16(bytes, 4), f);
  }

 private:
  // Of the lower nibbles: of spans kSpan and kSpan + 2.
  template <int kSpan, typename F>
  [[gnu::always_inline]] void four_steps(__m256i bytes, const F& f) const {
    const __m256i numbers = _mm256_and_si256(bytes, _mm256_set1_epi8(15));
    const __m256i low = _mm256_shuffle_epi8(table.low, numbers), high = _mm256_shuffle_epi8(table.high, numbers);
    const __m256i front = _mm256_unpacklo_epi8(low, high), back = _mm256_unpackhi_epi8(low, high);
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    f(Constant<line_column(4 * kSpan + 0)>(), weights<kSpan>(_mm256_slli_epi32(front, 16)));
    f(Constant<line_column(4 * kSpan + 1)>(), weights<kSpan + 2>(_mm256_and_si256(front, upper)));
    f(Constant<line_column(4 * kSpan + 2)>(), weights<kSpan>(_mm256_slli_epi32(back, 16)));
    f(Constant<line_column(4 * kSpan + 3)>(), weights<kSpan + 2>(_mm256_and_si256(back, upper)));
  }
  template <int kSpan>
  [[gnu::always_inline]] Vec weights(__m256i numbers) const {
    constexpr int kGroup = kSpan >> kGroupShift;
    const Vec exact{_mm256_castsi256_ps(numbers)}, scale = Vec::all(scales[kGroup]);
    if constexpr (kKind == FourBits::kTimesScale) return exact * scale;
    const Vec zero = Vec::all(zeros[kGroup]);
    return kKind == FourBits::kZeroIsExact ? fma(exact, scale, zero) : (exact - zero) * scale;
  }
};

}  // namespace moe_ext::cpu::MOE_EXT_ISA
