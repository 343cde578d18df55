// Grouped products of quantised weights, activations in bf16 or fp16, float32 accumulation:
//   gate_up   h[p, :] = act(gate[e] x) * (up[e] x),  x = x[token of p, :]          (positions, I)
//   down      y[p, :] = down[e] h[p, :]                                            (positions, H)
//
// As gemm_mma.cu: a block computes a tile of up to `rows` positions of one expert by a range of c's columns, with steps
// of 64 elements of k in shared memory, filled by cp.async. The weights' bytes go there as they are stored, a line of
// 64 bytes of each row at a time (packed.cuh): with four-bit weights every other step brings one. A warp reads its
// lanes' 16 bytes of a line and turns them into operands in registers; with warps_m warps along the positions each
// weight is turned so often. Activations are read 16 bytes a lane, in the columns that the weights come in; the chunks
// of odd rows are swapped so that neither conflicts.
//
// Values are exact; a warp sums the products of 32 columns (64 of eight-bit weights) on their own and adds them, times
// their scale, to its sums, in float32. A thread reads the scales, and zero points, of one row of the tile a step ahead
// and leaves them in shared memory.
//
// Rows of weights may be interleaved: they are picked row by row. Results: mma_results.cuh.
//
// Every element is a sum in order of k by one warp: deterministic. Cost of a tile: 2 * rows * columns * inner FLOPs;
// reads rows * inner activations and columns * inner weights of 4 or 8 bits, and their scales.
#include "cuda/device/dispatch.cuh"
#include "cuda/device/mma_results.cuh"
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

constexpr int kInner = 64;                // columns of k of a step
constexpr int kChunks = kInner / kChunk;  // of activations of a row and step
constexpr int kLineChunks = kLineBytes / kChunkBytes;
constexpr int kStages = 3;

// Shared memory of a block: stages of activations, of lines, and of what belongs to them.
template <WeightType kType, int kShape>
struct Layout {
  static constexpr GemmShape S = kGemmShapes[kShape];
  static constexpr int kStepsPerNewLine = kLineColumns<kType> / kInner;
  static constexpr int kLines = kStepsPerNewLine == 1 ? kStages : 2;  // the one under way, and those on their way
  static constexpr int kScales = 2 / kStepsPerScale<kType>;           // of a row and step
  static constexpr int kActivationBytes = S.rows * kInner * 2;        // of a stage
  static constexpr int kWeightBytes = S.columns * kLineBytes;
  static constexpr int kFirstLine = kStages * kActivationBytes;
  static constexpr int kFirstScale = kFirstLine + kLines * kWeightBytes;
  static constexpr int kFirstZero = kFirstScale + 2 * kScales * S.columns * 4;
  static constexpr int kBlocks = S.blocks_per_multiprocessor < 3 ? S.blocks_per_multiprocessor : 3;  // more would spill
  static constexpr int kBytes = kFirstZero + (kType == WeightType::kInt4 ? 2 * kScales * S.columns : 0);
};

// Byte offset of a chunk of activations: lanes of two neighbouring rows read different banks.
template <WeightType kType>
__device__ __forceinline__ int swapped(int row, int chunk) {
  return (row * kChunks + (chunk ^ row % 2 * (has_four_bits(kType) ? 4 : 1))) * kChunkBytes;
}

