// What becomes of a warp's sums in the grouped products on the tensor cores (gemm_mma.cu, gemm_packed.cu): a fragment
// of 16 positions by 8 columns of weights a time, as mma.m16n8k16 leaves it. In gate_up fragments of gate and of up
// come in turn, so that a thread has gate and up of the same element.
#pragma once

#include "cuda/device/numeric.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/params.h"

namespace moe_ext::cuda {

inline constexpr int kChunkBytes = 16;  // 8 elements
inline constexpr int kChunk = 8;

// h of a warp's accumulators in place, for the epilogue to finish: gate and up shaped, biases added.
template <typename T, Product kProduct, int kFragments, int kMmaColumns>
__device__ __forceinline__ void apply_special(const GemmParams& p, float (&sums)[kFragments][kMmaColumns][4],
                                              int fragments, int expert, int out_column) {
  constexpr int kOutChunks = kProduct == Product::kGateUp ? kMmaColumns / 2 : kMmaColumns;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int j = 0; j < kOutChunks; ++j) {
    float biases[2][2];  // of gate (or the only projection) and up, in the thread's two columns
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      const int64_t column = out_column + j * 8 + lane % 4 * 2 + next;
      const bool inside = column < p.columns;
#pragma unroll
      for (int up = 0; up < 2; ++up) {
        biases[up][next] = 0.0f;
        if (!inside || (kProduct == Product::kDown && up == 1)) continue;
        const int64_t row = weight_row<kProduct, int64_t>(expert, p.columns, column, up == 1, p.interleaved);
        biases[up][next] = bias_at<T>(p.bias, row);
      }
    }
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      if (i >= fragments) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if constexpr (kProduct == Product::kGateUp) {
          float &gate = sums[i][2 * j][e], &up = sums[i][2 * j + 1][e];
          gate += biases[0][e % 2];
          up += biases[1][e % 2];
          shape(p.shaping, gate, up);
        } else {
          sums[i][j][e] = activate_alone(p, sums[i][j][e] + biases[0][e % 2]);
        }
      }
    }
  }
}

// Of transposed, interleaved weights: a thread has gate and up of columns lane % 4 and 4 + lane % 4 of a chunk. Leaves
// gate and up of columns 2 (lane % 4) and the next where those of weights in order are.
template <int kFragments, int kMmaColumns>
__device__ __forceinline__ void sort_interleaved(float (&sums)[kFragments][kMmaColumns][4], int fragments) {
  const int lane = threadIdx.x % kWarpSize, column = lane % 4 * 2;
  const int from = lane / 4 * 4 + column % 4;  // the lane of `column`; the next column is the next lane's
  const bool second = column >= 4;
#pragma unroll
  for (int i = 0; i < kFragments; ++i) {
    if (i >= fragments) break;
#pragma unroll
    for (int j = 0; j < kMmaColumns / 2; ++j) {
      float sorted[2][4];  // gate and up
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int up = 0; up < 2; ++up) {
          const int element = e / 2 * 2 + up;
          const float low = __shfl_sync(kAllLanes, sums[i][2 * j][element], from + e % 2);
          const float high = __shfl_sync(kAllLanes, sums[i][2 * j + 1][element], from + e % 2);
          sorted[up][e] = second ? high : low;
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][2 * j][e] = sorted[0][e], sums[i][2 * j + 1][e] = sorted[1][e];
    }
  }
}

// Rounds a warp's h or y to T and writes it, 16 rows at a time through its part of shared memory, `staged`, so that
// results leave in 16-byte stores. With kEnergies also the warp's part of the energies of channels, where observed.
template <typename T, Product kProduct, bool kEnergies, int kWarpsM, int kFragments, int kMmaColumns>
__device__ __forceinline__ void store_results(const GemmParams& p, const Place& place,
                                              const float (&sums)[kFragments][kMmaColumns][4], int fragments,
                                              int warp_m, int out_column, char* staged) {
  constexpr bool kGateUp = kProduct == Product::kGateUp;
  constexpr int kOutChunks = kGateUp ? kMmaColumns / 2 : kMmaColumns;
  const int lane = threadIdx.x % kWarpSize;
  [[maybe_unused]] const bool observed = p.energies.sums != nullptr;
  [[maybe_unused]] float2 energies[kOutChunks] = {};  // of the two columns, of this thread's rows
#pragma unroll
  for (int i = 0; i < kFragments; ++i) {
    if (i >= fragments) break;
    [[maybe_unused]] float weights[2];
    if (kEnergies && observed) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = (i * kWarpsM + warp_m) * kFragment + half * 8 + lane / 4;
        weights[half] = row < place.rows ? p.energies.weights[place.first_position + row] : -1.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < kOutChunks; ++j) {
      uint32_t upper, lower;  // two columns of rows lane / 4 and lane / 4 + 8
      if constexpr (kGateUp) {
        const float (&gate)[4] = sums[i][2 * j];
        const float (&up)[4] = sums[i][2 * j + 1];
        const float2 h[2] = {gated(p.activation, gate, up), gated(p.activation, gate + 2, up + 2)};
        upper = pack<T>(h[0].x, h[0].y);
        lower = pack<T>(h[1].x, h[1].y);
        if (kEnergies && observed) {
          add_energy(weights[0], h[0], energies[j]);
          add_energy(weights[1], h[1], energies[j]);
        }
      } else {
        upper = pack<T>(sums[i][j][0], sums[i][j][1]);
        lower = pack<T>(sums[i][j][2], sums[i][j][3]);
      }
      *reinterpret_cast<uint32_t*>(staged + swizzled<kOutChunks>(lane / 4, j) + lane % 4 * 4) = upper;
      *reinterpret_cast<uint32_t*>(staged + swizzled<kOutChunks>(lane / 4 + 8, j) + lane % 4 * 4) = lower;
    }
    __syncwarp();
#pragma unroll
    for (int piece = lane; piece < kFragment * kOutChunks; piece += kWarpSize) {
      const int row = piece / kOutChunks, out_chunk = piece % kOutChunks;
      const uint4 value = *reinterpret_cast<const uint4*>(staged + swizzled<kOutChunks>(row, out_chunk));
      const int tile_row = (i * kWarpsM + warp_m) * kFragment + row;
      const int column = out_column + out_chunk * kChunk;
      if (tile_row < place.rows && column < p.columns) {
        *reinterpret_cast<uint4*>(static_cast<T*>(p.c) + (place.first_position + tile_row) * p.columns + column) =
            value;
      }
    }
    __syncwarp();
  }
  if (kEnergies && observed) {
    float* of_part = p.energies.sums + (int64_t{place.tile} * kWarpsM + warp_m) * p.columns;
#pragma unroll
    for (int j = 0; j < kOutChunks; ++j) {
#pragma unroll
      for (int distance = 4; distance < kWarpSize; distance *= 2) {
        energies[j].x += __shfl_xor_sync(kAllLanes, energies[j].x, distance);
        energies[j].y += __shfl_xor_sync(kAllLanes, energies[j].y, distance);
      }
      const int column = out_column + j * kChunk + lane * 2;
      if (lane < 4 && column < p.columns) *reinterpret_cast<float2*>(of_part + column) = energies[j];
    }
  }
}

}  // namespace moe_ext::cuda
