// Products of activations and weights that both are whole numbers: int8, int4 and mxfp4 weights by rows of ByteBlock.
//
// A weight's number times an activation's, summed over the columns of a scale in integers, exactly; times the weights'
// scale and the block's in float32, blocks in order. So an output's bits depend on its row and its weights alone.
//
// With AVX2 32 products are one instruction (vpmaddubsw), whose one operand has no sign: of int8 weights the magnitude,
// the activation takes the sign; four-bit numbers are read as 0 to 15, or mxfp4's twice, plus 12, from a table, and the
// excess times the activations' sum, which the block holds, is taken away. Sums of four such products fit 16 bits.
// AVX-512 VNNI does the same in one instruction less. A line of 128 four-bit weights takes 8 to 15 instructions for
// itself, and 12 to 14 for an activation row. Scales that are exponents become floats where they lie.
#pragma once

#if defined(MOE_EXT_ISA_AVX2) || defined(MOE_EXT_ISA_AVX512)
#include <immintrin.h>
#define MOE_EXT_BYTE_VECTORS
#endif

#include "cpu/numeric.h"
#include "cpu/vector/byte_rows.h"
#include "cpu/vector/conversion_inl.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/unpack_inl.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

constexpr int64_t kByteLine = 64;  // bytes of a line of packed weights
constexpr int kByteTileRows = 4;   // activation rows whose products share a line that has come apart
constexpr int64_t kFetchedBytes = 2048;

// ---- activations

