// Grouped products for large batches, bf16 and fp16 on the tensor cores, float32 accumulation:
//   gate_up   h[p, :] = act(gate[e] x) * (up[e] x),  x = x[token of p, :]          (positions, I)
//   down      y[p, :] = down[e] h[p, :]                                            (positions, H)
//
// A block computes one tile: up to `rows` positions of one expert by a range of c's columns, numbered as in tiles.cuh.
// An expert's positions are cut evenly, in multiples of 16; 16-row fragments without a position are not multiplied.
//
// Shared memory holds `stages` steps of a (rows, inner) and b (columns, inner), filled by 16-byte cp.async with a
// gathered, zero-filled beyond the edges, and read by ldmatrix. The 16-byte chunks of a row are XORed with the row so
// that neither conflicts. In gate_up the block's rows of b are 8 gate rows, the 8 up rows of the same columns, and so
// on: a thread then holds gate and up of the same element in its accumulators, and SwiGLU needs no exchange. Results
// pass through shared memory, a warp for itself, and leave in 16-byte stores. Where energies of channels are observed,
// a warp adds up those of its positions, first a thread, then the eight that have the same columns: a part of warps_m.
//
// Without gate the first projection is computed as down is, with its rows gathered. Biases and what a formula does to
// gate and up (params.h) are applied to the accumulators before the results leave.
//
// Transposed weights: a stage holds b as (inner, columns), as it lies in memory, and ldmatrix turns it. In gate_up its
// chunks of 8 columns are gate and up in turn; interleaved, a thread's two neighbouring accumulators are gate and up of
// one column, and its two columns change lanes once h is computed.
//
// Every element is a sum in order of k by one warp: deterministic. Cost of a tile: 2 * rows * columns * inner FLOPs;
// reads (rows + columns) * inner elements, of which only the first read of each comes from beyond L2.
#include "cuda/device/dispatch.cuh"
#include "cuda/device/mma_results.cuh"
#include "cuda/device/next_kernel.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/ptx_sm80.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/launch.h"
#include "cuda/params.h"
#include "cuda/shapes.h"

