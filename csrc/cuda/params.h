// The kernels' params and launchers, in the order in which they feed each other. experts.cpp, gram.cu and
// gemm_launch.cpp call the launchers; each is implemented beside its kernel. P = T * K slots; a *position* is a slot's
// place in the list sorted by expert, in which sentinels have none.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstdint>

#include "moe.h"

namespace moe_ext::cuda {

// ---- sort (sort.cu): slots by expert, and the tiles that the grouped products run over

// One tile of rows of one expert, as the grouped products read it in one 16-byte load.
struct alignas(16) Tile {
  int expert;      // -1: beyond the last tile
  int first_tile;  // index of the expert's first tile
  int first;       // the expert's first position
  int count;       // its positions, over all its tiles
};

// How an expert's rows are cut: the fewest tiles of at most `rows` rows.
struct TileList {
  Tile* tiles;   // (max_tiles) out
  int64_t rows;  // rows of a tile at most
  int64_t max_tiles;
};

struct SortParams {
  const void* experts;  // (T, K) int64 if experts_are_int64, else int32; in [0, E]
  bool experts_are_int64;
  int64_t slots;  // P
  int64_t num_experts;
  int* slot_of;       // (P) out: slot of a position
  int* position_of;   // (P) out: position of a slot, or -1 for a sentinel
  int* first;         // (E + 1) out: first position of an expert; the last is the number of positions
  int* block_counts;  // (sort_blocks(P), E) scratch
  TileList gate_up;
  TileList down;
};

int64_t sort_blocks(int64_t slots);
// Tiles of at most `rows` rows that P slots over E experts can need.
int64_t max_tiles(int64_t slots, int64_t num_experts, int64_t rows);
void launch_sort(const SortParams& p, cudaStream_t stream);

// ---- energies of channels (energies.cu): the weights that gate_up's kernels sum with, and what becomes of their sums

inline constexpr int kEnergyFragment = 8;  // uint4s of 16 rows of a tile: (2 parts, 4 lanes) of 4 positions each
constexpr int64_t energy_fragments(int64_t rows) { return rows / 16 * kEnergyFragment; }  // of a tile of `rows`

// gate_up adds up g^2 h^2 over the positions that a warp, or a block, has of a tile: `sums` holds those parts.
struct Energies {
  float* weights;    // (positions): g^2, -1 where a slot is not counted
  uint4* fragments;  // (max_tiles, energy_fragments(rows)): the same for gemm_wgmma.cu; or null
  float* sums;       // (max_tiles, parts, I), or null: energies are not observed
  int64_t parts;     // of a tile
};

struct EnergyWeightsParams {
  const int* slot_of;   // (P)
  const void* weights;  // (T, K) of `weights_dtype`
  DType weights_dtype;
  const bool* counted;  // (T) or null
  int64_t top_k;
  TileList tiles;
  Energies energies;  // weights and fragments out
};

struct EnergySumsParams {
  TileList tiles;
  Energies energies;
  int64_t columns;   // I
  double* channels;  // (E, I) +=
};

void launch_energy_weights(const EnergyWeightsParams& p, cudaStream_t stream);
void launch_energy_sums(const EnergySumsParams& p, cudaStream_t stream);

// The same parts of sums, of h as it is stored: where gate_up's kernel does not sum them.
struct EnergyRowsParams {
  const void* h;  // (positions, I) of `dtype`
  DType dtype;
  TileList tiles;
  Energies energies;  // of one part
  int64_t columns;    // I
};

void launch_energy_rows(const EnergyRowsParams& p, cudaStream_t stream);

// ---- quantised weights of a product, in the bytes of moe.h

constexpr int weight_bits(WeightType type) { return type == WeightType::kPlain ? 16 : has_four_bits(type) ? 4 : 8; }

inline constexpr int kLineBytes = 64;  // rows are padded to lines
constexpr int line_columns(WeightType type) { return kLineBytes * (has_four_bits(type) ? 2 : 1); }
constexpr int64_t row_bytes_of(WeightType type, int64_t columns) {
  return (columns + line_columns(type) - 1) / line_columns(type) * kLineBytes;
}

struct Quantisation {
  WeightType type;  // kPlain: the weights are numbers, and nothing else here counts
  ScaleType scale_type;
  const void* scales;    // (E, scale_rows, groups) of `scale_type`
  const uint8_t* zeros;  // (E, scale_rows, groups), or null: 8 for kInt4
  int64_t row_bytes;     // of b
  int groups;            // of a row
  int group_shift;       // column >> group_shift is its group
  int scale_rows;        // of an expert
  int row_shift;         // row of an expert >> row_shift is its row of scales
};

enum class Product { kGateUp, kDown };

Quantisation quantisation_of(const LayerParams& layer, Product product);

// ---- grouped products over the sorted slots (gemm_mma.cu: mma.sync; gemm_wgmma.cu: wgmma; gemm_packed.cu and
// gemm_wgmma_packed.cu: the same of quantised weights; gemm_plain.cu: any dtype, weights and size), in the tile shapes
// of shapes.h

// What becomes of gate and up before h = act(gate) * up, so that it is the formula's h:
//   g = min(gate, gate_limit);  u = (cap(min(max(up, -up_limit), up_limit), up_cap) + offset) * cap(g, gate_cap) / g
//   gate' = scale * g,  up' = u / scale,  cap(z, c) = c tanh(z / c)
// A limit of act(gate) is one of gate, which act does not fall beyond. A projection without gate is scaled alone.
struct Shaping {
  float gate_limit, up_limit;
  float scale, inverse_scale;
  float offset;
  float gate_cap, up_cap;
  bool capped;
};

Shaping shaping_of(const Formula& formula);

// Which of the products a launch computes, by its two weights: an expert's first projection is kGateUp with a gate, and
// without one computed as kDown's products are, with an activation.
struct GemmParams {
  const void* a;       // first projection: x (T, H), gathered by slot_of; down: h (positions, I)
  const void* b;       // gate_up: (E, 2 I, H); without gate: (E, I, H); down: (E, H, I)
  void* c;             // first projection: h (positions, I); down: y (positions, H)
  const void* bias;    // (E, rows of b) of `bias_dtype`, or null
  const int* slot_of;  // (P) of the first projection; down has null
  const Tile* tiles;   // (max_tiles)
  int64_t max_tiles;
  int64_t num_experts;
  int64_t top_k;
  int64_t columns;        // of c: I or H
  int64_t inner;          // length of the dot products: H or I
  Activation activation;  // of the first projection; kNoActivation of down
  bool special;           // gate_up: it has a bias or a shaping; otherwise: it has a bias or an activation
  bool interleaved;       // rows of b (columns, where it is transposed) are gate and up in turn
  bool transposed;        // b is (E, inner, rows)
  Shaping shaping;
  Energies energies;          // gate_up only
  DType bias_dtype;           // x's
  Quantisation quantisation;  // of b; then not transposed
};

inline constexpr Activation kNoActivation = static_cast<Activation>(-1);

// Rows of weights of an expert for so many columns of c: in gate_up a gate row each, then an up row each.
template <typename Index>
constexpr Index weight_rows(Product product, Index columns) {
  return product == Product::kGateUp ? 2 * columns : columns;
}

// bf16 and fp16, columns and inner multiples of 8, pointers 16-byte aligned. c has the dtype of a. `shape` is a row of
// kGemmShapes. Without gate the activation is kSilu or kRelu2; interleaved only if transposed.
void launch_grouped_gemm(Product product, int shape, const GemmParams& p, DType dtype, cudaStream_t stream);
// The same on devices with `wgmma`, of experts with a gate that have no caps; a block a multiprocessor goes through all
// tiles. `shape` is kHopper or kHopperPairs. Energies: of weights that are neither special nor transposed.
void launch_hopper_gemm(Product product, int shape, const GemmParams& p, DType dtype, int multiprocessors,
                        cudaStream_t stream);
// Quantised weights on the same devices, of experts with a gate that have no caps, interleaved or not; tiles of at most
// kHopperPackedRows rows. In fp16 a scale is of a whole row.
void launch_hopper_packed_gemm(Product product, const GemmParams& p, DType dtype, int multiprocessors,
                               cudaStream_t stream);
// Quantised weights; as launch_grouped_gemm, but in the shapes kFlat and kNarrow only, and interleaved or not.
void launch_packed_gemm(Product product, int shape, const GemmParams& p, DType dtype, cudaStream_t stream);
// Any size, weights of any kind; h and y are float32. `rows`, of a tile at most, is one of kPlainRows.
void launch_plain_gemm(Product product, int rows, const GemmParams& p, DType dtype, cudaStream_t stream);

// ---- combine (combine.cu)

struct CombineParams {
  const void* y;           // (positions, H) of `y_dtype`
  const int* position_of;  // (P), -1 for a sentinel
  const void* weights;     // (T, K) of `weights_dtype`
  void* out;               // (T, H) of `dtype`
  float* squares;          // (P, parts) out: parts of ||y||^2 by slot, 0 for a sentinel; or null
  int64_t tokens;
  int64_t top_k;
  int64_t hidden;
  int64_t parts;         // warps that share a token's columns, and the columns of each but the last: whole chunks, and
  int64_t part_columns;  // one where K > kCombineAtOnce
  DType y_dtype;
  DType dtype;
  DType weights_dtype;
};

// Columns that a warp takes at a time, by the size of y's elements, and slots that it reads at once.
template <int64_t kElementSize>
inline constexpr int64_t kCombineChunk = kElementSize == 4 ? 64 : 512;
inline constexpr int64_t kCombineAtOnce = 8;
void launch_combine(const CombineParams& p, cudaStream_t stream);

// ---- small batches (small_batch.cu; small_batch_packed.cu: quantised weights): both products without a sort

struct SmallBatchParams {
  ExpertsParams experts;  // with a gate, not transposed, interleaved only if quantised
  Quantisation gate_up, down;
  Shaping shaping;
  bool special;          // gate and up have biases or a shaping
  void* h;               // (P, I) of `dtype`, by slot
  float* y;              // (P, splits, H), by slot: down's sums over the parts of I
  int gate_up_groups;    // of columns of h, and
  int down_groups;       // of y: rows of weights that a block multiplies at a time
  int64_t splits;        // parts that down cuts I into, none empty
  int64_t split_length;  // of each but the last; a multiple of small_batch_round()
  uint32_t* arrivals;    // (groups of H): parts of y that are there
  float* squares;        // (P, groups of H) out: parts of ||f_e||^2 by slot, or null
  int64_t staged_bytes;  // shared memory of a block for activations
  int64_t shared_limit;  // shared memory of a block at most
  int64_t blocks;        // of each of the two kernels, at most
};

inline constexpr int kSmallBatchColumns = 64;      // of y, a group: rows of weights
inline constexpr int kSmallBatchWarps = 8;         // of a block
inline constexpr int kSmallBatchParts = 2;         // warps of a block that share rows, and k
inline constexpr int kSmallBatchPackedTokens = 8;  // that a pass over quantised weights multiplies

// Bytes of a row that a warp reads at a time: where scales take registers, fewer.
constexpr int small_batch_row_bytes(WeightType type) { return has_four_bits(type) ? 128 : 256; }
// Elements of k that a block multiplies at a time.
constexpr int small_batch_round(WeightType type) {
  const int columns = type == WeightType::kPlain ? kLineBytes / 2 : line_columns(type);  // of 64 bytes
  return kSmallBatchParts * small_batch_row_bytes(type) / kLineBytes * columns;
}
// Bytes that rows of staged activations are padded by, so that rows of the same piece lie in different banks.
constexpr int small_batch_padding(WeightType type) {
  return type == WeightType::kPlain || has_four_bits(type) ? 64 : 16;
}
constexpr int64_t small_batch_groups(int64_t hidden) { return (hidden + kSmallBatchColumns - 1) / kSmallBatchColumns; }
// Shared memory of a block beside the staged activations.
int64_t small_batch_shared_bytes(int64_t tokens, int64_t slots, int64_t num_experts,
                                 WeightType type = WeightType::kPlain);
void launch_small_batch(const SmallBatchParams& p, cudaStream_t stream);
void launch_packed_small_batch(const SmallBatchParams& p, cudaStream_t stream);

// ---- moments (moments.cu)

struct MomentsParams {
  const float* squares;  // (P, parts): ||f_e||^2 of a slot is the sum of its parts
  int64_t parts;
  const void* experts;  // (T, K)
  bool experts_are_int64;
  const int* slot_of;   // (P) and
  const int* first;     // (E + 1): the sorted list, or null: every expert looks through all P slots
  const void* weights;  // (T, K) of `weights_dtype`
  DType weights_dtype;
  const bool* counted;  // (T) or null
  double* moments;      // (E, 3, 3) +=
  int64_t slots;        // P
  int64_t top_k;
  int64_t num_experts;
};

void launch_moments(const MomentsParams& p, cudaStream_t stream);

// ---- pairs of experts, of the same slots (pairs.cu)

struct PairsParams {
  MomentsParams slots;  // all but `moments`
  double* shares;       // (T, K) scratch: g ||f_e||
  double* pairs;        // (E, E) +=
};

void launch_pairs(const PairsParams& p, cudaStream_t stream);

}  // namespace moe_ext::cuda
