// Rows of activations in 8 bits, for layers whose products are of whole numbers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/buffer.h"
#include "cpu/vector/loops.h"
#include "cpu/workers.h"
#include "moe.h"

namespace moe_ext::cpu {

inline int64_t byte_row_bytes(int64_t columns) {
  return byte_blocks(columns) * static_cast<int64_t>(sizeof(ByteBlock));
}

// (rows, byte_blocks(columns)) blocks of (rows, columns) floats.
inline Buffer byte_rows(const LayerParams& p, const float* floats, int64_t rows, int64_t columns,
                        const Threads& threads, const Loops& loops) {
  constexpr int64_t kElementsPerTask = 1 << 13, kElementsPerWorker = 1 << 15;
  Buffer blocks(rows * byte_row_bytes(columns));
  const int64_t workers = workers_for(threads, rows * columns, kElementsPerWorker);
  const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / columns);
  for_each_task(threads, workers, (rows + rows_per_task - 1) / rows_per_task, [&](int64_t task, int64_t) {
    const int64_t end = std::min(rows, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < end; ++row) {
      loops.quantise(p.format.type, p.gate_up_zeros != nullptr, floats + row * columns, columns,
                     reinterpret_cast<ByteBlock*>(blocks.bytes() + row * byte_row_bytes(columns)));
    }
  });
  return blocks;
}

}  // namespace moe_ext::cpu
