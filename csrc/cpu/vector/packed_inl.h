// Products with quantised weights with AVX-512, in the tiles and the order of product_inl.h: chunks of columns in
// order, whose sums are added in order; where a row has one scale, it multiplies the finished sums. A weight is rounded
// once to the operands' type, so that the sums are those of plain weights of that type.
//
//   few_rows    up to a tile of activation rows: bound by reading. A few weight rows from end to end, unpacked in
//               registers, while those that come later are fetched.
//   some_rows   a few tiles of them: chunk by chunk, unpacked in registers again for every tile, which costs less there
//               than to store and load the weights.
//   many_rows   chunk by chunk. The block's weights are unpacked into memory of the thread's own, where they stay in L2
//               for all tiles of activation rows.
//
// All have the same bits.
#pragma once

#include "cpu/vector/loops.h"
#include "cpu/vector/product_inl.h"
#include "cpu/vector/quantised_tile_inl.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

// Rows of packed weights are fetched so many bytes before they are multiplied, and a tile's rows at least: as much as
// arrives while one waits for memory.
constexpr int64_t kBytesAhead = 16 << 10;

// Elements from an unpacked row to the next.
template <typename A>
constexpr int64_t kUnpackedRow = kUnpackedStride * static_cast<int64_t>(sizeof(float) / sizeof(A));

// The chunk at `first` of a row and of those that follow it, which are multiplied later; nothing if it has no bytes.
struct Later {
  QuantisedRow row;
  int64_t first;
};

// y of activation rows [row, row + M) and weight rows [n, n + N), over `columns` columns from `first` on, which are
// unpacked at `weights`. A function of its own: products of every packing share it.
template <int M, int N, typename A, typename RowAhead>
[[gnu::noinline]] static void unpacked_tile(const Product& p, int64_t row, int64_t n, int64_t first, int64_t columns,
                                            const A* weights, RowAhead row_ahead) {
  dot_tile<M, N>(static_cast<const A*>(p.rows) + row * p.k + first, p.k, weights, kUnpackedRow<A>, columns, first > 0,
                 p.y + row * kBlockColumns + n, Fetch<A>(), row_ahead);
}

// A weight row as unpack_inl.h has it, for scales that are not of the usual kind.
template <typename A>
[[gnu::noinline]] static void unpack_unusual(const WeightFormat& format, const QuantisedRow& row, int64_t first,
                                             int64_t columns, A* out) {
  float wide[kSpanBlock];
  for (int64_t at = 0; at < columns; at += kSpanBlock) {
    const int64_t count = columns - at < kSpanBlock ? columns - at : kSpanBlock;
    unpack(format, row, first + at, count, wide);
    for (int64_t i = 0; i < count; ++i) from_float(wide[i], out + at + i);
  }
}

