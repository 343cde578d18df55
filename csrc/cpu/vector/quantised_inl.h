// Products with quantised weights, of the variants without AVX-512 (packed_inl.h): chunks of kUnpackedColumns columns
// in order, whose sums are added in order.
//
//   few rows    up to a tile of activation rows: bound by reading. A few weight rows from end to end, while those that
//               come later are fetched: int8 as it lies (byte_weights_inl.h), other weights unpacked in registers with
//               AVX2 (packed_tile_avx2_inl.h).
//   some rows   as many weight rows as a tile takes are unpacked into memory of the thread's own, where they stay in L1
//               for all tiles of activation rows.
//   many rows   all weight rows of the block are unpacked, where they stay in L2; part by part of the activation rows,
//               which stay there beside them, tiles of weight rows outside.
//
// All have the same bits.
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

// Activation rows of a tile with unpacked weights: they are not widened, which leaves registers for one more.
#if defined(MOE_EXT_ISA_AVX2)
constexpr int kUnpackedTileRows = 3;
#else
constexpr int kUnpackedTileRows = kTileRows;
#endif
// Most activation rows for which weight rows are unpacked a tile at a time; and rows of a part of more, whose chunks
// take a quarter of a usual L2. Measured on Zen 3.
constexpr int64_t kSomeRows = 12;
constexpr int64_t kPartRows = 32;
// Rows of packed weights are fetched so many bytes before they are multiplied, and a tile's rows at least.
constexpr int64_t kBytesAhead = 16 << 10;

template <typename A>
struct QuantisedBlock {
  const Product& p;

  const WeightFormat& format() const { return p.quantised->format; }
  bool four_bits() const { return format().type == WeightType::kInt4 || format().type == WeightType::kMxfp4; }
  QuantisedRow row_at(int64_t n) const { return QuantisedRow::at(*p.quantised, p.weights, n); }
  // The chunk at `first` of weight row n; where vectors do it, the last line of it to its end, while that of a row
  // that is multiplied later is fetched, unless it is null.
  void unpack_row(int64_t n, int64_t first, float* out, [[maybe_unused]] const uint8_t* later) const {
#if defined(MOE_EXT_ISA_AVX2)
    unpack_lines(format(), row_at(n), first, chunk_at(first), out, chunk_of(later, first));
#else
    unpack(format(), row_at(n), first, chunk_at(first), out);
#endif
  }
  const uint8_t* chunk_of(const uint8_t* row, int64_t first) const {
    return row == nullptr ? nullptr : row + packed_bytes(format(), first);
  }
  float* unpacked() const { return static_cast<float*>(p.unpacked); }
  int64_t chunk_at(int64_t first) const { return p.k - first < kUnpackedColumns ? p.k - first : kUnpackedColumns; }
  Block<A, float> block() const { return {p}; }

  // Rows [row, row + M) against N unpacked weight rows at `weights`, which are rows [n, n + N) of the block.
  template <int M, int N>
  void tile(int64_t row, int64_t n, int64_t first, const float* weights) const {
    const A* rows = static_cast<const A*>(p.rows) + row * p.k + first;
    float* y = p.y + row * kBlockColumns + n;
#if defined(MOE_EXT_ISA_AVX2)
    unpacked_tile<M, N>(rows, p.k, weights, kUnpackedStride, chunk_at(first), first > 0, y,
                        four_bits() ? kLineOrder : kInOrder);
#else
    dot_tile<M, N>(rows, p.k, weights, kUnpackedStride, chunk_at(first), first > 0, y, Fetch<float>(), NoRowAhead());
#endif
  }

  // Rows [begin, end) in tiles of nearly equal heights.
  template <int N>
  void tiles(int64_t begin, int64_t end, int64_t n, int64_t first, const float* weights) const {
    const int64_t count = (end - begin + kUnpackedTileRows - 1) / kUnpackedTileRows;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t row = begin + (end - begin) * t / count, next = begin + (end - begin) * (t + 1) / count;
      Block<A, float>::template with_height<kUnpackedTileRows>(
          next - row, [&](auto height) { this->template tile<decltype(height)::value, N>(row, n, first, weights); });
    }
  }

  // Row n + rows of these weights, or where they end of the next ones; null if there are none.
  const uint8_t* row_ahead(int64_t n, int64_t rows) const {
    const bool here = n + rows < p.columns;
    const WeightRows& weights = here ? p.weights : p.next_weights;
    if (weights.first == nullptr) return nullptr;
    return QuantisedRow::at(*p.quantised, weights, here ? n + rows : n + rows - p.columns).bytes;
  }
  int64_t rows_ahead() const {
    const int64_t rows = kBytesAhead / p.quantised->row_bytes / kTileColumns * kTileColumns;
    return rows < kTileColumns ? kTileColumns : rows > p.columns ? p.columns : rows;
  }

