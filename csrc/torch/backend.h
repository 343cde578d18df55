// What the kernels get from torch: its threads on the CPU; on CUDA its stream and its memory.
#pragma once

#include <cstdint>
#include <new>
#include <vector>

#include "moe.h"
#include "torch/checks.h"
#include "torch/stable_torch.h"

namespace moe_ext {

inline void run_on_torch_threads(int64_t workers, void (*body)(void*), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    // A pool smaller than `workers` gives one call several indices: one body call drains the shared queue for all.
    if (begin < end) body(context);
  });
}

inline Threads torch_threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()), run_on_torch_threads};
}

#ifdef MOE_EXT_WITH_CUDA

// Makes a tensor's device the current one; its current stream is what the kernels run on.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard_(static_cast<int32_t>(tensor.get_device())) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(static_cast<int32_t>(tensor.get_device()), &stream));
    stream_ = static_cast<CUstream_st*>(stream);
  }
  CUstream_st* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  CUstream_st* stream_ = nullptr;
};

// Memory from torch's caching allocator, given back in stream order when this goes.
class TorchScratch {
 public:
  explicit TorchScratch(const Tensor& like) : like_(like) {}
  cuda::Scratch scratch() {
    return {this, [](void* context, int64_t bytes) { return static_cast<TorchScratch*>(context)->allocate(bytes); }};
  }

 private:
  void* allocate(int64_t bytes) {
    tensors_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
    return tensors_.back().mutable_data_ptr();
  }

  const Tensor& like_;
  std::vector<Tensor> tensors_;
};

#endif

// Runs an operator where `tensor` lives: on_cuda(scratch, stream) or on_cpu(threads). on_cuda is a generic lambda, so
// that a build without CUDA kernels does not ask for them.
template <typename OnCpu, typename OnCuda>
void dispatch(const char* op, [[maybe_unused]] const Tensor& tensor, const OnCpu& on_cpu,
              [[maybe_unused]] const OnCuda& on_cuda) {
#ifdef MOE_EXT_WITH_CUDA
  if (tensor.is_cuda()) {
    const OnDeviceOf device(tensor);
    TorchScratch memory(tensor);
    return on_cuda(memory.scratch(), device.stream());
  }
#endif
  try {
    on_cpu(torch_threads());
  } catch (const std::bad_alloc&) {
    refuse(op, "there is not enough memory to compute in");
  }
}

}  // namespace moe_ext
