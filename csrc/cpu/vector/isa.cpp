// Which compiled variant of the hot loops runs: the best that the processor has, or the one that MOE_EXT_ISA names.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/vector/loops.h"
#include "moe.h"

namespace moe_ext::cpu {
namespace {

struct Variant {
  const char* name;
  bool (*runs_here)();
  const Loops* loops;  // null: not compiled for this machine
};

// The variants for x86-64 keep their names elsewhere, so that asking for one is refused as what does not run here.
#if defined(__x86_64__)
#define MOE_EXT_X86(name, condition, loops) {name, [] { return static_cast<bool>(condition); }, loops}

// With words and short vectors, which all processors but the first with AVX-512 (Knights Landing) have.
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#else
#define MOE_EXT_X86(name, condition, loops) {name, [] { return false; }, nullptr}
#endif

const Variant kVariants[kIsaCount] = {
    MOE_EXT_X86("avx512_bf16",
                has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"),
                &kAvx512Bf16Loops),
    MOE_EXT_X86("avx512", has_avx512(), &kAvx512Loops),
    MOE_EXT_X86("avx2",
                __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
                &kAvx2Loops),
    {"portable", [] { return true; }, &kPortableLoops},
};
#undef MOE_EXT_X86

}  // namespace

const char* isa_name(int isa) { return kVariants[isa].name; }

bool isa_runs_here(int isa) { return kVariants[isa].runs_here(); }

int active_isa() {
  const char* forced = std::getenv("MOE_EXT_ISA");
  const bool any = forced == nullptr || *forced == '\0';
  std::string known;
  for (int isa = 0; isa < kIsaCount; ++isa) {
    const bool wanted = any || std::string(forced) == isa_name(isa);
    if (wanted && isa_runs_here(isa)) return isa;
    if (wanted && !any)
      throw std::runtime_error(std::string("MOE_EXT_ISA=") + forced + " does not run on this processor");
    known += (isa == 0 ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::runtime_error(std::string("MOE_EXT_ISA=") + forced + " is unknown; the variants are " + known);
}

const Loops& active_loops() { return *kVariants[active_isa()].loops; }

}  // namespace moe_ext::cpu
