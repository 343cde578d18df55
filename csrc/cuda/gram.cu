// Gram matrices: gram[t, i, j] = <f_i(x[t, :]), f_j(x[t, :])>, f_e rounded to the dtype                (T, E, E)
// float64
//
// Tokens run in parts that bound the memory. Of a part, the grouped products of the experts operators compute h and y:
// all tokens are positions of every expert, position e * T + t, so that there is nothing to sort. Then a block takes a
// token and a pair of tiles of experts: kColumns columns of their rows of y at a time go to shared memory as float64,
// each thread sums kPer x kPer products over every fourth column, and the four parts are added.
//
// A product of two float32 is exact in float64, and every element is summed in one order, wherever its experts stand:
// deterministic, symmetric, and equal for equal experts. Nothing waits for the device; launches depend on shapes only.
//
// Cost: 6 E H I FLOPs a token for y; E (E + 1) H float64 FLOPs and (E / tile) reads of E H elements for the products.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "cuda/device/dispatch.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/gemm_launch.h"
#include "cuda/heuristics.h"
#include "cuda/launch.h"
#include "cuda/params.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 8;                             // threads along the rows, and along the columns of a tile
constexpr int kSlices = kThreads / (kSide * kSide);  // parts that the columns of y are summed in
constexpr int kColumns = 64;                         // of y in shared memory
constexpr int kListThreads = 256;

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

// The list that a sort would give if every token went to every expert, with one slot a token.
struct ListParams {
  int* slot_of;  // (E * tokens) out
  TileList gate_up;
  TileList down;
  int64_t tokens;
  int64_t num_experts;
};

__global__ void __launch_bounds__(kListThreads) list_all_kernel(ListParams p) {
  const int64_t step = int64_t{gridDim.x} * kListThreads;
  const int64_t begin = int64_t{blockIdx.x} * kListThreads + threadIdx.x;
  for (int64_t i = begin; i < p.num_experts * p.tokens; i += step) p.slot_of[i] = static_cast<int>(i % p.tokens);
  const auto list = [&](const TileList& list) {
    const int64_t of_expert = list.max_tiles / p.num_experts;
    for (int64_t i = begin; i < list.max_tiles; i += step) {
      const int64_t expert = i / of_expert;
      list.tiles[i] = {static_cast<int>(expert), static_cast<int>(expert * of_expert),
                       static_cast<int>(expert * p.tokens), static_cast<int>(p.tokens)};
    }
  };
  list(p.gate_up);
  list(p.down);
}

// Every token in a slot of every expert: what the choice of kernels is made by.
ExpertsParams as_experts(const LayerParams& layer, int64_t tokens) {
  ExpertsParams e{};
  static_cast<LayerParams&>(e) = layer;
  e.tokens = tokens;
  e.top_k = layer.num_experts;
  return e;
}

}  // namespace

void gram(const GramParams& p, const Scratch& scratch, cudaStream_t stream) {
  if (p.tokens == 0) return;
  const int64_t part = gram_part(p);
  if (part * p.num_experts > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("moe_ext: expert_gram: T * E is beyond 2^31 - 1; pass fewer tokens at a time");
  }
  const Device device = current_device();
  const Choice choice = choose_sorted(as_experts(p, part), device, forced_kernels());
  const auto tiles_for = [&](int rows, int64_t tokens) { return p.num_experts * ((tokens + rows - 1) / rows); };

  const PositionRows rows = allocate_rows(choice, p, part * p.num_experts, scratch);
  ListParams list{};
  list.slot_of = allocate<int>(scratch, part * p.num_experts);
  list.gate_up = {allocate<Tile>(scratch, tiles_for(choice.gate_up_rows, part)), choice.gate_up_rows, 0};
  list.down = {allocate<Tile>(scratch, tiles_for(choice.down_rows, part)), choice.down_rows, 0};
  list.num_experts = p.num_experts;

  for (int64_t first = 0; first < p.tokens; first += part) {
    const int64_t tokens = std::min(part, p.tokens - first);
    list.tokens = tokens;
    list.gate_up.max_tiles = tiles_for(choice.gate_up_rows, tokens);
    list.down.max_tiles = tiles_for(choice.down_rows, tokens);
    const int64_t blocks = (tokens * p.num_experts + kListThreads - 1) / kListThreads;
    list_all_kernel<<<grid_size(blocks), kListThreads, 0, stream>>>(list);
    check_launch("list_all_kernel");

    LayerParams layer = p;
    layer.x = static_cast<const char*>(p.x) + first * p.hidden * element_size(p.dtype);
    layer.tokens = tokens;
    launch_gemms(choice, {layer, 1, list.slot_of, list.gate_up, list.down, rows, {}}, device, stream);
    double* of_part = p.gram + first * p.num_experts * p.num_experts;
    for_row_dtype(rows.dtype, p.dtype, [&](auto row, auto type) {
      launch_products<decltype(row), decltype(type)>({rows.y, of_part, tokens, p.num_experts, p.hidden}, stream);
    });
  }
}

}  // namespace moe_ext::cuda
