// Conversions between float32 and the 16-bit types: all 65536 patterns one way, every rounding boundary the other way.
// The references are ldexp for the value of a pattern and a search among all values for the nearest one.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/numeric.h"
#include "cpu/vector/loops.h"
#include "setting.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

using moe_ext::cpu::BFloat16;
using moe_ext::cpu::Float16;
using setting::DType;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename T>
struct Format;  // 1 sign bit, then kExponentBits, then kMantissaBits
template <>
struct Format<BFloat16> {
  static constexpr int kExponentBits = 8, kMantissaBits = 7;
};
template <>
struct Format<Float16> {
  static constexpr int kExponentBits = 5, kMantissaBits = 10;
};

template <typename T>
T pattern(uint32_t bits) {
  return T{static_cast<uint16_t>(bits)};
}

// From the definition of a binary interchange format (IEEE 754).
template <typename T>
double value_of(uint32_t bits) {
  constexpr int mantissa_bits = Format<T>::kMantissaBits, bias = (1 << (Format<T>::kExponentBits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << Format<T>::kExponentBits) - 1);
  const int mantissa = static_cast<int>(bits) & ((1 << mantissa_bits) - 1);
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == (1 << Format<T>::kExponentBits) - 1) return mantissa == 0 ? sign * kInfinity : std::nan("");
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

// The pattern nearest to a non-negative float, ties to the even pattern: by search in the ordered list of all values,
// where infinity stands at what would be the next power of two.
template <typename T>
uint16_t nearest(float value) {
  static const std::vector<double> values = [] {
    constexpr uint32_t infinity = ((1u << Format<T>::kExponentBits) - 1) << Format<T>::kMantissaBits;
    std::vector<double> all;
    for (uint32_t bits = 0; bits < infinity; ++bits) all.push_back(value_of<T>(bits));
    all.push_back(std::ldexp(1.0, 1 << (Format<T>::kExponentBits - 1)));
    return all;
  }();
  const auto above = std::lower_bound(values.begin(), values.end(), static_cast<double>(value));
  if (above == values.end()) return static_cast<uint16_t>(values.size() - 1);
  const auto index = static_cast<uint16_t>(above - values.begin());
  if (*above == value) return index;
  const double to_above = *above - value, to_below = value - values[index - 1];
  if (to_above == to_below) return index % 2 == 0 ? index : static_cast<uint16_t>(index - 1);
  return to_above < to_below ? index : static_cast<uint16_t>(index - 1);
}

template <typename T>
uint16_t rounded(float value) {
  T result;
  moe_ext::cpu::from_float(value, &result);
  return result.bits;
}

template <typename T>
void check_rounds_to_nearest(float value) {
  const uint16_t expected = nearest<T>(value);
  CHECK(rounded<T>(value) == expected, value, " gave ", rounded<T>(value), ", expected ", expected);
  CHECK(rounded<T>(-value) == (expected | 0x8000u), -value, " gave ", rounded<T>(-value));
}

template <typename T>
void check_every_pattern() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = moe_ext::cpu::to_float(pattern<T>(bits));
    const double expected = value_of<T>(bits);
    if (std::isnan(expected)) {
      CHECK(std::isnan(value), "pattern ", bits, " gave ", value);
      CHECK(std::isnan(value_of<T>(rounded<T>(value))), "NaN pattern ", bits, " came back as ", rounded<T>(value));
    } else {
      CHECK(static_cast<double>(value) == expected, "pattern ", bits, " gave ", value, ", expected ", expected);
      CHECK(rounded<T>(value) == bits, "pattern ", bits, " came back as ", rounded<T>(value));
    }
  }
}

template <typename T>
void check_every_boundary() {
  for (uint32_t bits = 0; std::isfinite(value_of<T>(bits)); ++bits) {
    const double low = value_of<T>(bits);
    const double high = std::isfinite(value_of<T>(bits + 1)) ? value_of<T>(bits + 1) : 2 * low - value_of<T>(bits - 1);
    const float middle = static_cast<float>((low + high) / 2);  // exact: float32 has at least one bit more
    for (const float value : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, kInfinity)}) {
      check_rounds_to_nearest<T>(value);
    }
  }
}

template <typename T>
void check_random_floats() {
  setting::Random random(1);
  for (int i = 0; i < 1000000; ++i) {
    const float value = moe_ext::cpu::float_of_bits(random.bits() & 0x7fffffffu);
    if (!std::isnan(value)) check_rounds_to_nearest<T>(value);
  }
  check_rounds_to_nearest<T>(kInfinity);
}

