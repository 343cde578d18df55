// The choice of the instruction set, and the check of expert indices.
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "moe.h"
#include "setting.h"

namespace cpu = moe_ext::cpu;
using setting::ForcedIsa;

namespace {

std::string refusal() {
  try {
    cpu::active_isa();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace

TEST("without MOE_EXT_ISA, or with an empty one, the best that runs here is used") {
  int best = 0;
  while (!cpu::isa_runs_here(best)) ++best;
  unsetenv("MOE_EXT_ISA");
  CHECK(cpu::active_isa() == best, cpu::isa_name(cpu::active_isa()));
  const ForcedIsa forced("");
  CHECK(cpu::active_isa() == best, cpu::isa_name(cpu::active_isa()));
}

TEST("the portable variant runs on every processor") {
  const ForcedIsa forced("portable");
  CHECK(std::string(cpu::isa_name(cpu::active_isa())) == "portable", cpu::isa_name(cpu::active_isa()));
}

TEST("MOE_EXT_ISA chooses a variant that runs here and refuses one that does not") {
  for (int isa = 0; isa < cpu::kIsaCount; ++isa) {
    const ForcedIsa forced(cpu::isa_name(isa));
    if (cpu::isa_runs_here(isa)) {
      CHECK(cpu::active_isa() == isa, cpu::isa_name(isa), " gave ", cpu::isa_name(cpu::active_isa()));
    } else {
      CHECK(refusal() == "MOE_EXT_ISA=" + std::string(cpu::isa_name(isa)) + " does not run on this processor",
            refusal());
    }
  }
}

TEST("an unknown MOE_EXT_ISA is refused with the names that exist, by the experts kernel too") {
  for (const char* name : {"sse9", "AVX2", "avx", "avx512 "}) {
    const ForcedIsa forced(name);
    CHECK(refusal() ==
              std::string("MOE_EXT_ISA=") + name + " is unknown; the variants are avx512_bf16, avx512, avx2, portable",
          refusal());
    std::string message = "no error";
    try {
      cpu::experts(moe_ext::ExpertsParams{}, setting::serial());
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    CHECK(message == refusal(), message);
  }
}

TEST("first_bad_expert finds the first index outside 0 to E, in both widths") {
  const auto find = [](const std::vector<int64_t>& experts) {
    const std::vector<int32_t> narrow(experts.begin(), experts.end());
    const auto slots = static_cast<int64_t>(experts.size());
    const int64_t wide_result = cpu::first_bad_expert(experts.data(), true, slots, 4);
    const int64_t narrow_result = cpu::first_bad_expert(narrow.data(), false, slots, 4);
    CHECK(wide_result == narrow_result, wide_result, " and ", narrow_result);
    return wide_result;
  };
  CHECK(find({}) == -1, find({}));
  CHECK(find({0, 1, 2, 3, 4}) == -1, "4 marks an empty slot");
  CHECK(find({0, 5, -1}) == 1, find({0, 5, -1}));
  CHECK(find({0, 4, 3, -1, 9}) == 3, find({0, 4, 3, -1, 9}));
  CHECK(find({std::numeric_limits<int32_t>::max()}) == 0, "largest int32");
  CHECK(find({std::numeric_limits<int32_t>::min()}) == 0, "smallest int32");
}

TEST("an int64 index that would fit only after truncation is bad") {
  const int64_t experts[] = {1, int64_t{1} << 32, -(int64_t{1} << 32)};
  CHECK(cpu::first_bad_expert(experts, true, 3, 4) == 1, cpu::first_bad_expert(experts, true, 3, 4));
  CHECK(cpu::first_bad_expert(experts + 2, true, 1, 4) == 0, "negative");
}
