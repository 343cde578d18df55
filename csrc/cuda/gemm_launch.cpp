#include "cuda/gemm_launch.h"

namespace moe_ext::cuda {
namespace {

GemmParams gemm_params(const PositionsParams& p, Product product) {
  const bool gate_up = product == Product::kGateUp;
  const TileList& list = gate_up ? p.gate_up : p.down;
  GemmParams g{};
  g.a = gate_up ? p.layer.x : p.rows.h;
  g.b = gate_up ? p.layer.gate_up : p.layer.down;
  g.c = gate_up ? p.rows.h : p.rows.y;
  g.slot_of = gate_up ? p.slot_of : nullptr;
  g.tiles = list.tiles;
  g.max_tiles = list.max_tiles;
  g.num_experts = p.layer.num_experts;
  g.top_k = p.top_k;
  g.columns = gate_up ? p.layer.intermediate : p.layer.hidden;
  g.inner = gate_up ? p.layer.hidden : p.layer.intermediate;
  g.activation = p.layer.formula.activation;
  if (gate_up) g.energies = p.energies;
  return g;
}

}  // namespace

Energies allocate_energies(const Choice& choice, const ExpertsParams& p, int64_t max_tiles, const Scratch& scratch) {
  const int64_t slots = p.tokens * p.top_k;
  const bool grouped = choice.way == Choice::Way::kGrouped, hopper = grouped && choice.gate_up_shape == kHopper;
  Energies energies{};
  energies.parts = grouped && !hopper ? kGemmShapes[choice.gate_up_shape].warps_m : 1;
  energies.weights = allocate<float>(scratch, slots);
  if (hopper) energies.fragments = allocate<uint4>(scratch, max_tiles * energy_fragments(kHopperRows));
  energies.sums = allocate<float>(scratch, max_tiles * energies.parts * p.intermediate);
  return energies;
}

PositionRows allocate_rows(const Choice& choice, const LayerParams& layer, int64_t positions, const Scratch& scratch) {
  const DType dtype = choice.row_dtype(layer.dtype);
  void* h = scratch.allocate(scratch.context, positions * layer.intermediate * element_size(dtype));
  void* y = scratch.allocate(scratch.context, positions * layer.hidden * element_size(dtype));
  return {h, y, dtype};
}

void launch_gemms(const Choice& choice, const PositionsParams& p, const Device& device, cudaStream_t stream) {
  const auto launch = [&](Product product, int shape, int rows) {
    const GemmParams g = gemm_params(p, product);
    if (choice.way == Choice::Way::kPlain) {
      launch_plain_gemm(product, rows, g, p.layer.dtype, stream);
    } else if (shape == kHopper) {
      launch_hopper_gemm(product, g, p.layer.dtype, device.multiprocessors, stream);
    } else {
      launch_grouped_gemm(product, shape, g, p.layer.dtype, stream);
    }
  };
  launch(Product::kGateUp, choice.gate_up_shape, choice.gate_up_rows);
  launch(Product::kDown, choice.down_shape, choice.down_rows);
}

}  // namespace moe_ext::cuda
