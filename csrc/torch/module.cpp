// Python module moe_ext._C: what was built and what would run here. Loading it also registers the operators of ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/nodes.h"
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

// What the CUDA kernels of a layer would be; throws where there are none.
std::string cuda_kernels([[maybe_unused]] int64_t tokens, [[maybe_unused]] int64_t hidden,
                         [[maybe_unused]] int64_t intermediate, [[maybe_unused]] int64_t num_experts,
                         [[maybe_unused]] int64_t top_k, [[maybe_unused]] const std::string& dtype,
                         [[maybe_unused]] const std::string& weights) {
#ifdef MOE_EXT_WITH_CUDA
  moe_ext::ExpertsParams p{};
  p.tokens = tokens;
  p.hidden = hidden;
  p.intermediate = intermediate;
  p.num_experts = num_experts;
  p.top_k = top_k;
  if (dtype == "bfloat16") p.dtype = moe_ext::DType::kBFloat16;
  if (dtype == "float16") p.dtype = moe_ext::DType::kFloat16;
  if (weights == "int8") p.format.type = moe_ext::WeightType::kInt8;
  if (weights == "int4") p.format.type = moe_ext::WeightType::kInt4;
  if (weights == "fp8") p.format.type = moe_ext::WeightType::kFloat8;
  if (weights == "mxfp4") p.format.type = moe_ext::WeightType::kMxfp4;
  return moe_ext::cuda::describe(p);
#else
  throw std::runtime_error("moe_ext was built without CUDA kernels");
#endif
}

// (bytes of whole pages, bytes of those on their memory node) of weights at an address.
std::pair<int64_t, int64_t> place_rows(uintptr_t address, int64_t matrices, int64_t rows, int64_t row_bytes,
                                       const std::string& order) {
  using moe_ext::cpu::RowOrder;
  const RowOrder found = order == "halves"       ? RowOrder::kHalves
                         : order == "transposed" ? RowOrder::kTransposed
                                                 : RowOrder::kPlain;
  const auto placed = moe_ext::cpu::place_rows(reinterpret_cast<void*>(address), matrices, rows, row_bytes, found);
  return {placed.bytes, placed.there};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of moe_ext; importing it registers torch.ops.moe_ext.";
  m.attr("torch_built_with") = MOE_EXT_TORCH_VERSION;
  m.attr("torch_at_least") = "2.10";
  m.attr("cuda_archs") = MOE_EXT_CUDA_ARCHS;
  m.attr("compiler") = __VERSION__;
  m.def("cuda_kernels", &cuda_kernels, pybind11::arg("tokens"), pybind11::arg("hidden"), pybind11::arg("intermediate"),
        pybind11::arg("num_experts"), pybind11::arg("top_k"), pybind11::arg("dtype"), pybind11::arg("weights"),
        "Which CUDA kernels `experts` takes on the current device, and why. Raises RuntimeError where there are none.");
  m.def("cpu_variants", &cpu_variants, "(name, runs on this processor) of the compiled CPU variants, best first.");
  m.def("memory_nodes", &moe_ext::cpu::node_count, "Memory nodes (NUMA) that this process may use.");
  m.def("place_rows", &place_rows, pybind11::arg("address"), pybind11::arg("matrices"), pybind11::arg("rows"),
        pybind11::arg("row_bytes"), pybind11::arg("order"),
        "Moves pages of weights to the memory node of their rows. Raises RuntimeError if the system refuses.");
  m.def(
      "active_cpu_variant", [] { return std::string(moe_ext::cpu::isa_name(moe_ext::cpu::active_isa())); },
      "The CPU variant in use. Raises RuntimeError if MOE_EXT_ISA names one that is unknown or does not run here.");
}
