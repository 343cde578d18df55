// What a launch needs of the host: scratch memory, errors as exceptions, the size of a grid, the device, and the
// kernels that the environment forces.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "moe.h"

namespace moe_ext::cuda {

// Throws std::runtime_error naming `what` if `status` is an error; check_launch also picks up the last launch's status.
void check(cudaError_t status, const char* what);
void check_launch(const char* kernel);

template <typename T>
T* allocate(const Scratch& scratch, int64_t count) {
  return static_cast<T*>(scratch.allocate(scratch.context, count * static_cast<int64_t>(sizeof(T))));
}

// A grid's x dimension; throws if there are more blocks than CUDA allows.
unsigned grid_size(int64_t blocks);

// Lets `kernel` use up to `bytes` of dynamic shared memory. `bytes` must be the same in every call for a kernel: host
// threads that launch at the same time would lower each other's limit.
template <typename Kernel>
void allow_shared(Kernel* kernel, int bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
}

// The current device, as far as the choices in heuristics.h depend on it.
struct Device {
  int multiprocessors;
  int shared_per_multiprocessor;  // bytes
  int shared_per_block;           // bytes, at most
  bool wgmma;                     // of compute capability 9.0, and moe_ext was built for 9.0a
};
Device current_device();

// What MOE_EXT_CUDA_KERNELS forces, for tests and benchmarks: the name of one way, or "" for the choice by shape;
// "portable" is that choice without wgmma. Throws if it names something else. A call reads it once.
std::string forced_kernels();

}  // namespace moe_ext::cuda
