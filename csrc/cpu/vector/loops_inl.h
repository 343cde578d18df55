// The bodies of the loops declared in loops.h, and the table of them. avx512.cpp and its like define MOE_EXT_ISA (a
// namespace name) and include this once. No standard C++ headers with functions in what is included here: a function
// compiled for AVX-512 must not become the program's only copy.
#pragma once

#include "cpu/vector/activation_inl.h"
#include "cpu/vector/byte_rows_inl.h"
#include "cpu/vector/conversion_inl.h"
#include "cpu/vector/energy_inl.h"
#include "cpu/vector/gram_inl.h"
#include "cpu/vector/multiply_inl.h"
#include "cpu/vector/project_inl.h"
#include "cpu/vector/scatter_inl.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

static constexpr Loops kLoops = {kBFloat16Operands, widen,  multiply, gate,    energy,
                                 scatter,           narrow, gram,     project, quantise};

}  // namespace moe_ext::cpu::MOE_EXT_ISA
