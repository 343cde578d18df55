// The outputs of all experts for all tokens, which the Gram matrices and the projections are made of.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>

#include "moe.h"

namespace moe_ext::cuda {

// Of some tokens.
struct AllOutputs {
  const void* y;  // (E, tokens, H) of `dtype`
  DType dtype;    // the layer's, or float32
  int64_t first;  // of the layer's tokens
  int64_t tokens;
};

// Launches what computes a part's outputs, and calls use(), which launches what reads them, part after part. Throws
// std::runtime_error, naming `op`, if there are too many tokens for the kernels' indices.
void for_all_experts(const char* op, const LayerParams& p, const Scratch& scratch, cudaStream_t stream,
                     const std::function<void(const AllOutputs&)>& use);

}  // namespace moe_ext::cuda
