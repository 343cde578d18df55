// The three floating-point types: their sizes, the choice of one at run time, and scalar conversions between float32
// and the 16-bit ones. `static`, so that a copy compiled for a newer instruction set is never linked into code that
// must run without it.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "moe.h"

namespace moe_ext::cpu {

static inline const char* offset(const void* data, DType dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * element_size(dtype);
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls f(typed null pointer) for the C++ type of `dtype`.
template <typename F>
static inline void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
  }
}

template <typename Pointer>
using Pointee = std::remove_pointer_t<Pointer>;

static inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float to_float(float value) { return value; }

static inline float to_float(BFloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

static inline float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));  // inf, NaN
  if (magnitude < 0x0400u) {  // zero, subnormal: magnitude * 2^-24 is exact in float32
    const float scaled = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return float_of_bits(sign | bits_of_float(scaled));
  }
  return float_of_bits(sign | ((magnitude << 13) + 0x38000000u));
}

// Round to nearest, ties to even; NaN stays NaN.
static inline void from_float(float value, float* out) { *out = value; }

static inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

static inline void from_float(float value, Float16* out) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;  // at least 65536: inf (65520 to 65536 round to inf below)
  } else if (magnitude < 0x38800000u) {
    // Subnormal result: adding 0.5 puts the value's units of 2^-24 into the low mantissa bits, rounded by the FPU.
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace moe_ext::cpu