namespace moe_ext::cuda {
namespace {

template <typename T, int kShape, Product kProduct, bool kEnergies, bool kTransposed>
__global__ void __launch_bounds__(kGemmShapes[kShape].threads(), kGemmShapes[kShape].blocks_per_multiprocessor)
    grouped_gemm_kernel(GemmParams p) {
  constexpr GemmShape S = kGemmShapes[kShape];
  constexpr bool kGateUp = kProduct == Product::kGateUp;
  constexpr int kColumns = kGateUp ? S.columns / 2 : S.columns;  // of c, a block
  constexpr int kChunks = S.inner / kChunk;                      // of a row of a stage
  constexpr int kRowStep = S.threads() / kChunks;                // rows that all threads copy at once
  constexpr int kACopies = S.rows / kRowStep, kBCopies = S.columns / kRowStep;
  constexpr int kFragments = S.rows / kFragment / S.warps_m;  // of a warp, at most
  constexpr int kWarpColumns = S.columns / S.warps_n;         // of b, a warp
  constexpr int kMmaColumns = kWarpColumns / 8;
  constexpr int kOutChunks = kWarpColumns * kColumns / S.columns / kChunk;  // of c's row, a warp
  static_assert(S.rows % kRowStep == 0 && S.columns % kRowStep == 0 && kRowStep % 16 == 0 && kWarpColumns % 16 == 0);
  static_assert(S.warps_m * S.warps_n * kFragment * kOutChunks * kChunkBytes <= S.shared_bytes());
  extern __shared__ __align__(128) char shared[];

  // ---- which tile
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  const Place place = place_of(p, blockIdx.x, S.rows, kColumns);
  if (place.expert < 0) return;
  const int first_column = place.first_column, rows = place.rows;
  const int64_t first_position = place.first_position;

  // ---- what this thread copies: one chunk of every kRowStep-th row
  const int chunk = threadIdx.x % kChunks;
  const int copy_row = threadIdx.x / kChunks;
  const int64_t inner = p.inner;
  const T* a_rows[kACopies];
#pragma unroll
  for (int i = 0; i < kACopies; ++i) {
    const int row = copy_row + i * kRowStep;
    int64_t a_row = 0;
    if (row < rows) {
      const int64_t position = first_position + row;
      a_row = kGateUp || p.slot_of != nullptr ? p.slot_of[position] / p.top_k : position;
    }
    a_rows[i] = static_cast<const T*>(p.a) + a_row * inner + chunk * kChunk;
  }
  // Row r of b's tile is a row of weights: in gate_up, 8 of gate and 8 of up in turn.
  const int b_column = first_column + (kGateUp ? copy_row / 16 * 8 + copy_row % 8 : copy_row);
  constexpr int kColumnStep = kGateUp ? kRowStep / 2 : kRowStep;
  const bool up = kGateUp && copy_row / 8 % 2 == 1;
  const T* b_row = static_cast<const T*>(p.b) +
                   weight_row<kProduct, int64_t>(place.expert, p.columns, b_column, up) * inner + chunk * kChunk;
  // Transposed: one chunk of columns of every kInnerStep-th row.
  constexpr int kColumnChunks = S.columns / kChunk, kInnerStep = S.threads() / kColumnChunks;
  [[maybe_unused]] const int column_chunk = threadIdx.x % kColumnChunks, inner_row = threadIdx.x / kColumnChunks;
  [[maybe_unused]] bool column_inside = false;
  [[maybe_unused]] int64_t of_expert = 0;  // elements of a row of the transposed weights
  if constexpr (kTransposed) {
    static_assert(S.threads() % kColumnChunks == 0 && S.inner % kInnerStep == 0);
    of_expert = weight_rows(kProduct, p.columns);
    int64_t column = first_column + column_chunk * kChunk;  // of the expert's matrix
    if constexpr (kGateUp) {
      column = p.interleaved ? 2 * first_column + column_chunk * kChunk
                             : (column_chunk % 2 == 0 ? 0 : p.columns) + first_column + column_chunk / 2 * kChunk;
      column_inside = first_column + column_chunk / 2 * kChunk < p.columns;
    } else {
      column_inside = column < p.columns;
    }
    b_row = static_cast<const T*>(p.b) + (place.expert * inner + inner_row) * of_expert + column;
  }

  const uint32_t stage_base = ptx::shared_address(shared);
  const auto copy_stage = [&](int step, int stage) {
    const uint32_t a_stage = stage_base + stage * S.stage_bytes();
    const uint32_t b_stage = a_stage + S.rows * S.inner * 2;
    const int64_t k = int64_t{step} * S.inner;
    const bool inside = k + chunk * kChunk < inner;
#pragma unroll
    for (int i = 0; i < kACopies; ++i) {
      const int row = copy_row + i * kRowStep;
      ptx::copy_async(a_stage + swizzled<kChunks>(row, chunk), a_rows[i] + k, inside && row < rows);
    }
    if constexpr (kTransposed) {
#pragma unroll
      for (int i = 0; i < S.inner / kInnerStep; ++i) {
        const int row = inner_row + i * kInnerStep;
        ptx::copy_async(b_stage + swizzled<kColumnChunks>(row, column_chunk), b_row + (k + i * kInnerStep) * of_expert,
                        column_inside && k + row < inner);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBCopies; ++i) {
        ptx::copy_async(b_stage + swizzled<kChunks>(copy_row + i * kRowStep, chunk),
                        b_row + i * kColumnStep * inner + k, inside && b_column + i * kColumnStep < p.columns);
      }
    }
  };

  // ---- the product
  const int lane = threadIdx.x % kWarpSize;
  const int warp_m = threadIdx.x / kWarpSize / S.warps_n;
  const int warp_n = threadIdx.x / kWarpSize % S.warps_n;
  // Fragments go to the warps in turn: those of a short tile are shared out evenly.
  const int fragments = ((rows + kFragment - 1) / kFragment - warp_m + S.warps_m - 1) / S.warps_m;
  float sums[kFragments][kMmaColumns][4] = {};

  const auto multiply_stage = [&](int stage) {
    const uint32_t a_stage = stage_base + stage * S.stage_bytes();
    const uint32_t b_stage = a_stage + S.rows * S.inner * 2;
#pragma unroll
    for (int k = 0; k < kChunks; k += 2) {
      uint32_t b[kMmaColumns / 2][4];
#pragma unroll
      for (int j = 0; j < kMmaColumns / 2; ++j) {
        if constexpr (kTransposed) {
          const int row = k * kChunk + lane / 8 % 2 * 8 + lane % 8;
          const int column = warp_n * kWarpColumns / kChunk + j * 2 + lane / 16;
          ptx::load_matrices_transposed(b[j], b_stage + swizzled<kColumnChunks>(row, column));
        } else {
          const int row = warp_n * kWarpColumns + j * 16 + lane / 16 * 8 + lane % 8;
          ptx::load_matrices(b[j], b_stage + swizzled<kChunks>(row, k + lane / 8 % 2));
        }
      }
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        if (i >= fragments) break;
        uint32_t a[4];
        const int row = (i * S.warps_m + warp_m) * kFragment + lane % 16;
        ptx::load_matrices(a, a_stage + swizzled<kChunks>(row, k + lane / 16));
#pragma unroll
        for (int j = 0; j < kMmaColumns; ++j) {
          ptx::multiply_add(sums[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], T{});
        }
      }
    }
  };

