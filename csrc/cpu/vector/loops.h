// The hot loops of the experts, gram and projection operators, compiled once per instruction set and reached through a
// table. All that the rest of csrc/cpu includes of this folder.
//
// All products are dot products of an activation row and a weight row, both contiguous along the reduction, or of an
// activation row and a column of a transposed weight matrix: weights are read as transformers stores them. Every output
// element has one vector accumulator that walks a chunk of the reduction in order, and chunks are added in order,
// whatever the tile it falls in: a token's result has the same bits in any batch and for any number of threads.
#pragma once

#include <stdint.h>

#include "cpu/vector/byte_rows.h"
#include "moe.h"

namespace moe_ext::cpu {

// Weight rows of one block, at most: 64 rows of a chunk (kChunkBytes) are 256 KiB, and with the next block's, which is
// fetched meanwhile, half of a usual L2. Half as many would read the activations twice as often.
inline constexpr int64_t kBlockColumns = 64;
// Bytes of a row that a block works on at a time: a tile of six activation rows of this length stays in L1.
inline constexpr int64_t kChunkBytes = 4096;

// Rows of a weight matrix, each k elements long: [0, split) follow each other from `first` on, the others from
// `second`. Of a transposed one its columns, that start there. Of a bias its elements.
struct WeightRows {
  const void* first;  // null: there are none
  const void* second;
  int64_t split;
  // Of quantised weights: which rows of their expert those are, and the scales and zeros of the expert's first row.
  int64_t first_row;
  int64_t second_row;
  const void* scales;
  const uint8_t* zeros;  // or null
};

// How the rows of a quantised weight matrix lie.
struct QuantisedRows {
  WeightFormat format;
  int64_t row_bytes;  // from row to row
  int64_t groups;     // scales of a row
};

// Columns of quantised weights that are unpacked at a time, a multiple of every group, and floats from one unpacked row
// to the next: a cache line more, so that rows do not share the same sets of a cache. A block of them takes 260 KiB.
inline constexpr int64_t kUnpackedColumns = 1024;
inline constexpr int64_t kUnpackedStride = kUnpackedColumns + 16;
inline constexpr int64_t kUnpackedBytes = kBlockColumns * kUnpackedStride * static_cast<int64_t>(sizeof(float));

// y[r, n] = rows[r] . weights[n]   for r < row_count, n < columns, in float32.
struct Product {
  const void* rows;         // (row_count, k) activations, of the variant's operand type
  WeightRows weights;       // `columns` rows
  WeightRows next_weights;  // what the same thread multiplies next, to be fetched meanwhile
  int64_t row_count;
  int64_t columns;  // at most kBlockColumns
  int64_t k;
  float* y;                        // (row_count, kBlockColumns) out; columns beyond `columns` are left as they are
  WeightRows bias;                 // `columns` elements that are added to every row of y, or none
  int64_t transposed;              // 0; or, of a transposed weight matrix (k, transposed), the elements of its rows
  const QuantisedRows* quantised;  // null: weights of the model's dtype
  void* unpacked;                  // QuantisedLayer::unpacked_bytes() of the thread's own, where weights are quantised
  bool byte_rows = false;          // rows are byte_blocks(k) ByteBlocks, of Loops::quantise
};

// What of y (row_count, kBlockColumns) Loops::gate reads for column i < columns: gate y[r, i], up y[r, columns + i]; or
// interleaved gate y[r, 2 i], up y[r, 2 i + 1]; or, not gated, up y[r, i].
constexpr int64_t gate_columns(const Formula& formula) { return formula.gated ? kBlockColumns / 2 : kBlockColumns; }

// Columns of a token's rows that the gram loop has in float64 at a time, and most rows of its tiles.
inline constexpr int64_t kGramChunk = 512;
inline constexpr int64_t kTallestGramTile = 4;

// A token's outputs of every expert, a row each.
struct TokenRows {
  const void* first;
  int64_t stride;  // elements from an expert's row to the next's
  int64_t num_experts;
  int64_t hidden;
};

// Doubles that the gram loop works in: a chunk of every row, and rows that fill the last tile.
static inline int64_t gram_scratch(int64_t num_experts) {
  return (num_experts + kTallestGramTile - 1) / kTallestGramTile * kTallestGramTile * kGramChunk;
}

struct Loops {
  // Whether activations of bfloat16 models are multiplied as bfloat16 (exact products, float32 sums); all other
  // activations are multiplied as float32. Weights always are what the model has.
  bool bfloat16_operands;

  // dst[i] = float(src[i]), i < n; src of `dtype`.
  void (*widen)(DType dtype, const void* src, float* dst, int64_t n);

  // `dtype` is that of the model: of the bias, and of weights that are not quantised.
  void (*multiply)(DType dtype, const Product& p);

  // h[r, i] = the formula's h of row r's gate and up   for r < row_count, i < columns <= gate_columns(formula).
  // h of `operand` (float32, or bfloat16 rounded to nearest even) with stride h_stride.
  void (*gate)(const Formula& formula, const float* y, int64_t row_count, int64_t columns, DType operand, void* h,
               int64_t h_stride);

  // sums[i] += sum over rows r of weights[r] * h[r, i]^2   for i < columns, r in order; a row whose weight is negative
  // counts in nothing, whatever it holds. h of `operand` with stride h_stride.
  void (*energy)(DType operand, const void* h, int64_t h_stride, const double* weights, int64_t row_count,
                 int64_t columns, double* sums);

  // sums[tokens[r], i] += weights[r] * y[r, i]   for r < row_count, i < columns, r in order; y, sums with
  // kBlockColumns columns. squares[r] = sum over i of y[r, i]^2, unless it is null.
  void (*scatter)(const float* y, const float* weights, const int64_t* tokens, int64_t row_count, int64_t columns,
                  float* sums, float* squares);

  // dst[i] = dtype(src[i]), round to nearest even.
  void (*narrow)(DType dtype, const float* src, void* dst, int64_t n);

  // gram[i, j] = row i . row j for i, j < num_experts, in float64; rows of `dtype`. scratch: gram_scratch() doubles at
  // the start of a cache line, of which those of rows from num_experts on are zero.
  void (*gram)(DType dtype, const TokenRows& y, double* scratch, double* gram);

  // sums[r] = y[r, :] . g[r, :]   over `columns` elements of each, in float64, for r < row_count; y with kBlockColumns
  // columns, g with stride g_stride.
  void (*project)(const float* y, const float* g, int64_t g_stride, int64_t row_count, int64_t columns, double* sums);

  // blocks = the row of k floats in 8 bits, for weights of the type; zeros: whether they have zero points.
  void (*quantise)(WeightType type, bool zeros, const float* row, int64_t k, ByteBlock* blocks);

  DType operand(DType dtype) const {
    return bfloat16_operands && dtype == DType::kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
  }
};

extern const Loops kPortableLoops;
#if defined(__x86_64__)
extern const Loops kAvx2Loops;
extern const Loops kAvx512Loops;
extern const Loops kAvx512Bf16Loops;
#endif

// The loops of active_isa().
const Loops& active_loops();

}  // namespace moe_ext::cpu
