// How a vector of an activation row meets one of a weight row. The general way widens both to float32; with AVX-512
// BF16, two bfloat16 vectors are multiplied as they are: each lane adds the exact products of a pair of elements to its
// float32 sum (subnormal numbers count as zero).
#pragma once

#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

template <typename A, typename W>
struct DotOf {
  using Row = Vec;
  using Weight = Vec;
  static constexpr int kStep = Vec::kLanes;
  static Row load_row(const A* p) { return Vec::load(p); }
  static Weight load_weight(const W* p) { return Vec::load(p); }
  static Vec add(Vec sum, Row a, Weight b) { return fma(a, b, sum); }
};

#if defined(MOE_EXT_ISA_AVX512_BF16)

constexpr bool kBFloat16Operands = true;

struct BFloat16Pairs {
  __m512bh v;
};

template <>
struct DotOf<BFloat16, BFloat16> {
  using Row = BFloat16Pairs;
  using Weight = BFloat16Pairs;
  static constexpr int kStep = 32;
  static BFloat16Pairs load(const BFloat16* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
  static Row load_row(const BFloat16* p) { return load(p); }
  static Weight load_weight(const BFloat16* p) { return load(p); }
  static Vec add(Vec sum, Row a, Weight b) { return {_mm512_dpbf16_ps(sum.v, a.v, b.v)}; }
};

#else

constexpr bool kBFloat16Operands = false;

#endif

}  // namespace moe_ext::cpu::MOE_EXT_ISA
