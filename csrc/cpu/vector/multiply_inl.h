// Loops::multiply: a product by the type and layout of its weights, and its bias.
#pragma once

#include <type_traits>

#include "cpu/numeric.h"
#include "cpu/vector/byte_rows_inl.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/product_inl.h"
#if defined(MOE_EXT_ISA_AVX512)
#include "cpu/vector/packed_inl.h"
#else
#include "cpu/vector/quantised_inl.h"
#endif
#include "cpu/vector/transposed_inl.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

template <typename W>
static void add_bias(const Product& p) {
  float bias[kBlockColumns] = {};
  for (int64_t n = 0; n < p.columns; ++n) {
    bias[n] = to_float(n < p.bias.split ? static_cast<const W*>(p.bias.first)[n]
                                        : static_cast<const W*>(p.bias.second)[n - p.bias.split]);
  }
  for (int64_t r = 0; r < p.row_count; ++r) {
    float* y = p.y + r * kBlockColumns;
    for (int64_t n = 0; n < p.columns; ++n) y[n] += bias[n];
  }
}

static void multiply(DType dtype, const Product& p) {
  with_type(dtype, [&](auto* type) {
    using W = Pointee<decltype(type)>;
    using A = std::conditional_t<kBFloat16Operands && std::is_same_v<W, BFloat16>, BFloat16, float>;
    if (p.byte_rows) {
      multiply_bytes(p);
    } else if (p.quantised != nullptr) {
#if defined(MOE_EXT_ISA_AVX512_BF16)
      if constexpr (std::is_same_v<A, float>) return kAvx512Loops.multiply(dtype, p);  // which has the same
#endif
#if defined(MOE_EXT_ISA_AVX512)
      multiply_packed<A>(p);
#else
      QuantisedBlock<A>{p}.run();
#endif
    } else if (p.transposed != 0) {
      TransposedBlock<A, W>{p}.run();
    } else {
      Block<A, W>{p}.run();
    }
    if (p.bias.first != nullptr) add_bias<W>(p);
  });
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
