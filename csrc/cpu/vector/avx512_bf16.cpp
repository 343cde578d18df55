// The hot loops for AVX-512 with BF16 dot products and those of bytes, VNNI (Cooper Lake, Sapphire Rapids, Zen 4 and
// later).
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx2,fma,f16c")
#endif
// GCC 12's own AVX-512 header reads an undefined register on purpose and warns about it (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define MOE_EXT_ISA avx512_bf16
#define MOE_EXT_ISA_AVX512
#define MOE_EXT_ISA_AVX512_BF16
#define MOE_EXT_BYTE_VNNI
#include "cpu/vector/loops_inl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace moe_ext::cpu {
extern const Loops kAvx512Bf16Loops = avx512_bf16::kLoops;
}  // namespace moe_ext::cpu

#endif
