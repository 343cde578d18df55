// Loops::widen and Loops::narrow: rows to float32 and back; vectors and the scalars of numeric.h round the same way.
#pragma once

#include "cpu/numeric.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

static void widen(DType dtype, const void* src, float* dst, int64_t n) {
  with_type(dtype, [&](auto* type) {
    const auto* typed = static_cast<const Pointee<decltype(type)>*>(src);
    int64_t i = 0;
    for (; i + Vec::kLanes <= n; i += Vec::kLanes) Vec::load(typed + i).store(dst + i);
    for (; i < n; ++i) dst[i] = to_float(typed[i]);
  });
}

static void narrow(DType dtype, const float* src, void* dst, int64_t n) {
  with_type(dtype, [&](auto* type) {
    auto* typed = static_cast<decltype(type)>(dst);
    int64_t i = 0;
    for (; i + Vec::kLanes <= n; i += Vec::kLanes) Vec::load(src + i).store(typed + i);
    for (; i < n; ++i) from_float(src[i], typed + i);
  });
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