template <typename T, WeightType kType, int kShape, Product kProduct>
__global__ void __launch_bounds__(kGemmShapes[kShape].threads(), Layout<kType, kShape>::kBlocks)
    packed_gemm_kernel(GemmParams p) {
  using L = Layout<kType, kShape>;
  constexpr GemmShape S = kGemmShapes[kShape];
  constexpr bool kGateUp = kProduct == Product::kGateUp;
  constexpr int kColumns = kGateUp ? S.columns / 2 : S.columns;  // of c, a block
  constexpr int kRowStep = S.threads() / kChunks, kACopies = S.rows / kRowStep;
  constexpr int kLineStep = S.threads() / kLineChunks, kBCopies = S.columns / kLineStep;
  constexpr int kFragments = S.rows / kFragment / S.warps_m;  // of a warp, at most
  constexpr int kWarpColumns = S.columns / S.warps_n;         // of b, a warp
  constexpr int kMmaColumns = kWarpColumns / 8;
  constexpr int kOutChunks = kGateUp ? kMmaColumns / 2 : kMmaColumns;
  constexpr int kSteps = kStepsPerScale<kType>;
  static_assert(S.rows % kRowStep == 0 && S.columns % kLineStep == 0 && kLineStep % 16 == 0);
  static_assert(S.columns <= S.threads() && kMmaColumns % 2 == 0);
  static_assert(S.warps_m * S.warps_n * kFragment * kOutChunks * kChunkBytes <= L::kFirstLine);
  extern __shared__ __align__(128) char shared[];

  // ---- which tile
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  const Place place = place_of(p, blockIdx.x, S.rows, kColumns);
  if (place.expert < 0) return;
  const int first_column = place.first_column, rows = place.rows;
  const Quantisation& q = p.quantisation;

  // ---- what this thread copies: one chunk of every kRowStep-th position, and of every kLineStep-th row of weights
  const int chunk = threadIdx.x % kChunks, copy_row = threadIdx.x / kChunks;
  const T* a_rows[kACopies];
#pragma unroll
  for (int i = 0; i < kACopies; ++i) {
    const int row = copy_row + i * kRowStep;
    int64_t a_row = 0;
    if (row < rows) {
      const int64_t position = place.first_position + row;
      a_row = kGateUp || p.slot_of != nullptr ? p.slot_of[position] / p.top_k : position;
    }
    a_rows[i] = static_cast<const T*>(p.a) + a_row * p.inner + chunk * kChunk;
  }
  // Row r of b's tile is a row of weights: in gate_up, 8 of gate and 8 of up in turn.
  const auto column_of = [&](int row) { return first_column + (kGateUp ? row / 16 * 8 + row % 8 : row); };
  const auto is_up = [](int row) { return kGateUp && row / 8 % 2 == 1; };
  const int columns = static_cast<int>(p.columns);
  const int line_row = threadIdx.x / kLineChunks, line_chunk = threadIdx.x % kLineChunks;
  const int b_column = column_of(line_row);
  constexpr int kColumnStep = kGateUp ? kLineStep / 2 : kLineStep;
  const int64_t b_step = int64_t{kColumnStep} * (kGateUp && p.interleaved ? 2 : 1) * q.row_bytes;
  const uint8_t* b_row = static_cast<const uint8_t*>(p.b) + line_chunk * kChunkBytes +
                         q.row_bytes * weight_row<kProduct, int64_t>(place.expert, columns, b_column, is_up(line_row),
                                                                     kGateUp && p.interleaved);

  const uint32_t shared_base = ptx::shared_address(shared);
  const auto copy_step = [&](int step) {
    const uint32_t a_stage = shared_base + step % kStages * L::kActivationBytes;
    const int64_t k = int64_t{step} * kInner;
    const bool inside = k + chunk * kChunk < p.inner;
#pragma unroll
    for (int i = 0; i < kACopies; ++i) {
      const int row = copy_row + i * kRowStep;
      ptx::copy_async(a_stage + swapped<kType>(row, chunk), a_rows[i] + k, inside && row < rows);
    }
    if (step % L::kStepsPerNewLine != 0) return;
    const int line = step / L::kStepsPerNewLine;
    const uint32_t b_stage = shared_base + L::kFirstLine + line % L::kLines * L::kWeightBytes;
#pragma unroll
    for (int i = 0; i < kBCopies; ++i) {
      ptx::copy_async(b_stage + (line_row + i * kLineStep) * kLineBytes + line_chunk * kChunkBytes,
                      b_row + i * b_step + int64_t{line} * kLineBytes, b_column + i * kColumnStep < columns);
    }
  };

  // ---- the scales of one row of the tile, of which this thread brings those of a step
  float* const all_scales = reinterpret_cast<float*>(shared + L::kFirstScale);
  uint8_t* const all_zeros = reinterpret_cast<uint8_t*>(shared + L::kFirstZero);
  const bool has_row = S.columns == S.threads() || static_cast<int>(threadIdx.x) < S.columns;
  const int own_column = column_of(threadIdx.x);
  const bool brings = has_row && own_column < columns;
  const int64_t own_scales =
      brings ? scales_of_row(
                   q, place.expert,
                   weight_row<kProduct, int>(0, columns, own_column, is_up(threadIdx.x), kGateUp && p.interleaved))
             : 0;
  float next_scales[L::kScales];
  [[maybe_unused]] uint8_t next_zeros[L::kScales];
  const auto read_scales = [&](int step) {
#pragma unroll
    for (int i = 0; i < L::kScales; ++i) {
      const int group = min((step * kInner + i * kStepColumns) >> q.group_shift, q.groups - 1);
      next_scales[i] = brings ? scale_at(q, own_scales + group) : 0.0f;
      if constexpr (kType == WeightType::kInt4) {
        next_zeros[i] = brings && q.zeros != nullptr ? q.zeros[own_scales + group] : 8;
      }
    }
  };
  const auto leave_scales = [&](int step) {
    if (!has_row) return;
#pragma unroll
    for (int i = 0; i < L::kScales; ++i) {
      const int at = (step % 2 * L::kScales + i) * S.columns + static_cast<int>(threadIdx.x);
      all_scales[at] = next_scales[i];
      if constexpr (kType == WeightType::kInt4) all_zeros[at] = next_zeros[i];
    }
  };

  // ---- the product
  const int lane = threadIdx.x % kWarpSize;
  const int warp_m = threadIdx.x / kWarpSize / S.warps_n;
  const int warp_n = threadIdx.x / kWarpSize % S.warps_n;
  // Fragments go to the warps in turn: those of a short tile are shared out evenly.
  const int fragments = ((rows + kFragment - 1) / kFragment - warp_m + S.warps_m - 1) / S.warps_m;
  float sums[kFragments][kMmaColumns][4] = {};

  const auto multiply_step = [&](int step) {
    const char* a_stage = shared + step % kStages * L::kActivationBytes;
    const int line = step / L::kStepsPerNewLine;
    const char* b_stage = shared + L::kFirstLine + line % L::kLines * L::kWeightBytes +
                          (warp_n * kWarpColumns + lane / 4) * kLineBytes + lane % 4 * kChunkBytes;
    const int first_scale = step % 2 * L::kScales * S.columns + warp_n * kWarpColumns;
    // Of four-bit weights an odd step has the upper bytes of every two.
    const int shift = step % L::kStepsPerNewLine * 8;
#pragma unroll
    for (int first = 0; first < 2; first += kSteps) {
      uint32_t b[kMmaColumns][kSteps][4];
      float2 scales[kMmaColumns];
#pragma unroll
      for (int j = 0; j < kMmaColumns; ++j) {
        const int at = first_scale + first / kSteps * S.columns + j * 8;
        scales[j] = *reinterpret_cast<const float2*>(all_scales + at + lane % 4 * 2);
        uint32_t zero = 0;
        if constexpr (kType == WeightType::kInt4) zero = zero_pair<T>(all_zeros[at + lane / 4]);
        uint4 weights = *reinterpret_cast<const uint4*>(b_stage + j * 8 * kLineBytes);
        if constexpr (L::kStepsPerNewLine > 1) {
          weights = make_uint4(weights.x >> shift, weights.y >> shift, weights.z >> shift, weights.w >> shift);
        }
#pragma unroll
        for (int s = 0; s < kSteps; ++s) values_of<kType, T>(weights, first + s, zero, b[j][s]);
      }
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        if (i >= fragments) break;
        const int row = (i * S.warps_m + warp_m) * kFragment + lane / 4;
        uint4 a[kSteps][2];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const int of_lane = chunk_of_lane<kType>(first + s);
          a[s][0] = *reinterpret_cast<const uint4*>(a_stage + swapped<kType>(row, of_lane));
          a[s][1] = *reinterpret_cast<const uint4*>(a_stage + swapped<kType>(row + 8, of_lane));
        }
#pragma unroll
        for (int j = 0; j < kMmaColumns; ++j) {
          float sum[4] = {};
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            ptx::multiply_add(sum, {a[s][0].x, a[s][1].x, a[s][0].y, a[s][1].y}, b[j][s][0], b[j][s][1], T{});
            ptx::multiply_add(sum, {a[s][0].z, a[s][1].z, a[s][0].w, a[s][1].w}, b[j][s][2], b[j][s][3], T{});
          }
          sums[i][j][0] = fmaf(scales[j].x, sum[0], sums[i][j][0]);
          sums[i][j][1] = fmaf(scales[j].y, sum[1], sums[i][j][1]);
          sums[i][j][2] = fmaf(scales[j].x, sum[2], sums[i][j][2]);
          sums[i][j][3] = fmaf(scales[j].y, sum[3], sums[i][j][3]);
        }
      }
    }
  };

  const int steps = static_cast<int>((p.inner + kInner - 1) / kInner);
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy_step(step);
    ptx::copy_async_commit();
  }
  read_scales(0);
  leave_scales(0);
  for (int step = 0; step < steps; ++step) {
    ptx::copy_async_wait<kStages - 2>();
    __syncthreads();  // this step's copies and scales are there, and nobody reads what is filled next
    if (step + kStages - 1 < steps) copy_step(step + kStages - 1);
    ptx::copy_async_commit();
    if (step + 1 < steps) read_scales(step + 1);
    multiply_step(step);
    if (step + 1 < steps) leave_scales(step + 1);
  }
  ptx::copy_async_wait<0>();
  __syncthreads();  // from here on shared memory holds results

  char* staged = shared + threadIdx.x / kWarpSize * (kFragment * kOutChunks * kChunkBytes);
  const int out_column = first_column + warp_n * kOutChunks * kChunk;
  if (p.special) apply_special<T, kProduct>(p, sums, fragments, place.expert, out_column);
  store_results<T, kProduct, kGateUp, S.warps_m>(p, place, sums, fragments, warp_m, out_column, staged);
}

