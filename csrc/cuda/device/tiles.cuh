// Where a tile of a grouped product lies: the numbering that the kernels over the sort's lists share, the rows of
// weights of an expert, and the layout of a tile in shared memory.
#pragma once

#include "cuda/params.h"

namespace moe_ext::cuda {

inline constexpr int kFragment = 16;  // rows that the tensor cores take at once: tiles are cut in multiples
inline constexpr int kBand = 16;      // row tiles of an expert that share their pass over the weights

struct Place {
  int expert;        // -1: beyond the last tile
  int first_column;  // of c
  int rows;          // positions of the tile
  int64_t first_position;
  int tile;  // index of the row tile
};

// Rows of each of a tile's expert's tiles but the last.
__device__ __forceinline__ int tile_height(const Tile& tile, int rows) {
  const int row_tiles = (tile.count + rows - 1) / rows;
  return ((tile.count + row_tiles - 1) / row_tiles + kFragment - 1) / kFragment * kFragment;
}

// Tile `index`, of up to `rows` positions by `columns` columns of c. Tiles are numbered by expert, then by bands of
// kBand row tiles, then column, then row tile, so that tiles with neighbouring numbers share rows and weights in L2. An
// expert's positions are cut evenly.
__device__ __forceinline__ Place place_of(const GemmParams& p, unsigned index, int rows, int columns) {
  const unsigned column_blocks = static_cast<unsigned>((p.columns + columns - 1) / columns);
  const Tile tile = p.tiles[index / column_blocks];
  if (tile.expert < 0) return {-1, 0, 0, 0, 0};
  const int row_tiles = (tile.count + rows - 1) / rows;
  const int block = static_cast<int>(index - tile.first_tile * column_blocks);
  const int band = block / (kBand * static_cast<int>(column_blocks));
  const int block_of_band = block - band * kBand * static_cast<int>(column_blocks);
  const int tiles_of_band = min(kBand, row_tiles - band * kBand);
  const int height = tile_height(tile, rows);
  const int row_tile = band * kBand + block_of_band % tiles_of_band;
  const int first_row = row_tile * height;
  return {tile.expert, block_of_band / tiles_of_band * columns, min(height, tile.count - first_row),
          int64_t{tile.first} + first_row, tile.first_tile + row_tile};
}

// Which of all experts' rows of weights gives c's `column`: in gate_up a gate row, or the up row of the same column.
template <Product kProduct, typename Index>
__device__ __forceinline__ Index weight_row(int expert, Index columns, Index column, bool up,
                                            bool interleaved = false) {
  const Index row = interleaved ? 2 * column + (up ? 1 : 0) : (up ? columns : 0) + column;
  return expert * weight_rows(kProduct, columns) + row;
}

// Byte offset of a 16-byte chunk in rows of kChunks chunks: eight neighbouring rows, and eight neighbouring chunks in
// memory order, lie in different banks. With eight chunks a row, it is TMA's and wgmma's 128-byte swizzle.
template <int kChunks>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  constexpr int kRowsPerLine = kChunks >= 8 ? 1 : 8 / kChunks;  // a line: the 128 bytes of all banks
  constexpr int kMask = kChunks >= 8 ? 7 : kChunks - 1;
  return (row * kChunks + (chunk ^ ((row / kRowsPerLine) & kMask))) * 16;
}

}  // namespace moe_ext::cuda
