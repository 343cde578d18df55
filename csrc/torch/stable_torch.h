// torch's ABI-stable API, which lets one binary run on every torch from 2.10 on; nothing here includes any other header
// of torch. Unused parameters in those of 2.13 are no warnings of ours.
#pragma once

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#ifdef MOE_EXT_WITH_CUDA
#define USE_CUDA  // shows aoti_torch_get_current_cuda_stream
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#pragma GCC diagnostic pop

namespace moe_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace moe_ext
