// Packing of quantised weights on the device, in the order of the CPU's (cpu/packing.cpp), which the kernels of both
// read: rows stay rows, padded with zeros to lines of 64 bytes.
//   kInt8, kFloat8   a byte a column, in order
//   kInt4, kMxfp4    a line has 128 columns in 32 words of 16 bits: word j has columns j, j + 32, j + 64 and j + 96,
//   from
//                    its lowest four bits up
// A thread makes two words of a line, four columns each, of which one byte as it is given holds two; or a column's
// byte.
//
// Cost: reads and writes every byte once.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/params.h"
#include "moe.h"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 16;
constexpr int kPairs = kLineBytes / 4;  // of words of a line

struct Rows {
  const uint8_t* from;
  uint8_t* to;
  int64_t rows;
  int64_t given;   // bytes of a row as it is given
  int64_t packed;  // and packed
};

// Bytes that follow each other in `to`, zeros beyond what a row of `from` has.
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(Rows p, int64_t from_bytes, int64_t to_bytes) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.rows * to_bytes; i += step) {
    const int64_t row = i / to_bytes, at = i % to_bytes;
    p.to[i] = at < from_bytes ? p.from[row * from_bytes + at] : 0;
  }
}

// Byte `quarter` of four is given as columns 32 quarter + 2 pair and the next: in the even word and in the odd one they
// are bits 4 quarter and up.
__global__ void __launch_bounds__(kThreads) pack_four_bits_kernel(Rows p) {
  const int64_t step = int64_t{gridDim.x} * kThreads, of_row = p.packed / 4;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.rows * of_row; i += step) {
    const int64_t row = i / of_row, pair = i % of_row % kPairs, line = i % of_row / kPairs;
    uint32_t words = 0;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int64_t at = line * kLineBytes + quarter * kPairs + pair;
      const uint32_t byte = at < p.given ? p.from[row * p.given + at] : 0;
      words |= ((byte & 15) | (byte >> 4) << 16) << 4 * quarter;
    }
    reinterpret_cast<uint32_t*>(p.to)[i] = words;
  }
}

__global__ void __launch_bounds__(kThreads) unpack_four_bits_kernel(Rows p) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.rows * p.given; i += step) {
    const int64_t row = i / p.given, at = i % p.given, pair = at % kPairs, quarter = at % kLineBytes / kPairs;
    const uint32_t words =
        reinterpret_cast<const uint32_t*>(p.from)[row * (p.packed / 4) + at / kLineBytes * kPairs + pair] >>
        4 * quarter;
    p.to[i] = static_cast<uint8_t>((words & 15) | (words >> 16 & 15) << 4);
  }
}

unsigned blocks_for(int64_t threads) {
  return grid_size(std::clamp<int64_t>((threads + kThreads - 1) / kThreads, 1, kMostBlocks));
}

Rows rows_of(const PackingParams& p, const uint8_t* from, uint8_t* to) {
  const int64_t given = has_four_bits(p.type) ? (p.columns + 1) / 2 : p.columns;
  return {from, to, p.rows, given, row_bytes_of(p.type, p.columns)};
}

}  // namespace

void pack_weights(const PackingParams& p, const uint8_t* values, uint8_t* packed, cudaStream_t stream) {
  const Rows r = rows_of(p, values, packed);
  if (r.rows * r.packed == 0) return;
  if (has_four_bits(p.type)) {
    pack_four_bits_kernel<<<blocks_for(r.rows * r.packed / 4), kThreads, 0, stream>>>(r);
  } else {
    copy_rows_kernel<<<blocks_for(r.rows * r.packed), kThreads, 0, stream>>>(r, r.given, r.packed);
  }
  check_launch("pack_weights");
}

void unpack_weights(const PackingParams& p, const uint8_t* packed, uint8_t* values, cudaStream_t stream) {
  const Rows r = rows_of(p, packed, values);
  if (r.rows * r.given == 0) return;
  if (has_four_bits(p.type)) {
    unpack_four_bits_kernel<<<blocks_for(r.rows * r.given), kThreads, 0, stream>>>(r);
  } else {
    copy_rows_kernel<<<blocks_for(r.rows * r.given), kThreads, 0, stream>>>(r, r.packed, r.given);
  }
  check_launch("unpack_weights");
}

}  // namespace moe_ext::cuda
