// Grouped products for what the tensor cores cannot take: float32 with full float32 accuracy, and sizes or pointers
// that do not allow 16-byte loads. Any H and I, any of the three dtypes, quantised weights of any type; h and y are
// float32.
//   gate_up   h[p, :] = act(gate[e] x) * (up[e] x),  x = x[token of p, :]          (positions, I)
//   down      y[p, :] = down[e] h[p, :]                                            (positions, H)
//
// A block computes one tile, numbered and cut as in tiles.cuh: up to kRows positions of one expert by 64 rows of
// weights (gate_up: 32 of gate and 32 of up), kInner elements of k at a time through shared memory as float32; a thread
// holds kRows / 16 x 4 sums, in gate_up two pairs of gate and up. Weights may be transposed or interleaved. Where
// energies of channels are observed, the block adds up those of the tile: a thread, then the two of a warp that have
// the same columns, then the warps. Sums run in order of k, and of positions: deterministic. Cost of a tile: 2 * rows *
// 64 * inner FLOPs on the FMA units.
#include <type_traits>

#include "cuda/device/dispatch.cuh"
#include "cuda/device/next_kernel.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/packed.cuh"
#include "cuda/device/ptx_sm80.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/launch.h"
#include "cuda/params.h"
#include "cuda/shapes.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kThreadRows = 16;  // threads along the positions, and along the columns
constexpr int kBColumns = 64;
constexpr int kInner = 32;
constexpr int kPerThread = kBColumns / kThreadRows;

// A type of weights: those that GemmParams::quantisation describes.
struct Quantised {};

template <typename TA, typename TB, int kRows, Product kProduct, bool kEnergies>
__global__ void __launch_bounds__(kThreads, 2) plain_gemm_kernel(GemmParams p) {
  constexpr bool kGateUp = kProduct == Product::kGateUp;
  constexpr int kColumns = kGateUp ? kBColumns / 2 : kBColumns;  // of c
  constexpr int kRowsPerThread = kRows / kThreadRows;
  constexpr bool kQuantised = std::is_same_v<TB, Quantised>;
  using Stored = std::conditional_t<kQuantised, uint8_t, TB>;
  __shared__ float a[kRows][kInner + 1];
  __shared__ float b[kBColumns][kInner + 1];

  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();

  const Place place = place_of(p, blockIdx.x, kRows, kColumns);
  if (place.expert < 0) return;
  const int rows = place.rows;
  const int first_column = place.first_column;
  const int64_t first_position = place.first_position;

  // What this thread brings into shared memory: one column of k of every kRowStep-th row; null: beyond the edges.
  constexpr int kRowStep = kThreads / kInner;
  const int copy_k = threadIdx.x % kInner, copy_row = threadIdx.x / kInner;
  const TA* a_rows[kRows / kRowStep];
  const Stored* b_rows[kBColumns / kRowStep];
  [[maybe_unused]] int64_t b_scales[kBColumns / kRowStep];  // of quantised rows
#pragma unroll
  for (int i = 0; i < kRows / kRowStep; ++i) {
    const int row = copy_row + i * kRowStep;
    a_rows[i] = nullptr;
    if (row < rows) {
      const int64_t position = first_position + row;
      const int64_t a_row = kGateUp || p.slot_of != nullptr ? p.slot_of[position] / p.top_k : position;
      a_rows[i] = static_cast<const TA*>(p.a) + a_row * p.inner + copy_k;
    }
  }
  // Of weights: the same; transposed ones lie along the columns, so that a thread brings one column of every
  // kInnerStep-th k.
  constexpr int kBCopies = kBColumns / kRowStep, kInnerStep = kThreads / kBColumns;
  static_assert(kInner / kInnerStep == kBCopies);
  const int b_k = p.transposed ? static_cast<int>(threadIdx.x) / kBColumns : copy_k;
  const int b_k_step = p.transposed ? kInnerStep : 0;
  const int b_copy_row = p.transposed ? static_cast<int>(threadIdx.x) % kBColumns : copy_row;
  const int b_row_step = p.transposed ? 0 : kRowStep;
  const int64_t b_stride = p.transposed ? weight_rows(kProduct, p.columns) : 1;  // from k to k + 1
#pragma unroll
  for (int i = 0; i < kBCopies; ++i) {
    const int row = b_copy_row + i * b_row_step;
    const int64_t column = first_column + row % kColumns;  // gate_up: rows from kColumns on are up
    b_rows[i] = nullptr;
    if (column < p.columns) {
      const bool up = row >= kColumns;
      const int64_t b_row = weight_row<kProduct, int64_t>(p.transposed ? 0 : place.expert, p.columns, column, up,
                                                          kGateUp && p.interleaved);
      if constexpr (kQuantised) {
        const int64_t row_of_expert = b_row - place.expert * weight_rows(kProduct, p.columns);
        b_rows[i] = static_cast<const uint8_t*>(p.b) + b_row * p.quantisation.row_bytes;
        b_scales[i] = scales_of_row(p.quantisation, place.expert, static_cast<int>(row_of_expert));
      } else {
        const TB* of_expert = static_cast<const TB*>(p.b) + (p.transposed ? place.expert * p.inner * b_stride : 0);
        b_rows[i] = of_expert + b_row * (p.transposed ? 1 : p.inner) + (b_k + i * b_k_step) * b_stride;
      }
    }
  }

  const int tx = threadIdx.x % kThreadRows, ty = threadIdx.x / kThreadRows;
  float sums[kRowsPerThread][kPerThread] = {};
  for (int64_t k = 0; k < p.inner; k += kInner) {
    const bool inside = k + copy_k < p.inner;
    float a_values[kRows / kRowStep], b_values[kBColumns / kRowStep];
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i) a_values[i] = inside && a_rows[i] ? to_float(a_rows[i][k]) : 0.0f;
#pragma unroll
    for (int i = 0; i < kBCopies; ++i) {
      const bool present = k + b_k + i * b_k_step < p.inner && b_rows[i] != nullptr;
      if constexpr (kQuantised) {
        b_values[i] = present ? weight_at(p.quantisation, b_rows[i], b_scales[i], k + b_k) : 0.0f;
      } else {
        b_values[i] = present ? to_float(b_rows[i][k * b_stride]) : 0.0f;
      }
    }
    __syncthreads();  // the step before is not read any more
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i) a[copy_row + i * kRowStep][copy_k] = a_values[i];
#pragma unroll
    for (int i = 0; i < kBCopies; ++i) b[b_copy_row + i * b_row_step][b_k + i * b_k_step] = b_values[i];
    __syncthreads();