template <bool kFourBits>
static void quantise_block(const float* row, int64_t columns, int32_t excess, float unit, ByteBlock* block) {
  float x[ByteBlock::kColumns] = {};
  for (int64_t i = 0; i < columns; ++i) x[i] = row[i];
  uint32_t largest = 0;  // bits of magnitudes order as they do; infinity and NaN are the largest
  for (const float value : x) {
    const uint32_t magnitude = bits_of_float(value) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const bool finite = largest < 0x7f800000u;
  const float inverse = 127.0f / float_of_bits(finite ? largest : 0x7f800000u);
  const bool any = finite && bits_of_float(inverse) < 0x7f800000u;  // not 0, nor so small that this is beyond float32
  block->scale = finite ? (any ? float_of_bits(largest) / 127.0f : 0.0f) : float_of_bits(0x7fc00000u);
  const float factor = any ? inverse : 0.0f;
  int32_t sums[4] = {};
  for (int64_t i = 0; i < ByteBlock::kColumns; ++i) {
    constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: the sum's last bit is 1
    const float value = finite ? x[i] : 0.0f;
    const int32_t number = static_cast<int32_t>(bits_of_float(value * factor + kWhole) - bits_of_float(kWhole));
    block->values[byte_position(kFourBits, i)] = static_cast<int8_t>(number);
    sums[i / 32] += number;
  }
  block->scale *= unit;
  for (int32_t& sum : block->sums) sum = 0;
  for (int64_t span = 0; span < 4; ++span) block->sums[sum_position(span)] = sums[span] * excess;
}

// A row of k floats as byte_blocks(k) blocks.
static void quantise(WeightType type, bool zeros, const float* row, int64_t k, ByteBlock* blocks) {
  for (int64_t first = 0; first < k; first += ByteBlock::kColumns) {
    const int64_t columns = k - first < ByteBlock::kColumns ? k - first : ByteBlock::kColumns;
    ByteBlock* block = blocks + first / ByteBlock::kColumns;
    if (has_four_bits(type)) {
      quantise_block<true>(row + first, columns, zeros ? 1 : excess_of(type), type == WeightType::kMxfp4 ? 0.5f : 1.0f,
                           block);
    } else {
      quantise_block<false>(row + first, columns, 0, 1.0f, block);
    }
  }
}

// ---- weights

// The scales of a row's groups as floats, followed by zeros up to a whole line of groups.
static inline void widen_scales(ScaleType type, const QuantisedRow& row, int64_t groups, float* scales) {
  switch (type) {
    case ScaleType::kFloat32:
      widen(DType::kFloat32, static_cast<const float*>(row.scales) + row.first_scale, scales, groups);
      break;
    case ScaleType::kBFloat16:
      widen(DType::kBFloat16, static_cast<const BFloat16*>(row.scales) + row.first_scale, scales, groups);
      break;
    case ScaleType::kFloat16:
      widen(DType::kFloat16, static_cast<const Float16*>(row.scales) + row.first_scale, scales, groups);
      break;
    case ScaleType::kE8M0: {
      const uint8_t* exponents = static_cast<const uint8_t*>(row.scales) + row.first_scale;
      for (int64_t g = 0; g < groups; ++g) {
        const uint32_t bits = exponents[g] == 0 ? 0x00400000u : uint32_t{exponents[g]} << 23;
        scales[g] = float_of_bits(exponents[g] == 255 ? 0x7fc00000u : bits);
      }
      break;
    }
  }
  for (int64_t g = groups; g < groups + 4; ++g) scales[g] = 0.0f;
}

// The exponents of a row of mxfp4 weights if every one, shifted, is a float's bits, and lines have four; else null.
static inline const uint8_t* plain_exponents(const QuantisedRow& row, int64_t k, int64_t groups) {
  if (k % ByteBlock::kColumns != 0) return nullptr;
  const uint8_t* exponents = static_cast<const uint8_t*>(row.scales) + row.first_scale;
  uint8_t special = 0;
  for (int64_t g = 0; g < groups; ++g) special |= static_cast<uint8_t>(static_cast<uint8_t>(exponents[g] + 1) < 2);
  return special == 0 ? exponents : nullptr;
}

// Weight row n of a product by M activation rows.
struct ByteTile {
  const ByteBlock* rows;  // the first activation row's
  int64_t stride;         // blocks from row to row
  int64_t blocks;
  int64_t k;
  const uint8_t* weights;    // a packed row
  const uint8_t* next;       // bytes to be fetched meanwhile, or null
  const uint8_t* zeros;      // of the row's groups, or null
  const uint8_t* exponents;  // plain ones of the row's groups, or null
  const float* scales;       // of the row's groups, if there are no exponents; of int8 its one
};

#if defined(MOE_EXT_BYTE_VECTORS)

static inline __m256i load_32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Lanes in a fixed order.
static inline float sum_of_lanes(__m256 sum) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

// Sums of four neighbouring products; of a in [0, 255], b in [-127, 127].
static inline __m256i dot_4(__m256i a, __m256i b) {
#if defined(MOE_EXT_BYTE_VNNI)
  return _mm256_dpbusd_epi32(_mm256_setzero_si256(), a, b);
#else
  return _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
#endif
}

// The same of four-bit numbers, a in [0, 24]: the sums of eight products fit 16 bits.
using Line = const __m256i (&)[4];
#if defined(MOE_EXT_BYTE_VNNI)

static inline __m256i dot_8(__m256i a, __m256i b, __m256i c, __m256i d) {
  return _mm256_dpbusd_epi32(dot_4(a, b), c, d);
}

// Of all.
static inline __m256i dot_16(Line a, Line b) {
  return _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(dot_8(a[0], b[0], a[1], b[1]), a[2], b[2]), a[3], b[3]);
}

// By spans of 32 columns, each in two lanes: 0, 2, 1, 3, 0, 2, 1, 3.
static inline __m256i dot_of_spans(Line a, Line b) {
  return _mm256_hadd_epi32(dot_8(a[0], b[0], a[2], b[2]), dot_8(a[1], b[1], a[3], b[3]));
}

#else

static inline __m256i pairs_4(__m256i a, __m256i b, __m256i c, __m256i d) {
  return _mm256_add_epi16(_mm256_maddubs_epi16(a, b), _mm256_maddubs_epi16(c, d));
}

static inline __m256i dot_16(Line a, Line b) {
  const __m256i sums = _mm256_add_epi16(pairs_4(a[0], b[0], a[1], b[1]), pairs_4(a[2], b[2], a[3], b[3]));
  return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}

