// Quantised weights to float32 with AVX2, a cache line of a row at a time: what unpack_inl.h says, to the bit; but fp8
// with a scale a row is kFloat8Factor too small.
//
// Cost of 8 columns, beside a store: int8 two instructions, four bits 3.6, fp8 five to six.
#pragma once

#include <immintrin.h>

#include "cpu/vector/loops.h"
#include "cpu/vector/packed_tile_avx2_inl.h"
#include "cpu/vector/unpack_inl.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

// 8 columns.
static inline Vec floats_of_int8(const void* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))))};
}

static inline void unpack_int8(const uint8_t* b, int64_t columns, float* out, const uint8_t* later) {
  for (int64_t line = 0; line < columns; line += kLineBytes) {
    if (later != nullptr) __builtin_prefetch(later + line, 0, 2);
    for (int64_t at = line; at < line + kLineBytes; at += Vec::kLanes) floats_of_int8(b + at).store(out + at);
  }
}

// Columns [first, first + count) of a row, and what is in the last line beyond them: `out` has room for whole lines.
// `later`: where the same columns are of a row that is multiplied later, or null.
static inline void unpack_lines(const WeightFormat& format, const QuantisedRow& row, int64_t first, int64_t count,
                                float* out, const uint8_t* later) {
  const uint8_t* bytes = row.bytes + packed_bytes(format, first);
  if (format.type == WeightType::kInt8) return unpack_int8(bytes, count, out, later);
  const bool zeros = row.zeros != nullptr;
  GroupScales of_groups;
  of_groups.load(format, row, first, count);
  with_half(format, zeros, [&](auto type) {
    using Half = typename decltype(type)::type;
    unpack_packed<Half>(bytes, count, Half::Table::of(format, zeros), of_groups.scales, of_groups.zeros, out, later);
  });
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
