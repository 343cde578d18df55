// One float32 vector type per instruction set, with the few operations that the loops need. Included only by
// product_inl.h and dot.h, which are compiled once per instruction set inside its own namespace. Masked or partial
// loads are not offered: the loops finish the last elements with scalars.
#pragma once

#if defined(MOE_EXT_ISA_AVX512) || defined(MOE_EXT_ISA_AVX2)
#include <immintrin.h>
#else
#include <math.h>
#endif

#include "cpu/numeric.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

#if defined(MOE_EXT_ISA_AVX512)

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec all(float value) { return {_mm512_set1_ps(value)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(Float16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(BFloat16* p) const {  // as from_float does it
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
  // 2^this for integral values in [-126, 127], by writing the exponent field.
  Vec power_of_two() const {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
  }
  Vec rounded() const { return {_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // min and max return the second operand if either is NaN, so a NaN in `this` survives.
  Vec clamped(float low, float high) const {
    return {_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), v))};
  }
};
static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// sums[0..3] = the sums of a, b, c, d.
static inline void sums_of(Vec a, Vec b, Vec c, Vec d, float* sums) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d abcd = _mm512_castps_pd(_mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high)));
  const __m256 half =
      _mm256_add_ps(_mm256_castpd_ps(_mm512_castpd512_pd256(abcd)), _mm256_castpd_ps(_mm512_extractf64x4_pd(abcd, 1)));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#elif defined(MOE_EXT_ISA_AVX2)

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec all(float value) { return {_mm256_set1_ps(value)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static Vec load(const Float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(Float16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(BFloat16* p) const {  // as from_float does it
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i chosen = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1)));
  }
  float sum() const {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  Vec power_of_two() const {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
  }
  Vec rounded() const { return {_mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  Vec clamped(float low, float high) const {
    return {_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), v))};
  }
};
static inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

// sums[0..3] = the sums of a, b, c, d.
static inline void sums_of(Vec a, Vec b, Vec c, Vec d, float* sums) {
  const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}

#else  // portable: fixed-length loops that any compiler turns into what the machine has

struct Vec {
  static constexpr int kLanes = 4;
  float v[kLanes];

  static Vec zero() { return all(0.0f); }
  static Vec all(float value) {
    Vec r;
    for (float& lane : r.v) lane = value;
    return r;
  }
  template <typename T>
  static Vec load(const T* p) {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  template <typename T>
  void store(T* p) const {
    for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
  }
  float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  Vec power_of_two() const {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = v[i] == v[i] ? ldexpf(1.0f, static_cast<int>(v[i])) : v[i];
    return r;
  }
  Vec rounded() const {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = nearbyintf(v[i]);
    return r;
  }
  Vec clamped(float low, float high) const {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = v[i] < low ? low : v[i] > high ? high : v[i];
    return r;
  }
};
#define MOE_EXT_LANEWISE(op)                                         \
  static inline Vec operator op(Vec a, Vec b) {                      \
    Vec r;                                                           \
    for (int i = 0; i < Vec::kLanes; ++i) r.v[i] = a.v[i] op b.v[i]; \
    return r;                                                        \
  }
MOE_EXT_LANEWISE(+)
MOE_EXT_LANEWISE(-)
MOE_EXT_LANEWISE(*)
MOE_EXT_LANEWISE(/)
#undef MOE_EXT_LANEWISE
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

// sums[0..3] = the sums of a, b, c, d.
static inline void sums_of(Vec a, Vec b, Vec c, Vec d, float* sums) {
  sums[0] = a.sum();
  sums[1] = b.sum();
  sums[2] = c.sum();
  sums[3] = d.sum();
}

#endif

// e^x to 2 ulp on [-87, 88]; below it stays at e^-87 and above at e^88, which every use here rounds away. NaN stays
// NaN. x = n ln 2 + r with |r| <= ln 2 / 2, then the Taylor polynomial of e^r to degree 7 (remainder under 2^-26 of the
// value).
static inline Vec exp(Vec x) {
  x = x.clamped(-87.0f, 88.0f);
  const Vec n = (x * Vec::all(1.44269504088896341f)).rounded();
  Vec r = fma(n, Vec::all(-0.693145751953125f), x);  // ln 2 in two parts, so that n * high is exact
  r = fma(n, Vec::all(-1.42860682030941723e-6f), r);
  Vec y = Vec::all(1.0f / 5040.0f);
  y = fma(y, r, Vec::all(1.0f / 720.0f));
  y = fma(y, r, Vec::all(1.0f / 120.0f));
  y = fma(y, r, Vec::all(1.0f / 24.0f));
  y = fma(y, r, Vec::all(1.0f / 6.0f));
  y = fma(y, r, Vec::all(0.5f));
  y = fma(y, r, Vec::all(1.0f));
  y = fma(y, r, Vec::all(1.0f));
  return y * n.power_of_two();
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
