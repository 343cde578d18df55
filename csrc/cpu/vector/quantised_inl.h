// Products with quantised weights, of the variants without AVX-512 (packed_inl.h): rows are unpacked (unpack_inl.h)
// into memory of the thread's own, and multiplied by the tiles of product_inl.h.
//
// A few activation rows: as many weight rows as a tile takes, which stay in L1; rows of bytes as they lie
// (byte_weights_inl.h). More: all weight rows of the block, which stay in L2, for all tiles of activation rows. Chunks
// of kUnpackedColumns in order, their sums added in order, in the same tiles of columns: the same bits.
#pragma once

#include "cpu/vector/byte_weights_inl.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/product_inl.h"
#include "cpu/vector/tile_inl.h"
#include "cpu/vector/unpack_inl.h"
#if defined(MOE_EXT_ISA_AVX2)
#include "cpu/vector/unpack_avx2_inl.h"
#endif

namespace moe_ext::cpu::MOE_EXT_ISA {

template <typename A>
struct QuantisedBlock {
  const Product& p;

  const WeightFormat& format() const { return p.quantised->format; }
  QuantisedRow row_at(int64_t n) const { return QuantisedRow::at(*p.quantised, p.weights, n); }
  // The chunk at `first` of weight row n; where vectors do it, the last line of it to its end.
  void unpack_row(int64_t n, int64_t first, float* out) const {
#if defined(MOE_EXT_ISA_AVX2)
    unpack_lines(format(), row_at(n), first, chunk_at(first), out);
#else
    unpack(format(), row_at(n), first, chunk_at(first), out);
#endif
  }
  float* unpacked() const { return static_cast<float*>(p.unpacked); }
  int64_t chunk_at(int64_t first) const { return p.k - first < kUnpackedColumns ? p.k - first : kUnpackedColumns; }
  Block<A, float> block() const { return {p}; }

  // Rows [row, row + M) against N unpacked weight rows at `weights`, which are rows [n, n + N) of the block.
  template <int M, int N>
  void tile(int64_t row, int64_t n, int64_t first, const float* weights) const {
    dot_tile<M, N>(static_cast<const A*>(p.rows) + row * p.k + first, p.k, weights, kUnpackedStride, chunk_at(first),
                   first > 0, p.y + row * kBlockColumns + n, Fetch<float>(), NoRowAhead());
  }

  template <int M>
  void few_rows() const {
    block().template for_each_columns<kTileColumns>([&](int64_t n, auto width) {
      constexpr int kWidth = decltype(width)::value;
      for (int64_t first = 0; first < p.k; first += kUnpackedColumns) {
        for (int i = 0; i < kWidth; ++i) {
          this->unpack_row(n + i, first, unpacked() + i * kUnpackedStride);
        }
        this->template tile<M, kWidth>(0, n, first, unpacked());
      }
    });
  }

  void many_rows() const {
    const int64_t tiles = (p.row_count + kTileRows - 1) / kTileRows;
    for (int64_t first = 0; first < p.k; first += kUnpackedColumns) {
      for (int64_t n = 0; n < p.columns; ++n) {
        unpack_row(n, first, unpacked() + n * kUnpackedStride);
      }
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = p.row_count * t / tiles, end = p.row_count * (t + 1) / tiles;
        Block<A, float>::template with_height<kTileRows>(end - row, [&](auto height) {
          this->block().template for_each_columns<kTileColumns>([&](int64_t n, auto width) {
            constexpr int kHeight = decltype(height)::value, kWidth = decltype(width)::value;
            this->template tile<kHeight, kWidth>(row, n, first, this->unpacked() + n * kUnpackedStride);
          });
        });
      }
    }
  }

  // Where a row has one scale.
  void scale_sums() const {
    float scales[kBlockColumns];
    for (int64_t n = 0; n < p.columns; ++n) scales[n] = row_scale(format(), row_at(n));
    for (int64_t r = 0; r < p.row_count; ++r) {
      float* y = p.y + r * kBlockColumns;
      for (int64_t n = 0; n < p.columns; ++n) y[n] *= scales[n];
    }
  }

  void run() const {
    if (p.row_count > kTileRows) {
      many_rows();
    } else if (!multiply_few_rows_of_bytes<kUnpackedColumns>(p)) {
      Block<A, float>::template with_height<kTileRows>(
          p.row_count, [&](auto height) { this->template few_rows<decltype(height)::value>(); });
    }
    if (format().group_size == 0) scale_sums();
  }
};

}  // namespace moe_ext::cpu::MOE_EXT_ISA