#if defined(MOE_EXT_ISA_AVX2)
  // Up to a tile of activation rows: unpacked in registers.
  template <int M>
  void few_rows() const {
    const int64_t ahead = rows_ahead();
    const bool zeros = p.weights.zeros != nullptr;
    with_half(format(), zeros, [&](auto type) {
      using Half = typename decltype(type)::type;
      const auto table = Half::Table::of(this->format(), zeros);
      this->block().template for_each_columns<kTileColumns>([&](int64_t n, auto width) {
        const uint8_t* later = this->row_ahead(n, ahead);
        for (int64_t first = 0; first < p.k; first += kUnpackedColumns) {
          if constexpr (decltype(width)::value != kTileColumns) {
            this->unpack_row(n, first, this->unpacked(), later);
            this->template tile<M, 1>(0, n, first, this->unpacked());
          } else {
            GroupScales scales[kTileColumns];
            for (int i = 0; i < kTileColumns; ++i) {
              scales[i].load(this->format(), this->row_at(n + i), first, this->chunk_at(first));
            }
            packed_tile<M, Half>(static_cast<const float*>(p.rows) + first, p.k,
                                 this->chunk_of(this->row_at(n).bytes, first), p.quantised->row_bytes,
                                 this->chunk_at(first), table, scales, first > 0, p.y + n,
                                 this->chunk_of(later, first));
          }
        }
      });
    });
  }
#endif

  void some_rows() const {
    const int64_t ahead = rows_ahead();
    block().template for_each_columns<kTileColumns>([&](int64_t n, auto width) {
      constexpr int kWidth = decltype(width)::value;
      for (int64_t first = 0; first < p.k; first += kUnpackedColumns) {
        for (int i = 0; i < kWidth; ++i) {
          this->unpack_row(n + i, first, this->unpacked() + i * kUnpackedStride, this->row_ahead(n + i, ahead));
        }
        this->template tiles<kWidth>(0, p.row_count, n, first, this->unpacked());
      }
    });
  }

  void many_rows() const {
    const int64_t parts = (p.row_count + kPartRows - 1) / kPartRows;
    for (int64_t first = 0; first < p.k; first += kUnpackedColumns) {
      for (int64_t n = 0; n < p.columns; ++n) {
        const uint8_t* later = n + kTileColumns < p.columns ? row_at(n + kTileColumns).bytes : nullptr;
        unpack_row(n, first, unpacked() + n * kUnpackedStride, later);
      }
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = p.row_count * part / parts, end = p.row_count * (part + 1) / parts;
        block().template for_each_columns<kTileColumns>([&](int64_t n, auto width) {
          this->template tiles<decltype(width)::value>(begin, end, n, first, this->unpacked() + n * kUnpackedStride);
        });
      }
    }
  }

  // Where a row has one scale.
  void scale_sums() const {
#if defined(MOE_EXT_ISA_AVX2)
    const float factor = format().type == WeightType::kFloat8 ? kFloat8Factor : 1.0f;
#else
    constexpr float factor = 1.0f;
#endif
    float scales[kBlockColumns];
    for (int64_t n = 0; n < p.columns; ++n) scales[n] = row_scale(format(), row_at(n)) * factor;
    for (int64_t r = 0; r < p.row_count; ++r) {
      float* y = p.y + r * kBlockColumns;
      for (int64_t n = 0; n < p.columns; ++n) y[n] *= scales[n];
    }
  }

  // Whether that is how the product was computed.
  bool multiply_few_rows() const {
    if (p.row_count > kTileRows) return false;
#if defined(MOE_EXT_ISA_AVX2)
    if (format().type != WeightType::kInt8) {
      Block<A, float>::template with_height<kTileRows>(
          p.row_count, [&](auto height) { this->template few_rows<decltype(height)::value>(); });
      return true;
    }
#endif
    return multiply_few_rows_of_bytes<kUnpackedColumns>(p);
  }

  void run() const {
    if (p.row_count > kSomeRows) {
      many_rows();
    } else if (!multiply_few_rows()) {
      some_rows();
    }
    if (format().group_size == 0) scale_sums();
  }
};

}  // namespace moe_ext::cpu::MOE_EXT_ISA
