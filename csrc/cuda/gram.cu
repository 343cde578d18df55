// Gram matrices: gram[t, i, j] = <f_i(x[t, :]), f_j(x[t, :])>, f_e rounded to the dtype                (T, E, E)
// float64
//
// Tokens run in parts that bound the memory; all_experts.cu computes y of a part. Then a block takes a token and a pair
// of tiles of experts: kColumns columns of their rows of y at a time go to shared memory as float64, each thread sums
// kPer x kPer products over every fourth column, and the four parts are added.
//
// A product of two float32 is exact in float64, and every element is summed in one order, wherever its experts stand:
// deterministic, symmetric, and equal for equal experts. Nothing waits for the device; launches depend on shapes only.
//
// Cost: 6 E H I FLOPs a token for y; E (E + 1) H float64 FLOPs and (E / tile) reads of E H elements for the products.
#include "cuda/all_experts.h"
#include "cuda/device/dispatch.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/launch.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 8;                             // threads along the rows, and along the columns of a tile
constexpr int kSlices = kThreads / (kSide * kSide);  // parts that the columns of y are summed in
constexpr int kColumns = 64;                         // of y in shared memory

// y of a part: (E, tokens, H).
struct ProductsParams {
  const void* y;
  double* gram;  // (tokens, E, E) out
  int64_t tokens;
  int64_t num_experts;
  int64_t hidden;
};

// rows[e, c] = y[first_expert + e, token, first_column + c], 0 beyond the edges. T is the dtype that y is rounded to.
template <typename TY, typename T, int kTile>
__device__ __forceinline__ void copy_rows(const ProductsParams& p, int64_t token, int64_t first_expert,
                                          int64_t first_column, double (*rows)[kColumns + 1]) {
  const int64_t column = first_column + threadIdx.x % kColumns;
  for (int row = threadIdx.x / kColumns; row < kTile; row += kThreads / kColumns) {
    const int64_t expert = first_expert + row;
    double value = 0.0;
    if (expert < p.num_experts && column < p.hidden) {
      const TY element = static_cast<const TY*>(p.y)[(expert * p.tokens + token) * p.hidden + column];
      value = to_float(from_float<T>(to_float(element)));
    }
    rows[row][threadIdx.x % kColumns] = value;
  }
}

template <typename TY, typename T, int kPer>
__global__ void __launch_bounds__(kThreads) products_kernel(ProductsParams p) {
  constexpr int kTile = kSide * kPer;
  __shared__ double left[kTile][kColumns + 1];
  __shared__ double right[kTile][kColumns + 1];

  // ---- which token, and which tiles of experts: (0, 0), (0, 1) ... (1, 1) ...
  const int64_t tiles = (p.num_experts + kTile - 1) / kTile;
  const int64_t pairs = tiles * (tiles + 1) / 2;
  const int64_t token = blockIdx.x / pairs;
  int64_t i = 0, rest = blockIdx.x % pairs;
  for (; rest >= tiles - i; ++i) rest -= tiles - i;
  const int64_t first_i = i * kTile, first_j = (i + rest) * kTile;

  // ---- the products of this thread: rows y + kSide * a of the one tile with rows x + kSide * b of the other
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide % kSide, slice = threadIdx.x / (kSide * kSide);
  double sums[kPer][kPer] = {};
  for (int64_t column = 0; column < p.hidden; column += kColumns) {
    __syncthreads();  // the columns before have been read
    copy_rows<TY, T, kTile>(p, token, first_i, column, left);
    copy_rows<TY, T, kTile>(p, token, first_j, column, right);
    __syncthreads();
#pragma unroll 4
    for (int c = slice; c < kColumns; c += kSlices) {
#pragma unroll
      for (int a = 0; a < kPer; ++a) {
#pragma unroll
        for (int b = 0; b < kPer; ++b) sums[a][b] += left[y + kSide * a][c] * right[x + kSide * b][c];
      }
    }
  }

  // ---- the slices together, in their order
  __shared__ double parts[kSlices - 1][kSide * kSide];
  double* gram = p.gram + token * p.num_experts * p.num_experts;
#pragma unroll
  for (int a = 0; a < kPer; ++a) {
#pragma unroll
    for (int b = 0; b < kPer; ++b) {
      __syncthreads();
      if (slice > 0) parts[slice - 1][y * kSide + x] = sums[a][b];
      __syncthreads();
      if (slice > 0) continue;
      double sum = sums[a][b];
#pragma unroll
      for (int part = 0; part < kSlices - 1; ++part) sum += parts[part][y * kSide + x];
      const int64_t row = first_i + y + kSide * a, col = first_j + x + kSide * b;
      if (row >= p.num_experts || col >= p.num_experts) continue;
      gram[row * p.num_experts + col] = sum;
      if (first_i != first_j) gram[col * p.num_experts + row] = sum;
    }
  }
}

template <typename TY, typename T>
void launch_products(const ProductsParams& p, cudaStream_t stream) {
  const auto blocks = [&](int64_t tile) {
    const int64_t tiles = (p.num_experts + tile - 1) / tile;
    return grid_size(p.tokens * (tiles * (tiles + 1) / 2));
  };
  if (p.num_experts <= kSide) {
    products_kernel<TY, T, 1><<<blocks(kSide), kThreads, 0, stream>>>(p);
  } else {
    products_kernel<TY, T, 2><<<blocks(2 * kSide), kThreads, 0, stream>>>(p);
  }
  check_launch("products_kernel");
}

}  // namespace

void gram(const GramParams& p, const Scratch& scratch, cudaStream_t stream) {
  for_all_experts("expert_gram", p, scratch, stream, [&](const AllOutputs& outputs) {
    double* of_part = p.gram + outputs.first * p.num_experts * p.num_experts;
    for_row_dtype(outputs.dtype, p.dtype, [&](auto row, auto type) {
      launch_products<decltype(row), decltype(type)>({outputs.y, of_part, outputs.tokens, p.num_experts, p.hidden},
                                                     stream);
    });
  });
}

}  // namespace moe_ext::cuda
