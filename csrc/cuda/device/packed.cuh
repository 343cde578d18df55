// Quantised weights, packed as in moe.h, on their way to the tensor cores. A line, 64 bytes of a row, is four lanes' 16
// bytes each, and those are the lane's part of an mma operand after a few instructions: a step is 32 columns, two
// m16n8k16, in which the lane has four pairs of neighbouring columns. Which columns these are follows from the bytes'
// order; the activations' operand is made of the same ones, 8 neighbouring elements of a row that lie in one 16-byte
// chunk:
//   four bits (128 columns a line)   step s: columns 32 s + 8 t + 0..7, t = lane % 4: chunk 4 s + t
//   eight bits (64 columns)          step s: columns 16 t + 8 s + 0..7:               chunk 2 t + s
// Values come out as they are stored, without scales: all of them are exact in bf16 and fp16, and products with
// activations are exact in float32. Scales are applied to sums, in float32, but for those of groups where wgmma reads
// the weights (gemm_wgmma_packed.cu).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/params.h"
#include "moe.h"

namespace moe_ext::cuda {

template <WeightType kType>
inline constexpr int kLineColumns = line_columns(kType);
inline constexpr int kStepColumns = 32;
template <WeightType kType>
inline constexpr int kStepsPerLine = kLineColumns<kType> / kStepColumns;
// Steps that have one scale, whatever the groups: scales are applied after so many.
template <WeightType kType>
inline constexpr int kStepsPerScale = has_four_bits(kType) ? 1 : 2;

// The chunk of 8 activations of this lane in a step, counted from the line's first column.
template <WeightType kType>
__device__ __forceinline__ int chunk_of_lane(int step) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  return has_four_bits(kType) ? 4 * step + t : 2 * t + step;
}

// Both elements of a pair.
template <typename T>
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162, __half2>;
  Pair x, y;
  memcpy(&x, &a, sizeof(x));
  memcpy(&y, &b, sizeof(y));
  const Pair difference = __hsub2(x, y);
  uint32_t bits;
  memcpy(&bits, &difference, sizeof(bits));
  return bits;
}

template <typename T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162, __half2>;
  Pair x, y;
  memcpy(&x, &a, sizeof(x));
  memcpy(&y, &b, sizeof(y));
  const Pair product = __hmul2(x, y);
  uint32_t bits;
  memcpy(&bits, &product, sizeof(bits));
  return bits;
}

// (a & b) | c in one instruction also where b and c are constants, for which the compiler makes two.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t bits;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(bits) : "r"(a), "r"(b), "r"(c));
  return bits;
}

// 128 + n in bf16 (n < 128), 1024 + n in fp16 (n < 1024), in both elements of a pair: n is the lowest bits.
template <typename T>
inline constexpr uint32_t kIntegers = std::is_same_v<T, __nv_bfloat16> ? 0x43004300u : 0x64006400u;

// What an int4 zero point is to values_of().
template <typename T>
__device__ __forceinline__ uint32_t zero_pair(uint32_t zero) {
  return kIntegers<T> + zero * 0x00010001u;
}

// Bits 0 to 3, and 16 to 19, as integers minus the zero point.
template <typename T>
__device__ __forceinline__ uint32_t int4_pair(uint32_t bits, uint32_t zero) {
  return subtract_pairs<T>(and_or(bits, 0x000f000fu, kIntegers<T>), zero);
}

// Bits 12 to 15, and 28 to 31, as e2m1: exponent and mantissa move to where T has its lowest bits of the exponent, and
// a product by a power of two corrects the bias, of the subnormal 0.5, too.
template <typename T>
__device__ __forceinline__ uint32_t e2m1_pair(uint32_t bits) {
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  const uint32_t magnitude = kBFloat16 ? bits >> 6 & 0x01c001c0u : bits >> 3 & 0x0e000e00u;
  return multiply_pairs<T>((bits & 0x80008000u) | magnitude, kBFloat16 ? 0x7e807e80u : 0x74007400u);  // 2^126, 2^14
}

// Byte `first` of four, and the next.
template <typename T, int kFirst>
__device__ __forceinline__ uint32_t int8_pair(uint32_t bytes) {
  constexpr unsigned kSelect = kFirst == 0 ? 0x4140 : 0x4342;  // {kFirst, of the constant, kFirst + 1, of the constant}
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    // 128 + the lower seven bits, minus 128 or, with the sign bit, 256.
    const uint32_t pair = __byte_perm(bytes, kIntegers<T> | kIntegers<T> >> 8, kSelect);
    return subtract_pairs<T>(pair & 0xff7fff7fu, pair & 0xff80ff80u);
  } else {
    const uint32_t pair = __byte_perm(bytes ^ 0x80808080u, kIntegers<T> | kIntegers<T> >> 8, kSelect);
    return subtract_pairs<T>(pair, 0x64806480u);  // 1024 + 128
  }
}

// What e4m3_pair() multiplies by: NaN if one of the eight bytes is (0x7f and 0xff), and then so are all of them, of the
// same row: their sum is.
template <typename T>
__device__ __forceinline__ uint32_t e4m3_factor(uint32_t bytes, uint32_t more) {
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  const uint32_t carries = (((bytes & 0x7f7f7f7fu) + 0x01010101u) | ((more & 0x7f7f7f7fu) + 0x01010101u)) & 0x80808080u;
  return carries != 0 ? 0x7fff7fffu : kBFloat16 ? 0x7b807b80u : 0x5c005c00u;  // 2^120, 2^8
}

