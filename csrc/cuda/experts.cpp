// The experts operators on CUDA: which kernels run, in which order, on which scratch memory. Ways, chosen in
// heuristics.h:
//   small batch   gate_up, down with combine                    2 launches
//   large batch   sort, gate_up, down, combine                  4 launches (6 where the sort takes three)
//   hopper        the same as large, with gemm_wgmma.cu, or gemm_wgmma_packed.cu, for one product or both
//   plain         the same as large, with gemm_plain.cu         float32 and odd sizes
// and the moments, and pairs where they are asked for, after any of them when observing; where energies of channels are
// observed, too, launches of weights before gate_up and of sums at the end, but for small batches. Nothing waits for
// the device, and grids depend on shapes only: all of it can be captured in a CUDA graph.
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/gemm_launch.h"
#include "cuda/heuristics.h"
#include "cuda/launch.h"
#include "cuda/params.h"
#include "moe.h"

namespace moe_ext::cuda {

namespace {

MomentsParams moments_params(const ExpertsParams& p, const float* squares, int64_t parts) {
  MomentsParams m{};
  m.squares = squares;
  m.parts = parts;
  m.experts = p.experts;
  m.experts_are_int64 = p.experts_are_int64;
  m.weights = p.weights;
  m.weights_dtype = p.weights_dtype;
  m.counted = p.counted;
  m.moments = p.moments;
  m.slots = p.tokens * p.top_k;
  m.top_k = p.top_k;
  m.num_experts = p.num_experts;
  return m;
}

// What is observed of the slots once their squares are there.
void observe(const ExpertsParams& p, const MomentsParams& m, const Scratch& scratch, cudaStream_t stream) {
  launch_moments(m, stream);
  if (p.pairs != nullptr) launch_pairs({m, allocate<double>(scratch, m.slots), p.pairs}, stream);
}

void run_small_batch(const ExpertsParams& p, const Device& device, const Scratch& scratch, cudaStream_t stream) {
  const int64_t slots = p.tokens * p.top_k;
  SmallBatchParams s{};
  s.experts = p;
  s.gate_up = quantisation_of(p, Product::kGateUp);
  s.down = quantisation_of(p, Product::kDown);
  s.shaping = shaping_of(p.formula);
  s.special = p.gate_up_bias != nullptr || !p.formula.unlimited();
  s.h = scratch.allocate(scratch.context, slots * p.intermediate * element_size(p.dtype));
  s.blocks = int64_t{device.multiprocessors} * kSmallBatchBlocksPerMultiprocessor;
  s.gate_up_groups = static_cast<int>((2 * p.intermediate + kSmallBatchColumns - 1) / kSmallBatchColumns);
  s.down_groups = static_cast<int>(small_batch_groups(p.hidden));
  s.split_length = small_batch_split_length(p, s.blocks);
  s.splits = (p.intermediate + s.split_length - 1) / s.split_length;
  s.y = allocate<float>(scratch, slots * s.splits * p.hidden);
  s.arrivals = allocate<uint32_t>(scratch, small_batch_groups(p.hidden));
  const int64_t parts = small_batch_groups(p.hidden);
  s.squares = p.moments == nullptr ? nullptr : allocate<float>(scratch, slots * parts);
  s.staged_bytes = small_batch_staged_bytes(p, device);
  s.shared_limit = device.shared_per_block - 128;  // beside static variables
  p.format.quantised() ? launch_packed_small_batch(s, stream) : launch_small_batch(s, stream);
  if (p.moments != nullptr) observe(p, moments_params(p, s.squares, parts), scratch, stream);
}

void run_sorted(const ExpertsParams& p, const Choice& choice, const Device& device, const Scratch& scratch,
                cudaStream_t stream) {
  const int64_t slots = p.tokens * p.top_k;
  const auto tile_list = [&](int rows) {
    const int64_t tiles = max_tiles(slots, p.num_experts, rows);
    return TileList{allocate<Tile>(scratch, tiles), rows, tiles};
  };

  SortParams s{};
  s.experts = p.experts;
  s.experts_are_int64 = p.experts_are_int64;
  s.slots = slots;
  s.num_experts = p.num_experts;
  s.slot_of = allocate<int>(scratch, slots);
  s.position_of = allocate<int>(scratch, slots);
  s.first = allocate<int>(scratch, p.num_experts + 1);
  s.block_counts = allocate<int>(scratch, sort_blocks(slots) * p.num_experts);
  s.gate_up = tile_list(choice.gate_up_rows);
  s.down = tile_list(choice.down_rows);
  launch_sort(s, stream);

  const PositionRows rows = allocate_rows(choice, p, slots, scratch);
  Energies energies{};
  if (p.channels != nullptr) {
    energies = allocate_energies(choice, p, s.gate_up.max_tiles, scratch);
    launch_energy_weights({s.slot_of, p.weights, p.weights_dtype, p.counted, p.top_k, s.gate_up, energies}, stream);
  }
  launch_gemms({choice, p, p.top_k, s.slot_of, s.gate_up, s.down, rows, energies}, device, stream);

  CombineParams c{};
  c.y = rows.y;
  c.position_of = s.position_of;
  c.weights = p.weights;
  c.out = p.out;
  c.tokens = p.tokens;
  c.top_k = p.top_k;
  c.hidden = p.hidden;
  c.y_dtype = rows.dtype;
  c.dtype = p.dtype;
  c.weights_dtype = p.weights_dtype;
  split_combine(&c);
  c.squares = p.moments == nullptr ? nullptr : allocate<float>(scratch, slots * c.parts);
  launch_combine(c, stream);
  if (p.moments != nullptr) {
    MomentsParams m = moments_params(p, c.squares, c.parts);
    m.slot_of = s.slot_of;
    m.first = s.first;
    observe(p, m, scratch, stream);
  }
  if (p.channels != nullptr) launch_energy_sums({s.gate_up, energies, p.intermediate, p.channels}, stream);
}

}  // namespace

std::string describe(const ExpertsParams& p) {
  const Device device = current_device();
  return describe(p, device, forced_kernels());
}

void experts(const ExpertsParams& p, const Scratch& scratch, cudaStream_t stream) {
  if (p.tokens == 0) return;
  if (p.top_k == 0) {
    return check(cudaMemsetAsync(p.out, 0, p.tokens * p.hidden * element_size(p.dtype), stream), "cudaMemsetAsync");
  }
  if (p.tokens * p.top_k > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("moe_ext: T * K is beyond 2^31 - 1; pass fewer tokens at a time");
  }
  const Device device = current_device();
  const Choice choice = choose(p, device, forced_kernels());
  if (choice.way == Choice::Way::kSmallBatch) return run_small_batch(p, device, scratch, stream);
  run_sorted(p, choice, device, scratch, stream);
}

}  // namespace moe_ext::cuda
