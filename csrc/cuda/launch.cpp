#include "cuda/launch.h"

#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string_view>

namespace moe_ext::cuda {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // otherwise the next launch would be blamed for it
  std::string message = std::string(what) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice) {
    message += "; moe_ext was built for " MOE_EXT_CUDA_ARCHS " (set TORCH_CUDA_ARCH_LIST and build again)";
  }
  throw std::runtime_error(message);
}

void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

unsigned grid_size(int64_t blocks) {
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("moe_ext: the input needs " + std::to_string(blocks) +
                             " blocks of threads, more than CUDA allows; pass fewer tokens at a time");
  }
  return static_cast<unsigned>(blocks);
}

Device current_device() {
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, index), "cudaDeviceGetAttribute");
    return value;
  };
  // Named as in TORCH_CUDA_ARCH_LIST by setup.py and as in CMAKE_CUDA_ARCHITECTURES by CMake.
  const std::string_view archs = MOE_EXT_CUDA_ARCHS;
  const bool built = archs.find("9.0a") != archs.npos || archs.find("90a") != archs.npos;
  const bool hopper =
      attribute(cudaDevAttrComputeCapabilityMajor) == 9 && attribute(cudaDevAttrComputeCapabilityMinor) == 0;
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), built && hopper};
}

std::string forced_kernels() {
  const char* forced = std::getenv("MOE_EXT_CUDA_KERNELS");
  const std::string name = forced == nullptr ? "" : forced;
  for (const char* known :
       {"", "portable", "small_batch", "hopper", "hopper_pairs", "tall", "flat", "narrow", "plain"}) {
    if (name == known) return name;
  }
  throw std::runtime_error(
      "MOE_EXT_CUDA_KERNELS=" + name +
      " is unknown; the kernels are portable, small_batch, hopper, hopper_pairs, tall, flat, narrow, plain");
}

}  // namespace moe_ext::cuda