#pragma unroll 4
    for (int at = 0; at < kInner; ++at) {
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) {
          sums[i][j] += a[ty + i * kThreadRows][at] * b[tx + j * kThreadRows][at];
        }
      }
    }
  }

  const auto bias_of = [&](int column, bool up) {
    const int64_t at =
        weight_row<kProduct, int64_t>(place.expert, p.columns, first_column + column, up, kGateUp && p.interleaved);
    if constexpr (kQuantised) {
      return p.bias == nullptr ? 0.0f : weight_of(p.bias, p.bias_dtype, at);
    } else {
      return bias_at<TB>(p.bias, at);
    }
  };
  const bool alone = !kGateUp && p.activation != kNoActivation;
  [[maybe_unused]] const float scale = alone ? p.shaping.scale : 1.0f;
  [[maybe_unused]] const float inverse_scale = alone ? p.shaping.inverse_scale : 1.0f;
  [[maybe_unused]] float energies[kColumns / kThreadRows] = {};
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int row = ty + i * kThreadRows;
    if (row >= rows) continue;
    [[maybe_unused]] float weight = 0.0f;
    if constexpr (kEnergies) weight = p.energies.weights[first_position + row];
    float* out = static_cast<float*>(p.c) + (first_position + row) * p.columns + first_column;
