// Vec: one float32 vector type an instruction set, with the few operations that the loops need: load and store with
// conversion from and to the three floating-point types, + - * /, fma, the sum of the lanes, and what exp needs.
// Compiled once per instruction set inside its own namespace. Masked or partial loads are not offered: the loops finish
// the last elements with scalars.
#pragma once

#if defined(MOE_EXT_ISA_AVX512)
#include "cpu/vector/vec_avx512.h"
#elif defined(MOE_EXT_ISA_AVX2)
#include "cpu/vector/vec_avx2.h"
#else
#include "cpu/vector/vec_portable.h"
#endif