// The same of e4m3, as e2m1_pair().
template <typename T, int kFirst>
__device__ __forceinline__ uint32_t e4m3_pair(uint32_t bytes, uint32_t factor) {
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  const uint32_t pair = __byte_perm(bytes, 0, kFirst == 0 ? 0x1404 : 0x3424);  // in the upper bytes
  const uint32_t magnitude = kBFloat16 ? pair >> 4 & 0x07f007f0u : pair >> 1 & 0x3f803f80u;
  return multiply_pairs<T>((pair & 0x80008000u) | magnitude, factor);
}

// The lane's four pairs of a step of its 16 bytes. `zero`: of int4, as zero_pair() gives it.
template <WeightType kType, typename T>
__device__ __forceinline__ void values_of(const uint4& line, int step, [[maybe_unused]] uint32_t zero,
                                          uint32_t (&pairs)[4]) {
  if constexpr (has_four_bits(kType)) {
    const uint32_t words[4] = {line.x, line.y, line.z, line.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kType == WeightType::kInt4) pairs[i] = int4_pair<T>(words[i] >> 4 * step, zero);
      if constexpr (kType == WeightType::kMxfp4) pairs[i] = e2m1_pair<T>(words[i] << (12 - 4 * step));
    }
  } else {
    const uint32_t first = step == 0 ? line.x : line.z, second = step == 0 ? line.y : line.w;
    if constexpr (kType == WeightType::kInt8) {
      pairs[0] = int8_pair<T, 0>(first), pairs[1] = int8_pair<T, 2>(first);
      pairs[2] = int8_pair<T, 0>(second), pairs[3] = int8_pair<T, 2>(second);
    } else {
      const uint32_t factor = e4m3_factor<T>(first, second);
      pairs[0] = e4m3_pair<T, 0>(first, factor), pairs[1] = e4m3_pair<T, 2>(first, factor);
      pairs[2] = e4m3_pair<T, 0>(second, factor), pairs[3] = e4m3_pair<T, 2>(second, factor);
    }
  }
}

// ---- scales

__device__ __forceinline__ float scale_of_bits(ScaleType type, uint32_t bits) {
  switch (type) {
    case ScaleType::kFloat32:
      return __uint_as_float(bits);
    case ScaleType::kBFloat16:
      return __uint_as_float(bits << 16);
    case ScaleType::kFloat16:
      return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    case ScaleType::kE8M0:
      break;
  }
  // 2^-127 is subnormal, 255 is NaN.
  return __uint_as_float(bits == 0 ? 0x00400000u : bits == 255 ? 0x7fffffffu : bits << 23);
}

__device__ __forceinline__ float scale_at(const Quantisation& q, int64_t index) {
  if (q.scale_type == ScaleType::kFloat32) return __ldg(static_cast<const float*>(q.scales) + index);
  const uint32_t bits = q.scale_type == ScaleType::kE8M0 ? __ldg(static_cast<const uint8_t*>(q.scales) + index)
                                                         : __ldg(static_cast<const uint16_t*>(q.scales) + index);
  return scale_of_bits(q.scale_type, bits);
}

// Where the scales of a row of an expert begin.
__device__ __forceinline__ int64_t scales_of_row(const Quantisation& q, int expert, int row) {
  return (int64_t{expert} * q.scale_rows + (row >> q.row_shift)) * q.groups;
}

// ---- one weight

__device__ __forceinline__ float e2m1(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 1 & 3), mantissa = static_cast<int>(bits & 1);
  const float magnitude =
      exponent == 0 ? 0.5f * static_cast<float>(mantissa) : static_cast<float>((2 + mantissa) << (exponent - 1)) * 0.5f;
  return (bits & 8) != 0 ? -magnitude : magnitude;
}

__device__ __forceinline__ float e4m3(uint32_t bits) {
  // 2^120 times what float32 reads in these bits; 0x7f and 0xff are NaN.
  if ((bits & 0x7f) == 0x7f) return __uint_as_float(0x7fffffffu);
  return __uint_as_float((bits & 0x80) << 24 | (bits & 0x7f) << 20) * 0x1p120f;
}

// A column of a row whose bytes, and whose scales, begin there.
__device__ __forceinline__ float weight_at(const Quantisation& q, const uint8_t* row, int64_t scales, int64_t column) {
  const int64_t at = scales + (column >> q.group_shift);
  const float scale = scale_at(q, at);
  if (q.type == WeightType::kInt8) return static_cast<float>(static_cast<int8_t>(row[column])) * scale;
  if (q.type == WeightType::kFloat8) return e4m3(row[column]) * scale;
  const int of_line = static_cast<int>(column % 128), quarter = of_line / 32;
  const uint8_t byte = row[column / 128 * 64 + of_line % 32 * 2 + quarter / 2];
  const uint32_t bits = byte >> quarter % 2 * 4 & 15;
  if (q.type == WeightType::kMxfp4) return e2m1(bits) * scale;
  const int zero = q.zeros == nullptr ? 8 : q.zeros[at];
  return static_cast<float>(static_cast<int>(bits) - zero) * scale;
}

}  // namespace moe_ext::cuda