template <typename T, WeightType kType, int kShape, Product kProduct>
void launch_with(const GemmParams& p, cudaStream_t stream) {
  constexpr GemmShape S = kGemmShapes[kShape];
  constexpr int kBytes = Layout<kType, kShape>::kBytes;
  constexpr int kColumns = kProduct == Product::kGateUp ? S.columns / 2 : S.columns;
  const unsigned blocks = grid_size(p.max_tiles * ((p.columns + kColumns - 1) / kColumns));
  allow_shared(packed_gemm_kernel<T, kType, kShape, kProduct>, kBytes);
  launch_next<packed_gemm_kernel<T, kType, kShape, kProduct>>("packed_gemm_kernel", blocks, S.threads(), kBytes, stream,
                                                              p);
}

}  // namespace

void launch_packed_gemm(Product product, int shape, const GemmParams& p, DType dtype, cudaStream_t stream) {
  for_16_bit_dtype(dtype, [&](auto type) {
    for_weight_type(p.quantisation.type, [&](auto weights) {
      for_product(product, [&](auto which) {
        using T = decltype(type);
        constexpr WeightType kType = weights.value;
        shape == kFlat ? launch_with<T, kType, kFlat, which.value>(p, stream)
                       : launch_with<T, kType, kNarrow, which.value>(p, stream);
      });
    });
  });
}

}  // namespace moe_ext::cuda
