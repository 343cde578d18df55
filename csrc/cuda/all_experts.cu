// All experts over all tokens, some tokens at a time: y[e, t, :] = f_e(x[first + t, :])                    (E, part, H)
//
// The grouped products of the experts operators compute h and y: all tokens are positions of every expert, position
// e * T + t, so that there is nothing to sort. Nothing waits for the device; launches depend on shapes only.
//
// Cost: 6 E H I FLOPs a token; h and y of a part are written and read.
#include "cuda/all_experts.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/gemm_launch.h"
#include "cuda/heuristics.h"
#include "cuda/launch.h"

namespace moe_ext::cuda {
namespace {

constexpr int kListThreads = 256;

// The list that a sort would give if every token went to every expert, with one slot a token.
struct ListParams {
  int* slot_of;  // (E * tokens) out
  TileList gate_up;
  TileList down;
  int64_t tokens;
  int64_t num_experts;
};

__global__ void __launch_bounds__(kListThreads) list_all_kernel(ListParams p) {
  const int64_t step = int64_t{gridDim.x} * kListThreads;
  const int64_t begin = int64_t{blockIdx.x} * kListThreads + threadIdx.x;
  for (int64_t i = begin; i < p.num_experts * p.tokens; i += step) p.slot_of[i] = static_cast<int>(i % p.tokens);
  const auto list = [&](const TileList& list) {
    const int64_t of_expert = list.max_tiles / p.num_experts;
    for (int64_t i = begin; i < list.max_tiles; i += step) {
      const int64_t expert = i / of_expert;
      list.tiles[i] = {static_cast<int>(expert), static_cast<int>(expert * of_expert),
                       static_cast<int>(expert * p.tokens), static_cast<int>(p.tokens)};
    }
  };
  list(p.gate_up);
  list(p.down);
}

// Every token in a slot of every expert: what the choice of kernels is made by.
ExpertsParams as_experts(const LayerParams& layer, int64_t tokens) {
  ExpertsParams e{};
  static_cast<LayerParams&>(e) = layer;
  e.tokens = tokens;
  e.top_k = layer.num_experts;
  return e;
}

}  // namespace

void for_all_experts(const char* op, const LayerParams& p, const Scratch& scratch, cudaStream_t stream,
                     const std::function<void(const AllOutputs&)>& use) {
  if (p.tokens == 0) return;
  const int64_t part = all_experts_part(p);
  if (part * p.num_experts > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error(std::string("moe_ext: ") + op + ": T * E is beyond 2^31 - 1; pass fewer tokens at a time");
  }
  const Device device = current_device();
  const Choice choice = choose_sorted(as_experts(p, part), device, forced_kernels());
  const auto tiles_for = [&](int rows, int64_t tokens) { return p.num_experts * ((tokens + rows - 1) / rows); };

  const PositionRows rows = allocate_rows(choice, p, part * p.num_experts, scratch);
  ListParams list{};
  list.slot_of = allocate<int>(scratch, part * p.num_experts);
  list.gate_up = {allocate<Tile>(scratch, tiles_for(choice.gate_up_rows, part)), choice.gate_up_rows, 0};
  list.down = {allocate<Tile>(scratch, tiles_for(choice.down_rows, part)), choice.down_rows, 0};
  list.num_experts = p.num_experts;

  for (int64_t first = 0; first < p.tokens; first += part) {
    const int64_t tokens = std::min(part, p.tokens - first);
    list.tokens = tokens;
    list.gate_up.max_tiles = tiles_for(choice.gate_up_rows, tokens);
    list.down.max_tiles = tiles_for(choice.down_rows, tokens);
    const int64_t blocks = (tokens * p.num_experts + kListThreads - 1) / kListThreads;
    list_all_kernel<<<grid_size(blocks), kListThreads, 0, stream>>>(list);
    check_launch("list_all_kernel");

    LayerParams layer = p;
    layer.x = static_cast<const char*>(p.x) + first * p.hidden * element_size(p.dtype);
    layer.tokens = tokens;
    launch_gemms({choice, layer, 1, list.slot_of, list.gate_up, list.down, rows, {}}, device, stream);
    use({rows.y, rows.dtype, first, tokens});
  }
}

}  // namespace moe_ext::cuda
