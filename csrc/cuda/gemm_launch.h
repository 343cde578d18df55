// Both grouped products over a list of positions, by whichever kernels were chosen: what the operators whose rows of
// tokens are sorted (experts) or all there (gram) have in common.
#pragma once

#include "cuda/heuristics.h"
#include "cuda/launch.h"
#include "cuda/params.h"

namespace moe_ext::cuda {

// What the products write, a row a position.
struct PositionRows {
  void* h;      // (positions, I) of `dtype`
  void* y;      // (positions, H) of `dtype`
  DType dtype;  // the layer's, or float32
};

PositionRows allocate_rows(const Choice& choice, const LayerParams& layer, int64_t positions, const Scratch& scratch);

// What gate_up needs to sum energies of channels; `max_tiles` as in its list.
Energies allocate_energies(const Choice& choice, const ExpertsParams& p, int64_t max_tiles, const Scratch& scratch);

struct PositionsParams {
  Choice choice;  // not kSmallBatch
  LayerParams layer;
  int64_t top_k;       // a position's token is its slot / top_k
  const int* slot_of;  // (positions)
  TileList gate_up, down;
  PositionRows rows;  // out
  Energies energies;  // out of gate_up, if `sums` is not null
};

// gate_up, then down.
void launch_gemms(const PositionsParams& p, const Device& device, cudaStream_t stream);

}  // namespace moe_ext::cuda
