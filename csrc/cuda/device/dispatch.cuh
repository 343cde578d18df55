// From values that are known when a kernel is launched to template arguments, for every dtype and product in one place.
// `body` gets a value whose type is the argument:
//   for_dtype(p.dtype, [&](auto type) { launch_typed<decltype(type)>(p, stream); });
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/params.h"

namespace moe_ext::cuda {

// The types that the tensor cores multiply: `dtype` is not float32.
template <typename Body>
void for_16_bit_dtype(DType dtype, const Body& body) {
  dtype == DType::kBFloat16 ? body(__nv_bfloat16{}) : body(__half{});
}

template <typename Body>
void for_dtype(DType dtype, const Body& body) {
  dtype == DType::kFloat32 ? body(float{}) : for_16_bit_dtype(dtype, body);
}

// body(row, type): rows of a layer of `dtype` are of the same type, or float32 (PositionRows).
template <typename Body>
void for_row_dtype(DType row_dtype, DType dtype, const Body& body) {
  for_dtype(dtype, [&](auto type) { row_dtype == DType::kFloat32 ? body(float{}, type) : body(type, type); });
}

// `type` is not kPlain.
template <typename Body>
void for_weight_type(WeightType type, const Body& body) {
  switch (type) {
    case WeightType::kInt8:
      return body(std::integral_constant<WeightType, WeightType::kInt8>{});
    case WeightType::kInt4:
      return body(std::integral_constant<WeightType, WeightType::kInt4>{});
    case WeightType::kFloat8:
      return body(std::integral_constant<WeightType, WeightType::kFloat8>{});
    default:
      return body(std::integral_constant<WeightType, WeightType::kMxfp4>{});
  }
}

template <typename Body>
void for_product(Product product, const Body& body) {
  product == Product::kGateUp ? body(std::integral_constant<Product, Product::kGateUp>{})
                              : body(std::integral_constant<Product, Product::kDown>{});
}

}  // namespace moe_ext::cuda