#pragma unroll
    for (int j = 0; j < kColumns / kThreadRows; ++j) {
      const int column = tx + j * kThreadRows;
      if (first_column + column >= p.columns) continue;
      if constexpr (kGateUp) {
        float gate = sums[i][j], up = sums[i][j + kPerThread / 2];
        if (p.special) {
          gate += bias_of(column, false);
          up += bias_of(column, true);
          shape(p.shaping, gate, up);
        }
        const float h = activate<true>(p.activation, gate) * up;
        out[column] = h;
        if constexpr (kEnergies) add_energy(weight, h, energies[j]);
      } else {
        float value = sums[i][j];
        if (p.special) {
          value += bias_of(column, false);
          value = activate<true>(p.activation, value * scale) * inverse_scale;
        }
        out[column] = value;
      }
    }
  }
  if constexpr (kEnergies) {
    __shared__ float of_warps[kThreads / kWarpSize][kColumns];
#pragma unroll
    for (int j = 0; j < kColumns / kThreadRows; ++j) {
      const float energy = energies[j] + __shfl_xor_sync(kAllLanes, energies[j], kThreadRows);
      if (threadIdx.x % kWarpSize < kThreadRows) of_warps[threadIdx.x / kWarpSize][tx + j * kThreadRows] = energy;
    }
    __syncthreads();
    if (threadIdx.x < kColumns && first_column + threadIdx.x < p.columns) {
      float energy = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kThreads / kWarpSize; ++warp) energy += of_warps[warp][threadIdx.x];
      p.energies.sums[place.tile * p.columns + first_column + threadIdx.x] = energy;
    }
  }
}

template <typename T, int kRows>
void launch_rows(Product product, const GemmParams& p, cudaStream_t stream) {
  const int64_t columns = product == Product::kGateUp ? kBColumns / 2 : kBColumns;
  const unsigned blocks = grid_size(p.max_tiles * ((p.columns + columns - 1) / columns));
  constexpr const char* name = "plain_gemm_kernel";
  if (product == Product::kDown && p.slot_of != nullptr) {  // without gate
    launch_next<plain_gemm_kernel<T, T, kRows, Product::kDown, false>>(name, blocks, kThreads, 0, stream, p);
  } else if (product == Product::kDown) {
    launch_next<plain_gemm_kernel<float, T, kRows, Product::kDown, false>>(name, blocks, kThreads, 0, stream, p);
  } else if (p.energies.sums == nullptr) {
    launch_next<plain_gemm_kernel<T, T, kRows, Product::kGateUp, false>>(name, blocks, kThreads, 0, stream, p);
  } else {
    launch_next<plain_gemm_kernel<T, T, kRows, Product::kGateUp, true>>(name, blocks, kThreads, 0, stream, p);
  }
}

// x of any dtype, or h, which is float32.
template <typename TA, int kRows>
void launch_quantised(Product product, const GemmParams& p, cudaStream_t stream) {
  const int64_t columns = product == Product::kGateUp ? kBColumns / 2 : kBColumns;
  const unsigned blocks = grid_size(p.max_tiles * ((p.columns + columns - 1) / columns));
  for_product(product, [&](auto which) {
    launch_next<plain_gemm_kernel<TA, Quantised, kRows, which.value, false>>("plain_gemm_kernel", blocks, kThreads, 0,
                                                                             stream, p);
  });
}

template <typename T>
void launch_typed(Product product, int rows, const GemmParams& p, cudaStream_t stream) {
  rows == kPlainRows[0] ? launch_rows<T, kPlainRows[0]>(product, p, stream)
                        : launch_rows<T, kPlainRows[1]>(product, p, stream);
}

}  // namespace

void launch_plain_gemm(Product product, int rows, const GemmParams& p, DType dtype, cudaStream_t stream) {
  if (p.quantisation.type != WeightType::kPlain) {
    const bool from_x = product == Product::kGateUp || p.slot_of != nullptr;
    return for_dtype(from_x ? dtype : DType::kFloat32, [&](auto type) {
      rows == kPlainRows[0] ? launch_quantised<decltype(type), kPlainRows[0]>(product, p, stream)
                            : launch_quantised<decltype(type), kPlainRows[1]>(product, p, stream);
    });
  }
  for_dtype(dtype, [&](auto type) { launch_typed<decltype(type)>(product, rows, p, stream); });
}

}  // namespace moe_ext::cuda
