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

// ---- tiles of the wgmma grouped products (gemm_wgmma.cu): positions, and rows of weights, of a block

inline constexpr int kHopperRows = 192, kHopperColumns = 256;

// As shapes of Choice: a block has a tile to itself, or two blocks of a cluster share its weights and halve its rows.
// Two read fewer bytes where an expert's rows are more than a block's tile has; for fewer they read as many, with half
// the bytes under way.
inline constexpr int kHopper = kGemmShapeCount, kHopperPairs = kHopper + 1;

// Where pairs are taken: the average expert has more rows than a block's tile, but not more than this, and down of an
// expert has at least so many bytes. On an H100, at 256 rows, pairs took 0.90 of the time with 117 MB, and 1.02 with 7;
// at 512 rows and more 1.00 to 1.07 (benchmarks/results, gpu-paths).
inline constexpr int kPairsMostRows = 320;
inline constexpr int64_t kPairsLeastBytes = 100'000'000;

constexpr bool is_hopper(int shape) { return shape >= kHopper; }
constexpr int hopper_blocks(int shape) { return shape == kHopperPairs ? 2 : 1; }  // that share a tile

// The same of quantised weights (gemm_wgmma_packed.cu), whose accumulators leave registers to those that convert them.
inline constexpr int kHopperPackedRows = 128;

// Rows of a tile in gemm_plain.cu: for few and for many rows an expert.
inline constexpr int kPlainRows[] = {16, 64};

// ---- small batches (small_batch.cu)

inline constexpr int64_t kSmallBatchTokens = 16;  // at most

// Where the layer can go by wgmma, too, whose tiles are read faster, while it has more launches: as many tokens, or so
// many bytes of the weights that the tokens can reach. On an H100 that cost 0.4 % of the best of every measured row's
// kernels, and at most 18 % (benchmarks/results, gpu-paths).
constexpr int64_t small_batch_tokens_beside_hopper(int bits) { return bits == 16 ? 1 : bits == 8 ? 2 : 16; }
inline constexpr int64_t kSmallBatchBytesBesideHopper = 180'000'000;
inline constexpr int kSmallBatchBlocksPerMultiprocessor = 2;  // that registers and shared memory allow

}  // namespace moe_ext::cuda
