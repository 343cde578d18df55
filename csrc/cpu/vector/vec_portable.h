// Vec for any processor: 4 floats of the vector extension that GCC and Clang have, which they turn into what the
// machine has. (In arrays of 4 GCC 12 keeps them in memory, where every step of a product waits for the stores of the
// one before.) Included only by vec.h.
#pragma once

#include <math.h>

#include "cpu/numeric.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

struct Vec {
  static constexpr int kLanes = 4;
  typedef float Lanes __attribute__((vector_size(4 * sizeof(float))));
  Lanes v;

  static Vec zero() { return all(0.0f); }
  static Vec all(float value) { return {Lanes{value, value, value, value}}; }
  static Vec load(const float* p) {
    Vec r;
    memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  template <typename T>
  static Vec load(const T* p) {
    Vec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  void store(float* p) const { memcpy(p, &v, sizeof(v)); }
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
static inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
static inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
static inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
static inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// Fused where the target has it (ARM, POWER); elsewhere a library call each, and twice rounded instead.
static inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__FP_FAST_FMAF)
  Vec r;
  for (int i = 0; i < Vec::kLanes; ++i) r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
#else
  return a * b + c;
#endif
}

// sums[0..3] = the sums of a, b, c, d.
static inline void sums_of(Vec a, Vec b, Vec c, Vec d, float* sums) {
  sums[0] = a.sum();
  sums[1] = b.sum();
  sums[2] = c.sum();
  sums[3] = d.sum();
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
