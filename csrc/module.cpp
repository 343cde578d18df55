// Python module moe_ext._C: what was built and what would run here. Loading it also registers the operators of ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "moe.h"

namespace {

// (name, runs on this processor), best first.
std::vector<std::pair<std::string, bool>> cpu_variants() {
  std::vector<std::pair<std::string, bool>> variants;
  for (int isa = 0; isa < moe_ext::cpu::kIsaCount; ++isa) {
    variants.emplace_back(moe_ext::cpu::isa_name(isa), moe_ext::cpu::isa_runs_here(isa));
  }
  return variants;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of moe_ext; importing it registers torch.ops.moe_ext.";
  m.attr("torch_built_with") = MOE_EXT_TORCH_VERSION;
  m.attr("torch_at_least") = "2.10";
  m.attr("cuda_archs") = MOE_EXT_CUDA_ARCHS;
  m.attr("compiler") = __VERSION__;
  m.def("cpu_variants", &cpu_variants, "(name, runs on this processor) of the compiled CPU variants, best first.");
  m.def(
      "active_cpu_variant", [] { return std::string(moe_ext::cpu::isa_name(moe_ext::cpu::active_isa())); },
      "The CPU variant in use. Raises RuntimeError if MOE_EXT_ISA names one that is unknown or does not run here.");
}
