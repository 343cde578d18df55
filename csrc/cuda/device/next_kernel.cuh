// Programmatic dependent launch: on devices from sm_90 on, the blocks of a kernel are brought up while the kernel
// before it on the stream still runs. A kernel that launch_next() launches calls wait_for_previous_kernel() in every
// thread that goes on to touch memory that another kernel writes, and in no block leaves it out: then its end means the
// end of all kernels before it, and the chain can be of any length. The first kernel of a call is launched as usual, so
// that nothing of it overlaps with what came before on the stream.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "cuda/launch.h"

namespace moe_ext::cuda {

// Whether the code that runs here was compiled for sm_90 or newer: what was compiled for less does not wait.
template <auto kKernel>
bool can_overlap() {
  static std::array<std::atomic<signed char>, 64> known{};  // by device: 0 not known yet, 1 no, 2 yes
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const bool remembered = device < static_cast<int>(known.size());
  signed char answer = remembered ? known[device].load(std::memory_order_relaxed) : 0;
  if (answer == 0) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kKernel), "cudaFuncGetAttributes");
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    answer = major >= 9 && attributes.ptxVersion >= 90 ? 2 : 1;
    if (remembered) known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}

// Launches kKernel after the kernel before it on the stream, overlapping with its end where the device can; throws
// std::runtime_error that names `name` if CUDA refuses. From sm_90 on, kClusterBlocks neighbouring blocks, which divide
// `blocks`, can be a cluster.
template <auto kKernel, unsigned kClusterBlocks = 1, typename... Arguments>
void launch_next(const char* name, unsigned blocks, unsigned threads, int shared_bytes, cudaStream_t stream,
                 const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (can_overlap<kKernel>()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if constexpr (kClusterBlocks > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {kClusterBlocks, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kKernel, arguments...), name);
}

}  // namespace moe_ext::cuda