template <typename A, typename P>
struct PackedBlock {
  static constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(A));
  // Up to which some_rows is faster than many_rows: measured on Zen 4, whose instructions that unpack int8 run beside
  // those that multiply, while those of fp8 do not.
  static constexpr int64_t kSomeRows = kTileRows * (P::kType == WeightType::kInt8     ? 4
                                                    : P::kType == WeightType::kFloat8 ? 1
                                                                                      : 2);

  const Product& p;

  Block<A, A> block() const { return {p}; }
  int64_t chunk_at(int64_t first) const { return p.k - first < kChunk ? p.k - first : kChunk; }
  static const uint8_t* chunk_of(const QuantisedRow& row, int64_t first) {
    return row.bytes + first / kSpanBlock * kSpanBlockBytes<P>;
  }

  // ---- what comes later

  // Row n + ahead of these weights, or where they end of the next ones.
  QuantisedRow row_ahead(int64_t n, int64_t ahead) const {
    const bool here = n + ahead < p.columns;
    const WeightRows& weights = here ? p.weights : p.next_weights;
    return weights.first == nullptr ? QuantisedRow{}
                                    : QuantisedRow::at(*p.quantised, weights, here ? n + ahead : n + ahead - p.columns);
  }

  // The chunk after that at `first`, of row n: of these weights or the first of the next ones.
  Later chunk_ahead(int64_t n, int64_t first) const {
    const bool last = first + kChunk >= p.k;
    return {row_ahead(n, last ? p.columns : 0), last ? 0 : first + kChunk};
  }

  // Part t of `count` parts of a chunk of some rows.
  void fetch(const Later& later, int64_t rows, int64_t t, int64_t count) const {
    if (later.row.bytes == nullptr) return;
    const int64_t blocks = (chunk_at(later.first) + kSpanBlock - 1) / kSpanBlock;
    const int64_t lines = blocks * kSpanBlockBytes<P> / kLineBytes, end = lines * (t + 1) / count;
    const uint8_t* chunk = chunk_of(later.row, later.first);
    for (int64_t n = 0; n < rows; ++n, chunk += p.quantised->row_bytes) {
      for (int64_t line = lines * t / count; line < end; ++line) __builtin_prefetch(chunk + line * kLineBytes, 0, 2);
    }
  }

  // ---- tiles

  [[gnu::noinline]] void unpack_row(int64_t n, int64_t first, A* out) const {
    TileScales<1> scales;
    const QuantisedRow rows[1] = {QuantisedRow::at(*p.quantised, p.weights, n)};
    if (scales.template find<P>(*p.quantised, rows, first, chunk_at(first), nullptr)) {
      unpack_chunk<P>(chunk_of(rows[0], first), chunk_at(first), scales, out);
    } else {
      unpack_unusual(p.quantised->format, rows[0], first, chunk_at(first), out);
    }
  }

  // y of activation rows [row, row + M) and weight rows [n, n + N), over the chunk at `first`. N rows from `later` on
  // are fetched where weights are unpacked in registers.
  template <int M, int N>
  [[gnu::noinline]] void tile(int64_t row, int64_t n, int64_t first, const Later& later) const {
    if constexpr (N == kTileColumns) {
      TileScales<N> scales;
      QuantisedRow rows[N];
      for (int i = 0; i < N; ++i) rows[i] = QuantisedRow::at(*p.quantised, p.weights, n + i);
      const bool fetching = later.row.bytes != nullptr;
      const char* later_scales = fetching ? scales.template place<P>(*p.quantised, later.row, later.first) : nullptr;
      if (scales.template find<P>(*p.quantised, rows, first, chunk_at(first), later_scales)) {
        packed_tile<M, N, P>(static_cast<const A*>(p.rows) + row * p.k + first, p.k, chunk_of(rows[0], first),
                             p.quantised->row_bytes, chunk_at(first), scales, first > 0, p.y + row * kBlockColumns + n,
                             fetching ? chunk_of(later.row, later.first) : nullptr);
        return;
      }
    }
    A* unpacked = static_cast<A*>(p.unpacked);
    for (int i = 0; i < N; ++i) unpack_row(n + i, first, unpacked + i * kUnpackedRow<A>);
    unpacked_tile<M, N>(p, row, n, first, chunk_at(first), unpacked, NoRowAhead());
  }

  // ---- orders of tiles

  template <int M>
  void few_rows() const {
    int64_t ahead = kBytesAhead / p.quantised->row_bytes / kTileColumns * kTileColumns;
    ahead = ahead < kTileColumns ? kTileColumns : ahead > p.columns ? p.columns : ahead;
    block().template for_each_columns<kTileColumns>([&](int64_t n, auto width) {
      const QuantisedRow later = this->row_ahead(n, ahead);
      for (int64_t first = 0; first < p.k; first += kChunk) {
        this->template tile<M, decltype(width)::value>(0, n, first, {later, first});
      }
    });
  }

  // Calls f(row, height, n, width, t, count) for the tiles of activation rows, tile t of `count` of nearly equal
  // heights, by tiles of columns.
  template <typename F>
  void for_each_tile(const F& f) const {
    const int64_t count = (p.row_count + kTileRows - 1) / kTileRows;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t row = p.row_count * t / count, end = p.row_count * (t + 1) / count;
      Block<A, A>::template with_height<kTileRows>(end - row, [&](auto height) {
        this->block().template for_each_columns<kTileColumns>(
            [&](int64_t n, auto width) { f(row, height, n, width, t, count); });
      });
    }
  }

  void some_rows() const {
    for (int64_t first = 0; first < p.k; first += kChunk) {
      for_each_tile([&](int64_t row, auto height, int64_t n, auto width, int64_t t, int64_t) {
        const Later later = t == 0 ? this->chunk_ahead(n, first) : Later{};
        this->template tile<decltype(height)::value, decltype(width)::value>(row, n, first, later);
      });
    }
  }

  template <bool kAhead>
  void many_rows() const {
    A* unpacked = static_cast<A*>(p.unpacked);
    for (int64_t first = 0; first < p.k; first += kChunk) {
      for (int64_t n = 0; n < p.columns; ++n) unpack_row(n, first, unpacked + n * kUnpackedRow<A>);
      for_each_tile([&](int64_t row, auto height, int64_t n, auto width, int64_t t, int64_t count) {
        constexpr int kHeight = decltype(height)::value, kWidth = decltype(width)::value;
        this->fetch(this->chunk_ahead(n, first), kWidth, t, count);
        const A* weights = unpacked + n * kUnpackedRow<A>;
        if constexpr (kAhead) {
          unpacked_tile<kHeight, kWidth>(p, row, n, first, this->chunk_at(first), weights,
                                         this->block().row_ahead(row, row + kHeight, n, first));
        } else {
          unpacked_tile<kHeight, kWidth>(p, row, n, first, this->chunk_at(first), weights, NoRowAhead());
        }
      });
    }
  }

  // Where a row has one scale.
  void scale_sums() const {
    float scales[kBlockColumns] = {};
    for (int64_t n = 0; n < p.columns; ++n) {
      scales[n] = row_scale(p.quantised->format, QuantisedRow::at(*p.quantised, p.weights, n));
    }
    for (int64_t r = 0; r < p.row_count; ++r) {
      float* y = p.y + r * kBlockColumns;
      for (int64_t n = 0; n < p.columns; ++n) y[n] *= scales[n];
    }
  }

  void run() const {
    if (p.row_count > kRowsInL2) {
      many_rows<true>();
    } else if (p.row_count > kSomeRows) {
      many_rows<false>();
    } else if (p.row_count > kTileRows) {
      some_rows();
    } else {
      Block<A, A>::template with_height<kTileRows>(
          p.row_count, [&](auto height) { this->template few_rows<decltype(height)::value>(); });
    }
    if (p.quantised->format.group_size == 0) scale_sums();
  }
};

template <typename A>
static inline void multiply_packed(const Product& p) {
  with_packing(p.quantised->format, [&](auto packing) { PackedBlock<A, decltype(packing)>{p}.run(); });
}

}  // namespace moe_ext::cpu::MOE_EXT_ISA
