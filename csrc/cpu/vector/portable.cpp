// The hot loops in plain C++, for any processor.
#define MOE_EXT_ISA portable
#include "cpu/vector/loops_inl.h"

namespace moe_ext::cpu {
extern const Loops kPortableLoops = portable::kLoops;
}  // namespace moe_ext::cpu