  const int steps = static_cast<int>((inner + S.inner - 1) / S.inner);
#pragma unroll
  for (int step = 0; step < S.stages - 1; ++step) {
    if (step < steps) copy_stage(step, step);
    ptx::copy_async_commit();
  }
  int stage = 0, next_stage = S.stages - 1;
  for (int step = 0; step < steps; ++step) {
    ptx::copy_async_wait<S.stages - 2>();
    __syncthreads();  // this step's copies are there, and nobody reads the stage that is filled next
    if (step + S.stages - 1 < steps) copy_stage(step + S.stages - 1, next_stage);
    ptx::copy_async_commit();
    multiply_stage(stage);
    stage = stage + 1 == S.stages ? 0 : stage + 1;
    next_stage = next_stage + 1 == S.stages ? 0 : next_stage + 1;
  }
  ptx::copy_async_wait<0>();
  __syncthreads();  // from here on shared memory holds results

  // ---- the results
  char* staged = shared + threadIdx.x / kWarpSize * (kFragment * kOutChunks * kChunkBytes);
  const int out_column = first_column + warp_n * kOutChunks * kChunk;
  if constexpr (kTransposed && kGateUp) {
    if (p.interleaved) sort_interleaved(sums, fragments);
  }
  if (p.special) apply_special<T, kProduct>(p, sums, fragments, place.expert, out_column);
  store_results<T, kProduct, kEnergies, S.warps_m>(p, place, sums, fragments, warp_m, out_column, staged);
}

template <typename T, int kShape, Product kProduct, bool kEnergies, bool kTransposed>
void launch_with(const GemmParams& p, cudaStream_t stream) {
  constexpr GemmShape S = kGemmShapes[kShape];
  constexpr int kColumns = kProduct == Product::kGateUp ? S.columns / 2 : S.columns;
  const unsigned blocks = grid_size(p.max_tiles * ((p.columns + kColumns - 1) / kColumns));
  allow_shared(grouped_gemm_kernel<T, kShape, kProduct, kEnergies, kTransposed>, S.shared_bytes());
  launch_next<grouped_gemm_kernel<T, kShape, kProduct, kEnergies, kTransposed>>(
      "grouped_gemm_kernel", blocks, S.threads(), S.shared_bytes(), stream, p);
}

template <typename T, int kShape, Product kProduct>
void launch_shape(const GemmParams& p, cudaStream_t stream) {
  if (p.transposed) return launch_with<T, kShape, kProduct, false, true>(p, stream);
  if constexpr (kProduct == Product::kGateUp) {
    if (p.energies.sums != nullptr) return launch_with<T, kShape, kProduct, true, false>(p, stream);
  }
  launch_with<T, kShape, kProduct, false, false>(p, stream);
}

template <typename T, Product kProduct>
void launch_product(int shape, const GemmParams& p, cudaStream_t stream) {
  static_assert(kGemmShapeCount == 3);
  switch (shape) {
    case kTall:
      return launch_shape<T, kTall, kProduct>(p, stream);
    case kFlat:
      return launch_shape<T, kFlat, kProduct>(p, stream);
    default:
      return launch_shape<T, kNarrow, kProduct>(p, stream);
  }
}

}  // namespace

void launch_grouped_gemm(Product product, int shape, const GemmParams& p, DType dtype, cudaStream_t stream) {
  for_16_bit_dtype(dtype, [&](auto type) {
    for_product(product, [&](auto which) { launch_product<decltype(type), which.value>(shape, p, stream); });
  });
}

}  // namespace moe_ext::cuda
