// The tile shapes of the grouped products and the limits of the small batches' kernels: numbers that the kernels are
// compiled for and that heuristics.h chooses among.
#pragma once

#include <cstdint>

namespace moe_ext::cuda {

// ---- tile shapes of the mma.sync grouped products (gemm_mma.cu)

// A block computes `rows` positions by `columns` rows of weights (half of them gate, half up), `inner` at a time, with
// warps_m x warps_n warps, and keeps `stages` such steps in shared memory.
struct GemmShape {
  int rows;
  int columns;
  int inner;
  int warps_m;
  int warps_n;
  int stages;
  int blocks_per_multiprocessor;  // that registers must allow
  int min_rows;                   // rows of the average expert for which it is considered
  double efficiency;              // of a multiprocessor that is full of such blocks, for choosing among them

  constexpr int threads() const { return warps_m * warps_n * 32; }
  constexpr int stage_bytes() const { return (rows + columns) * inner * 2; }
  constexpr int shared_bytes() const { return stages * stage_bytes(); }
};

// At most 99 KiB each, the limit of sm_86, sm_89 and sm_120. FLOPs per byte read from L2: 85, 43, 32.
inline constexpr GemmShape kGemmShapes[] = {
    {128, 256, 32, 2, 4, 4, 1, 65, 1.0},  // tall: experts with many rows; warps of 64 x 64
    {64, 128, 64, 1, 4, 3, 2, 0, 0.8},    // flat: few rows an expert
    {64, 64, 64, 2, 2, 3, 4, 0, 0.7},     // narrow: as flat, where there would be too few blocks
};
inline constexpr int kTall = 0, kFlat = 1, kNarrow = 2, kGemmShapeCount = 3;

// ---- tiles of the wgmma grouped products (gemm_wgmma.cu): positions, and rows of weights

inline constexpr int kHopperRows = 192, kHopperColumns = 256;
inline constexpr int kHopperMinRows = 17;         // of the average expert for which it is considered
inline constexpr double kHopperEfficiency = 1.5;  // against the efficiencies above
inline constexpr int kHopper = kGemmShapeCount;   // as a shape of Choice

// Rows of a tile in gemm_plain.cu: for few and for many rows an expert.
inline constexpr int kPlainRows[] = {16, 64};

// ---- small batches (small_batch.cu)

inline constexpr int64_t kSmallBatchTokens = 16;
inline constexpr int kSmallBatchBlocksPerMultiprocessor = 2;  // that registers and shared memory allow

}  // namespace moe_ext::cuda