static inline __m256i dot_of_spans(Line a, Line b) {
  const __m256i sums = _mm256_hadd_epi16(pairs_4(a[0], b[0], a[2], b[2]), pairs_4(a[1], b[1], a[3], b[3]));
  return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
}

#endif

template <int M>
[[gnu::always_inline]] static inline void int8_tile(const ByteTile& t, float* y) {
  __m256 sums[M];
  for (int m = 0; m < M; ++m) sums[m] = _mm256_setzero_ps();
  const int64_t lines = (t.k + kByteLine - 1) / kByteLine;
  for (int64_t block = 0; block < t.blocks; ++block) {
    const int64_t here = lines - 2 * block < 2 ? 1 : 2;  // of the block's lines, those that the row has
    __m256i whole[M];
    for (int m = 0; m < M; ++m) whole[m] = _mm256_setzero_si256();
    for (int64_t line = 0; line < here; ++line) {
      const uint8_t* bytes = t.weights + (2 * block + line) * kByteLine;
      if (t.next != nullptr) _mm_prefetch(reinterpret_cast<const char*>(t.next + (bytes - t.weights)), _MM_HINT_T0);
      const __m256i first = load_32(bytes), second = load_32(bytes + 32);
      const __m256i first_size = _mm256_abs_epi8(first), second_size = _mm256_abs_epi8(second);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const int8_t* x = t.rows[m * t.stride + block].values + line * kByteLine;
        const __m256i a = dot_4(first_size, _mm256_sign_epi8(load_32(x), first));
        const __m256i b = dot_4(second_size, _mm256_sign_epi8(load_32(x + 32), second));
        whole[m] = _mm256_add_epi32(whole[m], _mm256_add_epi32(a, b));
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const __m256 scale = _mm256_broadcast_ss(&t.rows[m * t.stride + block].scale);
      sums[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[m]), scale, sums[m]);
    }
  }
  for (int m = 0; m < M; ++m) y[m * kBlockColumns] = sum_of_lanes(sums[m]) * t.scales[0];
}

// A line of four-bit weights as numbers without sign: 0 and 2 columns of the low bits, 1 and 3 of the high ones.
template <WeightType kType>
[[gnu::always_inline]] static inline void take_apart(const uint8_t* line, __m256i (&numbers)[4]) {
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  const __m256i low = _mm256_set1_epi8(15);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256i pairs = _mm256_shuffle_epi8(load_32(line + 32 * half), order);
    numbers[2 * half] = _mm256_and_si256(pairs, low);
    numbers[2 * half + 1] = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), low);
  }
  if constexpr (kType == WeightType::kMxfp4) {  // twice the number, plus 12
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) numbers[i] = _mm256_shuffle_epi8(table, numbers[i]);
  }
}

static inline __m256 twice(__m128 half) { return _mm256_set_m128(half, half); }