// NaNs have many patterns; which one comes out is not specified.
bool same(float a, float b) {
  return std::isnan(a) ? std::isnan(b) : moe_ext::cpu::bits_of_float(a) == moe_ext::cpu::bits_of_float(b);
}

}  // namespace

TEST("every bfloat16 pattern has its value as a float and comes back") { check_every_pattern<BFloat16>(); }
TEST("every float16 pattern has its value as a float and comes back") { check_every_pattern<Float16>(); }
TEST("floats at every boundary round to the nearest bfloat16, ties to even") { check_every_boundary<BFloat16>(); }
TEST("floats at every boundary round to the nearest float16, ties to even") { check_every_boundary<Float16>(); }
TEST("random floats round to the nearest bfloat16") { check_random_floats<BFloat16>(); }
TEST("random floats round to the nearest float16") { check_random_floats<Float16>(); }

TEST("a NaN stays a NaN of the same sign") {
  for (const uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffc00000u, 0xffffffffu}) {
    const float nan = moe_ext::cpu::float_of_bits(bits);
    CHECK(std::isnan(value_of<BFloat16>(rounded<BFloat16>(nan))), "bits ", bits, " to bfloat16");
    CHECK(std::isnan(value_of<Float16>(rounded<Float16>(nan))), "bits ", bits, " to float16");
    CHECK(rounded<BFloat16>(nan) >> 15 == bits >> 31, "bits ", bits, " to bfloat16");
    CHECK(rounded<Float16>(nan) >> 15 == bits >> 31, "bits ", bits, " to float16");
  }
}

#if defined(__x86_64__)
__attribute__((target("avx,f16c"))) static uint16_t rounded_by_processor(float value) {
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
}

TEST("floats all over the range round to the float16 that the processor gives") {
  if (!__builtin_cpu_supports("f16c")) return;
  for (uint64_t bits = 0; bits < 1ull << 32; bits += 97) {
    const float value = moe_ext::cpu::float_of_bits(static_cast<uint32_t>(bits));
    if (std::isnan(value)) continue;
    CHECK(rounded<Float16>(value) == rounded_by_processor(value), value, " gave ", rounded<Float16>(value));
  }
}
#endif

TEST("every instruction set converts like the scalar functions, in vectors and in what is left over") {
  constexpr int64_t count = 65536;
  std::vector<uint16_t> patterns(count);
  for (int64_t i = 0; i < count; ++i) patterns[i] = static_cast<uint16_t>(i);
  setting::with_every_isa([&](const char* isa) {
    const moe_ext::cpu::Loops& loops = moe_ext::cpu::active_loops();
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      const auto scalar = [&](int64_t i) {
        return dtype == DType::kBFloat16 ? moe_ext::cpu::to_float(pattern<BFloat16>(patterns[i]))
                                         : moe_ext::cpu::to_float(pattern<Float16>(patterns[i]));
      };
      for (const int64_t n : {count, count - 1, int64_t{1}}) {
        std::vector<float> wide(n);
        loops.widen(dtype, patterns.data(), wide.data(), n);
        for (int64_t i = 0; i < n; ++i) CHECK(same(wide[i], scalar(i)), isa, " widens pattern ", i, " to ", wide[i]);
        std::vector<uint16_t> narrow(n);
        loops.narrow(dtype, wide.data(), narrow.data(), n);
        for (int64_t i = 0; i < n; ++i) {
          CHECK(narrow[i] == patterns[i] || std::isnan(wide[i]), isa, " narrows ", wide[i], " to ", narrow[i]);
        }
      }
      // Floats that are no 16-bit values: vectors and scalars must round the same way.
      setting::Random random(2);
      std::vector<float> floats(4099);
      for (float& value : floats) value = random.between(-3.0f, 3.0f);
      std::vector<uint16_t> narrow(floats.size());
      loops.narrow(dtype, floats.data(), narrow.data(), static_cast<int64_t>(floats.size()));
      for (size_t i = 0; i < floats.size(); ++i) {
        const uint16_t expected =
            dtype == DType::kBFloat16 ? rounded<BFloat16>(floats[i]) : rounded<Float16>(floats[i]);
        CHECK(narrow[i] == expected, isa, " narrows ", floats[i], " to ", narrow[i], ", expected ", expected);
      }
    }
  });
}
