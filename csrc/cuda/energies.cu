// Energies of channels: channels[e, j] += sum over counted slots of expert e of g^2 h_j^2,  g = weights[slot]
//
// The kernels of gate_up sum them where h stands in registers, in float32 and before it is rounded. Here is what comes
// before and after, each by tiles of the sort's list:
//   weights   a block a tile, a thread a row: g^2 by position, and for gemm_wgmma.cu as operands of its tensor cores
//   rows      only where gate_up's kernel does not sum (without gate; transposed weights on the tensor cores; by wgmma
//             quantised weights, biases and limits): a block a tile and some channels, a thread a channel, over h as it
//             is stored
//   sums      a block an expert (at its first tile) and some channels: its tiles' parts, in their order, in float64
// The sums of a part are in one order, too: deterministic. Small batches need neither: one block has all of an expert's
// tokens (small_batch.cu). An expert without tokens has no tile: its channels are not touched.
//
// Operands: wgmma's accumulators of 8 positions are squared into the first operand of an mma.m16n8k8 tf32, channels by
// positions, where lane t of four has positions 2t and 2t + 1 as k = t and t + 4. The second operand holds the weights
// of these positions in even columns and what tf32 lost of them in odd ones, so that two neighbouring columns of the
// product add up to the energy. The tensor cores cut squares off below 2^-10 of their value; weights that are larger by
// 2^-11 make the error of either sign and at most 2^-11.
//
// Cost: reads a few numbers a slot and writes 4 (8 or 12 with operands) bytes; reads 4 bytes a part and channel, and
// reads and writes 8 of a channel.
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/device/dispatch.cuh"
#include "cuda/device/next_kernel.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/ptx_sm80.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/launch.h"
#include "cuda/params.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int kAtOnce = 4;               // vectors of a thread of energy_sums_kernel
constexpr uint32_t kTf32 = 0xffffe000u;  // the bits that the tensor cores see
constexpr float kCentred = 1.0f + 1.0f / 2048.0f;

__global__ void __launch_bounds__(kThreads) energy_weights_kernel(EnergyWeightsParams p) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  const Tile tile = p.tiles.tiles[blockIdx.x];
  if (tile.expert < 0) return;
  const int rows = static_cast<int>(p.tiles.rows);
  const int height = tile_height(tile, rows), first_row = (static_cast<int>(blockIdx.x) - tile.first_tile) * height;
  const int end = min(first_row + height, (tile.count + kFragment - 1) / kFragment * kFragment);
  for (int row = first_row + static_cast<int>(threadIdx.x); row < end; row += kThreads) {
    float weight = -1.0f;
    if (row < tile.count) {
      const int64_t position = int64_t{tile.first} + row, slot = p.slot_of[position];
      if (p.counted == nullptr || p.counted[slot / p.top_k]) {
        const float gate = weight_of(p.weights, p.weights_dtype, slot);
        weight = gate * gate;
      }
      p.energies.weights[position] = weight;
    }
    if (p.energies.fragments == nullptr) continue;
    const float whole = (weight < 0.0f ? 0.0f : weight) * kCentred;
    const float first = __uint_as_float(__float_as_uint(whole) & kTf32);
    // Row 8 b + 2 t + c of a fragment: element 2 b + c of lane t.
    float* of_fragment = reinterpret_cast<float*>(p.energies.fragments + int64_t{blockIdx.x} * energy_fragments(rows) +
                                                  (row - first_row) / kFragment * kEnergyFragment);
    const int element = row % 8 / 2 * 4 + row % kFragment / 8 * 2 + row % 2;
    of_fragment[element] = first;
    of_fragment[element + kEnergyFragment / 2 * 4] = whole - first;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) energy_rows_kernel(EnergyRowsParams p) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  const unsigned column_blocks = static_cast<unsigned>((p.columns + kThreads - 1) / kThreads);
  const int index = static_cast<int>(blockIdx.x / column_blocks);
  const int64_t column = int64_t{blockIdx.x % column_blocks} * kThreads + threadIdx.x;
  const Tile tile = p.tiles.tiles[index];
  if (tile.expert < 0 || column >= p.columns) return;
  const int height = tile_height(tile, static_cast<int>(p.tiles.rows));
  const int first_row = (index - tile.first_tile) * height, end = min(first_row + height, tile.count);
  float sum = 0.0f;
  for (int row = first_row; row < end; ++row) {
    const int64_t position = int64_t{tile.first} + row;
    add_energy(p.energies.weights[position], to_float(static_cast<const T*>(p.h)[position * p.columns + column]), sum);
  }
  p.energies.sums[index * p.columns + column] = sum;
}

