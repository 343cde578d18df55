// Conversions, activations, and sums and scans over a warp, that the kernels share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdint>
#include <type_traits>

#include "cuda/params.h"
#include "moe.h"

namespace moe_ext::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) return value;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
}

// Two neighbouring 16-bit elements in a register.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    __nv_bfloat162 pair;
    memcpy(&pair, &bits, sizeof(bits));
    return __bfloat1622float2(pair);
  } else {
    __half2 pair;
    memcpy(&pair, &bits, sizeof(bits));
    return __half22float2(pair);
  }
}

// kExact: to float32 accuracy. Otherwise silu to a few 2^-24 (1 + |x|) of its value, for results that are rounded to 16
// bits; below x = -87, where it is less than 1e-36, it may be 0.
template <bool kExact>
__device__ __forceinline__ float silu(float x) {
  if constexpr (kExact) return x / (1.0f + expf(-x));
  return __fdividef(x, 1.0f + __expf(-x));
}

template <bool kExact>
__device__ __forceinline__ float activate(Activation activation, float x) {
  if (activation == Activation::kSilu) return silu<kExact>(x);  // first: a layer's usual one
  switch (activation) {
    case Activation::kSilu:
      break;
    case Activation::kGeluErf:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu2:
      return x > 0.0f ? x * x : 0.0f * x;  // a NaN stays one
  }
  return x;
}

// act(gate) * up of two neighbouring elements, to be rounded to 16 bits.
__device__ __forceinline__ float2 gated(Activation activation, const float* gate, const float* up) {
  if (activation == Activation::kSilu) return {silu<false>(gate[0]) * up[0], silu<false>(gate[1]) * up[1]};
  return {activate<false>(activation, gate[0]) * up[0], activate<false>(activation, gate[1]) * up[1]};
}

__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }  // a NaN stays one

// Gate and up of an element for h = act(gate) * up, from what the products gave.
__device__ __forceinline__ void shape(const Shaping& s, float& gate, float& up) {
  gate = at_most(gate, s.gate_limit);
  up = at_most(up < -s.up_limit ? -s.up_limit : up, s.up_limit);
  float factor = s.inverse_scale;
  if (s.capped) {
    if (s.up_cap != Formula::kNone) up = s.up_cap * tanhf(up / s.up_cap);
    if (s.gate_cap != Formula::kNone && gate != 0.0f) factor *= s.gate_cap * tanhf(gate / s.gate_cap) / gate;
  }
  up = (up + s.offset) * factor;
  gate *= s.scale;
}

// act(x) of a projection without gate, or x, to be rounded to 16 bits.
__device__ __forceinline__ float activate_alone(const GemmParams& p, float x) {
  if (p.activation == Activation::kRelu2) return activate<false>(Activation::kRelu2, x);
  if (p.activation == Activation::kSilu) {
    return activate<false>(Activation::kSilu, x * p.shaping.scale) * p.shaping.inverse_scale;
  }
  return x;
}

// An element of a bias, 0 where there is none.
template <typename T>
__device__ __forceinline__ float bias_at(const void* bias, int64_t at) {
  return bias == nullptr ? 0.0f : to_float(static_cast<const T*>(bias)[at]);
}

// sum += weight * h^2, but nothing of a position that is not counted, whose h need not be a number.
__device__ __forceinline__ void add_energy(float weight, float h, float& sum) {
  if (!(weight < 0.0f)) sum += weight * (h * h);
}
__device__ __forceinline__ void add_energy(float weight, float2 h, float2& sum) {
  add_energy(weight, h.x, sum.x);
  add_energy(weight, h.y, sum.y);
}

// Sum over the warp, the same in every lane, in a fixed order.
template <typename Number>
__device__ __forceinline__ Number warp_sum(Number value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// Sum over the warp's lanes up to and with this one.
__device__ __forceinline__ int warp_inclusive_sum(int value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

// Expert index of a slot; the sentinel is num_experts. An index outside [0, num_experts] cannot be reported by the host
// without waiting for the device, so it stops the kernel, as in torch's own indexing.
__device__ __forceinline__ int expert_of(const void* experts, bool is_int64, int64_t slot, int64_t num_experts) {
  const int64_t expert =
      is_int64 ? static_cast<const int64_t*>(experts)[slot] : int64_t{static_cast<const int32_t*>(experts)[slot]};
  assert(expert >= 0 && expert <= num_experts && "moe_ext: 'experts' holds an index outside 0 to E");
  return static_cast<int>(expert);
}

__device__ __forceinline__ float weight_of(const void* weights, DType dtype, int64_t slot) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(weights)[slot];
    case DType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(weights)[slot]);
    case DType::kFloat16:
      return to_float(static_cast<const __half*>(weights)[slot]);
  }
  return 0.0f;
}

}  // namespace moe_ext::cuda
