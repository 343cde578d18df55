// The hot loops for AVX2 + FMA + F16C (Haswell, Zen and later).
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define MOE_EXT_ISA avx2
#define MOE_EXT_ISA_AVX2
#include "cpu/vector/loops_inl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace moe_ext::cpu {
extern const Loops kAvx2Loops = avx2::kLoops;
}  // namespace moe_ext::cpu

#endif