__device__ __forceinline__ void add(double& sum, double value) { sum += value; }
template <typename Two>
__device__ __forceinline__ void add(double2& sum, const Two& value) {
  sum.x += value.x, sum.y += value.y;
}

// Vector: of neighbouring channels, of which p.columns is a multiple. A thread has every kThreads-th of kAtOnce.
template <typename Vector>
__global__ void __launch_bounds__(kThreads) energy_sums_kernel(EnergySumsParams p) {
  constexpr int kColumns = sizeof(Vector) / sizeof(float);
  using Sums = std::conditional_t<kColumns == 1, double, double2>;
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  const int vectors = static_cast<int>(p.columns) / kColumns;
  const unsigned column_blocks = static_cast<unsigned>((vectors + kThreads * kAtOnce - 1) / (kThreads * kAtOnce));
  const int index = static_cast<int>(blockIdx.x / column_blocks);
  const int first = static_cast<int>(blockIdx.x % column_blocks) * kThreads * kAtOnce + static_cast<int>(threadIdx.x);
  const Tile tile = p.tiles.tiles[index];
  if (tile.expert < 0 || tile.first_tile != index || first >= vectors) return;
  const int rows = static_cast<int>(p.tiles.rows), parts = static_cast<int>(p.energies.parts);
  const int end = (tile.count + rows - 1) / rows * parts;
  const Vector* of_first = reinterpret_cast<const Vector*>(p.energies.sums) + int64_t{index} * parts * vectors + first;
  auto* channels = reinterpret_cast<Sums*>(p.channels) + int64_t{tile.expert} * vectors + first;
  int at[kAtOnce];  // beyond the last vector: the first once more, for nothing
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) at[i] = first + i * kThreads < vectors ? i * kThreads : 0;
  Sums sums[kAtOnce] = {};
  for (int part = 0; part < end; ++part, of_first += vectors) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) add(sums[i], of_first[at[i]]);
  }
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    if (i > 0 && at[i] == 0) return;
    Sums channel = channels[at[i]];
    add(channel, sums[i]);
    channels[at[i]] = channel;
  }
}

template <typename Vector>
void launch_sums(const EnergySumsParams& p, cudaStream_t stream) {
  const int64_t vectors = p.columns * static_cast<int64_t>(sizeof(float)) / static_cast<int64_t>(sizeof(Vector));
  const int64_t of_block = kThreads * kAtOnce;
  const unsigned blocks = grid_size(p.tiles.max_tiles * ((vectors + of_block - 1) / of_block));
  launch_next<energy_sums_kernel<Vector>>("energy_sums_kernel", blocks, kThreads, 0, stream, p);
}

}  // namespace

void launch_energy_weights(const EnergyWeightsParams& p, cudaStream_t stream) {
  launch_next<energy_weights_kernel>("energy_weights_kernel", grid_size(p.tiles.max_tiles), kThreads, 0, stream, p);
}

void launch_energy_rows(const EnergyRowsParams& p, cudaStream_t stream) {
  const unsigned blocks = grid_size(p.tiles.max_tiles * ((p.columns + kThreads - 1) / kThreads));
  for_dtype(p.dtype, [&](auto type) {
    launch_next<energy_rows_kernel<decltype(type)>>("energy_rows_kernel", blocks, kThreads, 0, stream, p);
  });
}

void launch_energy_sums(const EnergySumsParams& p, cudaStream_t stream) {
  const bool pairs = p.columns % 2 == 0 && reinterpret_cast<uintptr_t>(p.channels) % sizeof(double2) == 0;
  pairs ? launch_sums<float2>(p, stream) : launch_sums<float>(p, stream);
}

}  // namespace moe_ext::cuda
