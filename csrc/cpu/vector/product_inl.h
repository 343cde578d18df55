// Products with weights as rows: the order in which the tiles of a product are computed, and what each of them
// prefetches.
//
// Up to kTileRows activation rows, reading the weights is what takes time: a few weight rows from end to end. More
// rows: chunk by chunk (kChunkBytes), tiles of rows outside, tiles of columns inside, so that activations stay in L1
// and weights in L2. The chunks are the same and are added in the same order in both: they give the same bits.
#pragma once

#include <type_traits>

#include "cpu/numeric.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/tile_inl.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

// Tiles of at most kTileRows activation rows times kTileColumns weight rows: kTileRows * kTileColumns accumulators,
// kTileColumns weight vectors and one activation vector stay within the register file.
#if defined(MOE_EXT_ISA_AVX512)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 2;
#endif
constexpr int kTileColumns = 4;
// Twice as many columns where the registers hold them, so few activation rows are there, and where weight rows are so
// short that the pauses between tiles count.
#if defined(MOE_EXT_ISA_AVX512)
constexpr int kWideTileRows = 2;
#else
constexpr int kWideTileRows = 1;
#endif
constexpr int64_t kShortRowBytes = 4096;
// Beyond so many rows a chunk of them leaves a usual L2, and comes from the last cache for every block.
constexpr int64_t kRowsInL2 = 128;

// A number known at compile time, as a parameter of a generic lambda.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// A typed Product, and the orders in which its tiles are computed. All cut rows into the same chunks and add the
// chunks' sums in order: they give the same bits.
template <typename A, typename W>
struct Block {
  static constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(A));

  const Product& p;

  static const W* weight_row(const WeightRows& weights, int64_t n, int64_t k) {
    return n < weights.split ? static_cast<const W*>(weights.first) + n * k
                             : static_cast<const W*>(weights.second) + (n - weights.split) * k;
  }
  int64_t chunk_at(int64_t first) const { return p.k - first < kChunk ? p.k - first : kChunk; }
  static int64_t lines(int64_t elements) {
    return (elements * static_cast<int64_t>(sizeof(W)) + kLineBytes - 1) / kLineBytes;
  }

  // `count` lines from line `from` on of the chunk at `first` of weight rows [n, n + kTileColumns).
  Fetch<W> fetch_of(const WeightRows& weights, int64_t n, int64_t first, int64_t from, int64_t count) const {
    if (weights.first == nullptr) return {};
    return {weight_row(weights, n, p.k) + first + from * (kLineBytes / static_cast<int64_t>(sizeof(W))), count};
  }

  // The chunk at `first` of a row of the tile after [row, end): with every tile of columns the next one.
  const A* row_ahead(int64_t row, int64_t end, int64_t n, int64_t first) const {
    const int64_t ahead = end + n / kTileColumns;
    return static_cast<const A*>(p.rows) + first + (ahead < p.row_count ? ahead : row) * p.k;
  }

  // Rows [row, row + M) against columns [n, n + N), over the chunk at `first`.
  template <int M, int N, typename RowAhead>
  void tile(int64_t row, int64_t n, int64_t first, Fetch<W> fetch, RowAhead row_ahead) const {
    dot_tile<M, N>(static_cast<const A*>(p.rows) + row * p.k + first, p.k, weight_row(p.weights, n, p.k) + first, p.k,
                   chunk_at(first), first > 0, p.y + row * kBlockColumns + n, fetch, row_ahead);
  }

  // Calls f(n, width) for tiles of columns: kWidest, kTileColumns or 1 wide, none with rows from both sides of the
  // split.
  template <int kWidest, typename F>
  void for_each_columns(const F& f) const {
    const int64_t split = p.weights.split < p.columns ? p.weights.split : p.columns;
    for (int64_t n = 0; n < p.columns;) {
      const int64_t end = n < split ? split : p.columns;
      if (kWidest > kTileColumns && n + kWidest <= end) {
        f(n, Constant<kWidest>());
        n += kWidest;
      } else if (n + kTileColumns <= end) {
        f(n, Constant<kTileColumns>());
        n += kTileColumns;
      } else {
        f(n, Constant<1>());
        ++n;
      }
    }
  }

  // At most a tile of activation rows: bound by reading the weights. A few weight rows from end to end, while the next
  // few are fetched.
  template <int M>
  void few_rows() const {
    const auto columns = [&](int64_t n, auto width) {
      constexpr int kWidth = decltype(width)::value;
      const bool last = n + 2 * kWidth > p.columns;
      const WeightRows& next = last ? p.next_weights : p.weights;
      for (int64_t first = 0; first < p.k; first += kChunk) {
        const Fetch<W> fetch = this->fetch_of(next, last ? 0 : n + kWidth, first, 0, lines(this->chunk_at(first)));
        this->template tile<M, kWidth>(0, n, first, fetch, NoRowAhead());
      }
    };
    if (M <= kWideTileRows && p.k * static_cast<int64_t>(sizeof(W)) < kShortRowBytes) {
      for_each_columns<2 * kTileColumns>(columns);
    } else {
      for_each_columns<kTileColumns>(columns);
    }
  }

  // Many tiles of activation rows: bound by arithmetic. Chunk by chunk, so that a tile's part of the activations stays
  // in L1 and the block's part of the weights in L2; each tile fetches its share of what comes next, so that the
  // requests are spread evenly.
  template <bool kAhead>
  void many_rows() const {
    const int64_t tiles = (p.row_count + kTileRows - 1) / kTileRows;
    for (int64_t first = 0; first < p.k; first += kChunk) {
      const bool last = first + kChunk >= p.k;
      const WeightRows& next = last ? p.next_weights : p.weights;
      const int64_t next_first = last ? 0 : first + kChunk;
      const int64_t next_lines = lines(chunk_at(next_first));
      for (int64_t t = 0; t < tiles; ++t) {  // of nearly equal heights: a flat last one would waste loads
        const int64_t row = p.row_count * t / tiles, end = p.row_count * (t + 1) / tiles;
        const int64_t from = next_lines * t / tiles, count = next_lines * (t + 1) / tiles - from;
        with_height<kTileRows>(end - row, [&](auto height) {
          this->template for_each_columns<kTileColumns>([&](int64_t n, auto width) {
            const Fetch<W> fetch = this->fetch_of(next, n, next_first, from, count);
            constexpr int kHeight = decltype(height)::value, kWidth = decltype(width)::value;
            if constexpr (kAhead) {
              this->template tile<kHeight, kWidth>(row, n, first, fetch, this->row_ahead(row, end, n, first));
            } else {
              this->template tile<kHeight, kWidth>(row, n, first, fetch, NoRowAhead());
            }
          });
        });
      }
    }
  }

  // Calls f(Constant<M>) for the M <= kMax that `height` is.
  template <int kMax, typename F>
  static void with_height(int64_t height, const F& f) {
    if constexpr (kMax > 0) {
      if (height == kMax) {
        f(Constant<kMax>());
      } else {
        with_height<kMax - 1>(height, f);
      }
    }
  }

  void run() const {
    if (p.row_count > kRowsInL2) {
      many_rows<true>();
    } else if (p.row_count > kTileRows) {
      many_rows<false>();
    } else {
      with_height<kTileRows>(p.row_count, [&](auto height) { this->template few_rows<decltype(height)::value>(); });
    }
  }
};

}  // namespace moe_ext::cpu::MOE_EXT_ISA
