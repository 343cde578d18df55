// The order of quantised weights, the same for every instruction set and on CUDA: rows stay rows, each padded with
// zeros to whole cache lines.
//   kInt8, kFloat8   a byte a column, in order
//   kInt4, kMxfp4    a cache line holds 128 columns in 32 little-endian words: word j has columns j, j + 32, j + 64 and
//                    j + 96, from its lowest four bits up. A shift by 4 i of 16-bit lanes gives columns
//                    [32 i, 32 i + 32) in order, and a permutation that ignores upper bits looks their values up.
#include <algorithm>
#include <cstring>

#include "cpu/workers.h"
#include "moe.h"

namespace moe_ext::cpu {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kWords = 32;                // of a line
constexpr int64_t kLineColumns = 4 * kWords;  // of four bits
constexpr int64_t kBytesPerTask = 64 << 10;

// `count` bytes of two columns each, at most a line of them.
void pack_line(const uint8_t* values, int64_t count, uint8_t* line) {
  uint8_t whole[kLineBytes] = {};
  std::memcpy(whole, values, static_cast<size_t>(count));
  constexpr int64_t quarter = kWords / 2;  // bytes of 32 columns
  for (int64_t pair = 0; pair < quarter; ++pair) {
    const unsigned first = whole[pair], second = whole[pair + quarter], third = whole[pair + 2 * quarter],
                   fourth = whole[pair + 3 * quarter];
    line[4 * pair + 0] = static_cast<uint8_t>((first & 15) | (second & 15) << 4);
    line[4 * pair + 1] = static_cast<uint8_t>((third & 15) | (fourth & 15) << 4);
    line[4 * pair + 2] = static_cast<uint8_t>(first >> 4 | (second & 0xf0));
    line[4 * pair + 3] = static_cast<uint8_t>(third >> 4 | (fourth & 0xf0));
  }
}

void unpack_line(const uint8_t* line, int64_t count, uint8_t* values) {
  uint8_t whole[kLineBytes];
  constexpr int64_t quarter = kWords / 2;
  for (int64_t pair = 0; pair < quarter; ++pair) {
    const unsigned low_even = line[4 * pair], high_even = line[4 * pair + 1], low_odd = line[4 * pair + 2],
                   high_odd = line[4 * pair + 3];
    whole[pair] = static_cast<uint8_t>((low_even & 15) | (low_odd & 15) << 4);
    whole[pair + quarter] = static_cast<uint8_t>(low_even >> 4 | (low_odd & 0xf0));
    whole[pair + 2 * quarter] = static_cast<uint8_t>((high_even & 15) | (high_odd & 15) << 4);
    whole[pair + 3 * quarter] = static_cast<uint8_t>(high_even >> 4 | (high_odd & 0xf0));
  }
  std::memcpy(values, whole, static_cast<size_t>(count));
}

// Calls row(number) for every row, on as many threads as the bytes are worth.
template <typename Row>
void for_each_row(const PackingParams& p, const Threads& threads, const Row& row) {
  const int64_t row_bytes = std::max(packed_row_bytes(p.type, p.columns), kLineBytes);
  const int64_t rows_per_task = std::max(kBytesPerTask / row_bytes, int64_t{1});
  const int64_t tasks = p.columns == 0 ? 0 : (p.rows + rows_per_task - 1) / rows_per_task;
  for_each_task(threads, workers_for(threads, tasks, 1), tasks, [&](int64_t task, int64_t) {
    const int64_t end = std::min(p.rows, (task + 1) * rows_per_task);
    for (int64_t number = task * rows_per_task; number < end; ++number) row(number);
  });
}

}  // namespace

int64_t packed_row_bytes(WeightType type, int64_t columns) {
  const int64_t of_line = has_four_bits(type) ? kLineColumns : kLineBytes;
  return (columns + of_line - 1) / of_line * kLineBytes;
}

int64_t given_row_bytes(WeightType type, int64_t columns) { return has_four_bits(type) ? (columns + 1) / 2 : columns; }

void pack_weights(const PackingParams& p, const uint8_t* values, uint8_t* packed, const Threads& threads) {
  const int64_t given = given_row_bytes(p.type, p.columns), row_bytes = packed_row_bytes(p.type, p.columns);
  for_each_row(p, threads, [&](int64_t number) {
    const uint8_t* from = values + number * given;
    uint8_t* row = packed + number * row_bytes;
    if (!has_four_bits(p.type)) {
      std::memcpy(row, from, static_cast<size_t>(given));
      std::memset(row + given, 0, static_cast<size_t>(row_bytes - given));
      return;
    }
    for (int64_t at = 0; at < given; at += kLineBytes) pack_line(from + at, std::min(kLineBytes, given - at), row + at);
  });
}

void unpack_weights(const PackingParams& p, const uint8_t* packed, uint8_t* values, const Threads& threads) {
  const int64_t given = given_row_bytes(p.type, p.columns), row_bytes = packed_row_bytes(p.type, p.columns);
  for_each_row(p, threads, [&](int64_t number) {
    const uint8_t* row = packed + number * row_bytes;
    uint8_t* to = values + number * given;
    if (!has_four_bits(p.type)) {
      std::memcpy(to, row, static_cast<size_t>(given));
      return;
    }
    for (int64_t at = 0; at < given; at += kLineBytes) unpack_line(row + at, std::min(kLineBytes, given - at), to + at);
  });
}

}  // namespace moe_ext::cpu