template <int M, WeightType kType, int kGroup, bool kZeros, bool kExponents>
[[gnu::always_inline]] static inline void four_bit_tile(const ByteTile& t, float* y) {
  __m256 sums[M];
  for (int m = 0; m < M; ++m) sums[m] = _mm256_setzero_ps();
  constexpr int kGroups = static_cast<int>(ByteBlock::kColumns) / kGroup;  // of a line
  for (int64_t block = 0; block < t.blocks; ++block) {
    const uint8_t* line = t.weights + block * kByteLine;
    if (t.next != nullptr) _mm_prefetch(reinterpret_cast<const char*>(t.next + block * kByteLine), _MM_HINT_T0);
    __m256i numbers[4];
    take_apart<kType>(line, numbers);
    __m256 of_lanes;  // scales
    if constexpr (kExponents) {
      int32_t four;
      memcpy(&four, t.exponents + block * kGroups, sizeof(four));
      const __m256i last_bytes =
          _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, -1, 0, -1, -1, -1, 2, -1, -1, -1, 1, -1, -1, -1, 3));
      of_lanes = _mm256_castsi256_ps(_mm256_srli_epi32(_mm256_shuffle_epi8(_mm256_set1_epi32(four), last_bytes), 1));
    } else if constexpr (kGroup == 128) {
      of_lanes = _mm256_broadcast_ss(t.scales + block);
    } else if constexpr (kGroup == 64) {
      const __m128 two = _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(t.scales + block * kGroups)));
      of_lanes = twice(_mm_permute_ps(two, 0b01010000));
    } else {
      of_lanes = twice(_mm_permute_ps(_mm_loadu_ps(t.scales + block * kGroups), 0b11011000));
    }
    __m256i zeros = _mm256_setzero_si256();  // in the order of ByteBlock::sums
    if constexpr (kZeros) {
      int of_group[kGroups] = {t.zeros[block * kGroups]};
      for (int g = 1; g < kGroups; ++g) {
        if (block * ByteBlock::kColumns + g * kGroup < t.k) of_group[g] = t.zeros[block * kGroups + g];
      }
      const int span_1 = of_group[kGroups / 4], span_2 = of_group[kGroups / 2], span_3 = of_group[kGroups * 3 / 4];
      zeros = _mm256_setr_epi32(of_group[0], span_2, span_1, span_3, 0, 0, 0, 0);
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const ByteBlock& x = t.rows[m * t.stride + block];
      const __m256i values[4] = {load_32(x.values), load_32(x.values + 32), load_32(x.values + 64),
                                 load_32(x.values + 96)};
      __m256i excess = load_32(x.sums);
      if constexpr (kZeros) excess = _mm256_mullo_epi32(excess, zeros);
      if constexpr (kGroup == 64) excess = _mm256_shuffle_epi32(excess, 0b11011000);
      const __m256i dots = kGroup == 32 ? dot_of_spans(numbers, values) : dot_16(numbers, values);
      const __m256 whole = _mm256_cvtepi32_ps(_mm256_sub_epi32(dots, excess));
      sums[m] = _mm256_fmadd_ps(whole, _mm256_mul_ps(of_lanes, _mm256_broadcast_ss(&x.scale)), sums[m]);
    }
  }
  for (int m = 0; m < M; ++m) y[m * kBlockColumns] = sum_of_lanes(sums[m]);
}

#else

template <int M>
[[gnu::always_inline]] static inline void int8_tile(const ByteTile& t, float* y) {
  for (int m = 0; m < M; ++m) {
    float sum = 0.0f;
    for (int64_t block = 0; block < t.blocks; ++block) {
      const ByteBlock& x = t.rows[m * t.stride + block];
      const int64_t first = block * ByteBlock::kColumns;
      const int64_t columns = t.k - first < ByteBlock::kColumns ? t.k - first : ByteBlock::kColumns;
      int32_t whole = 0;
      for (int64_t i = 0; i < columns; ++i) whole += static_cast<int8_t>(t.weights[first + i]) * x.values[i];
      sum += static_cast<float>(whole) * x.scale;
    }
    y[m * kBlockColumns] = sum * t.scales[0];
  }
}

