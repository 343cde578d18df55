// Memory nodes (NUMA): how many there are for this process, which one a thread runs on, and which one a row of weights
// belongs to. Output rows are shared out over the nodes in equal parts, in order: place_rows moves memory accordingly,
// and for_each_task_by_node (workers.h) gives a thread the rows of its own node first. On one node, as most machines
// are, nothing of this does anything.
#pragma once

#include <cstdint>

namespace moe_ext::cpu {

inline constexpr int kMostNodes = 64;

// Nodes with memory and processors that this process may use; at least 1. MOE_EXT_NODES=n, for tests, divides any
// machine into n, and its threads over them in turn.
int node_count();

// Where the calling thread runs, which is a loop's worker of this number: an index below node_count().
int node_of_thread(int64_t worker);

// The node of output row `row` of `rows`.
constexpr int node_of_row(int64_t row, int64_t rows, int nodes) { return static_cast<int>(row * nodes / rows); }

// How the rows of a weight matrix are output rows.
enum class RowOrder {
  kPlain,       // down; gate and up row by row in turn; up alone
  kHalves,      // gate rows, then up rows
  kTransposed,  // a row has a part of every output: pages go to the nodes in turn
};

struct Placed {
  int64_t bytes;  // of whole pages
  int64_t there;  // of those on their node
};

// Moves the pages of (matrices, rows, row_bytes) weights to their nodes, in whole pages. Pages that other processes
// share stay where they are. Throws std::runtime_error if the system refuses.
Placed place_rows(void* first, int64_t matrices, int64_t rows, int64_t row_bytes, RowOrder order);

}  // namespace moe_ext::cpu