template <int M, WeightType kType, int kGroup, bool kZeros, bool kExponents>
[[gnu::always_inline]] static inline void four_bit_tile(const ByteTile& t, float* y) {
  constexpr int kTwice[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
  for (int m = 0; m < M; ++m) {
    float sum = 0.0f;
    for (int64_t block = 0; block < t.blocks; ++block) {
      const ByteBlock& x = t.rows[m * t.stride + block];
      for (int64_t span = 0; span < 4; ++span) {
        const int64_t column = block * ByteBlock::kColumns + 32 * span;
        if (column >= t.k) break;
        int32_t whole = 0;
        for (int64_t word = 0; word < 32; ++word) {
          const int number = t.weights[block * kByteLine + 2 * word + span / 2] >> (span % 2 * 4) & 15;
          whole +=
              (kType == WeightType::kMxfp4 ? kTwice[number] : number) * x.values[byte_position(true, 32 * span + word)];
        }
        const int32_t excess = x.sums[sum_position(span)];
        whole -= kZeros ? t.zeros[column / kGroup] * excess : excess;
        const float scale =
            kExponents ? float_of_bits(uint32_t{t.exponents[column / kGroup]} << 23) : t.scales[column / kGroup];
        sum += static_cast<float>(whole) * (scale * x.scale);
      }
    }
    y[m * kBlockColumns] = sum;
  }
}

#endif

// y of M activation rows, whose ByteBlocks begin at `rows`, and of weights of one kind.
template <int M, WeightType kType, int kGroup, bool kZeros>
static void multiply_byte_rows(const Product& p, const ByteBlock* rows, float* y) {
  const QuantisedRows& q = *p.quantised;
  const int64_t blocks = byte_blocks(p.k);
  float* scales = static_cast<float*>(p.unpacked);
  // What is fetched meanwhile: as many rows on as make kFetchedBytes, for a short row is over before the next is there.
  const int64_t ahead = (kFetchedBytes + q.row_bytes - 1) / q.row_bytes;
  const WeightRows& following = p.next_weights;
  const auto fetched = [&](int64_t n) -> const uint8_t* {
    if (n < p.columns) return QuantisedRow::at(q, p.weights, n).bytes;
    n -= p.columns;
    const void* rows = n < following.split ? following.first : following.second;
    return rows == nullptr ? nullptr : QuantisedRow::at(q, following, n).bytes;
  };
  for (int64_t n = 0; n < p.columns; ++n) {
    const QuantisedRow row = QuantisedRow::at(q, p.weights, n);
    ByteTile t{rows, blocks, blocks, p.k, row.bytes, fetched(n + ahead), row.zeros, nullptr, scales};
    if constexpr (kType == WeightType::kMxfp4) t.exponents = plain_exponents(row, p.k, q.groups);
    if (t.exponents == nullptr) widen_scales(q.format.scales, row, q.groups, scales);
    if constexpr (kType == WeightType::kInt8) {
      int8_tile<M>(t, y + n);
    } else if (t.exponents != nullptr) {
      four_bit_tile<M, kType, kGroup, kZeros, true>(t, y + n);
    } else {
      four_bit_tile<M, kType, kGroup, kZeros, false>(t, y + n);
    }
  }
}

// y of a product whose rows are ByteBlocks. Activation rows by fours, which stay in L1, against all weight rows of the
// block, which stay in L2.
template <WeightType kType, int kGroup = 128, bool kZeros = false>
static void multiply_bytes_of(const Product& p) {
  for (int64_t r = 0; r < p.row_count; r += kByteTileRows) {
    const ByteBlock* rows = static_cast<const ByteBlock*>(p.rows) + r * byte_blocks(p.k);
    float* y = p.y + r * kBlockColumns;
    const int64_t count = p.row_count - r;
    if (count == 1) multiply_byte_rows<1, kType, kGroup, kZeros>(p, rows, y);
    if (count == 2) multiply_byte_rows<2, kType, kGroup, kZeros>(p, rows, y);
    if (count == 3) multiply_byte_rows<3, kType, kGroup, kZeros>(p, rows, y);
    if (count >= 4) multiply_byte_rows<4, kType, kGroup, kZeros>(p, rows, y);
  }
}

static void multiply_bytes(const Product& p) {
  constexpr WeightType kInt4 = WeightType::kInt4;
  const WeightFormat& format = p.quantised->format;
  const bool zeros = p.weights.zeros != nullptr;
  if (format.type == WeightType::kInt8) return multiply_bytes_of<WeightType::kInt8>(p);
  if (format.type == WeightType::kMxfp4) return multiply_bytes_of<WeightType::kMxfp4, 32>(p);
  if (format.group_size == 32) return zeros ? multiply_bytes_of<kInt4, 32, true>(p) : multiply_bytes_of<kInt4, 32>(p);
  if (format.group_size == 64) return zeros ? multiply_bytes_of<kInt4, 64, true>(p) : multiply_bytes_of<kInt4, 64>(p);
  return zeros ? multiply_bytes_of<kInt4, 128, true>(p) : multiply_bytes_of<kInt4>(p);
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
