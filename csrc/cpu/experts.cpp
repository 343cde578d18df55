// Experts: out[t, :] = sum over slots s of g * f_e(x[t, :]), e = experts[t, s], g = weights[t, s]                (T, H)
//          f_e(x) = down[e] h + down_bias[e],  h = act(gate[e] x) * (up[e] x) or as the layer's formula says (moe.h)
//
// Two passes over the slots sorted by expert, each spread over the threads task by task:
//   gate_up   a task is one expert and half a block of its I columns, or a block without gate: reads their rows once
//             for all of the expert's tokens and writes h (P, I), of the variant's operand type. Where channels are
//             observed it adds g^2 h^2 to their sums.
//   down      a task is one block of the H columns and every expert: reads an expert's rows once for all of its tokens,
//             weights the products and adds them to the tokens' sums, expert by expert; at the end rounds the sums
//             into out. When observing it takes its part of ||f_e||^2 from the same registers.
// While a thread multiplies a block of weights it fetches the one that comes next, so that memory and arithmetic
// overlap. Then the observed norms are summed per expert in position order, and where pairs are observed g ||f_e||
// times the same of the token's other slots in token order, in float64. Every element is computed by one thread in a
// fixed order, so the result depends neither on the number of threads nor on the rest of the batch. Where memory has
// several nodes a thread multiplies the rows on its own first (nodes.h).
//
// With int8_activations the rows of x and of h are rounded to 8 bits before they are multiplied (vector/byte_rows.h);
// channels are those of h before.
//
// Cost: reads 3 H I weights of each expert that has a token, once per kTokensPerRun tokens; 6 H I FLOPs a slot.
// Memory: P (H + I) operands, H / 32 floats a slot when observing, and for each thread 256 bytes for every token and
// every slot of the busiest expert; P = slots that are no sentinel, of at most kTokensPerRun tokens.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/byte_activations.h"
#include "cpu/layer_weights.h"
#include "cpu/numeric.h"
#include "cpu/slots.h"
#include "cpu/vector/loops.h"
#include "cpu/workers.h"
#include "moe.h"

namespace moe_ext::cpu {
namespace {

// Longer inputs run in parts, which bounds the memory: an expert still sees hundreds of tokens each time it is read.
constexpr int64_t kTokensPerRun = 2048;
constexpr int64_t kRowsPerTask = 16;
constexpr int64_t kMultiplyAddsPerWorker = 1 << 17;
constexpr int64_t kElementsPerWorker = 1 << 15;

// The columns of a down task: narrower ones keep more threads busy, but the choice must not depend on their number.
int64_t down_columns(int64_t hidden) { return hidden >= 64 * kBlockColumns ? kBlockColumns : kBlockColumns / 2; }

class ExpertsRun {
 public:
  ExpertsRun(const ExpertsParams& p, const Threads& threads, const Loops& loops)
      : p_(p),
        threads_(threads),
        loops_(loops),
        operand_(p.int8_activations ? DType::kFloat32 : loops.operand(p.dtype)),
        quantised_(p),
        slots_(sort_slots(p)) {
    for (int64_t expert = 0; expert < p.num_experts; ++expert) {
      if (slots_.count(expert) == 0) continue;
      active_.push_back(expert);
      busiest_ = std::max(busiest_, slots_.count(expert));
    }
    if (p.channels == nullptr) return;
    squared_weights_.resize(slots_.positions());
    for (int64_t position = 0; position < slots_.positions(); ++position) {
      const double gate = slots_.weight_of[position];
      squared_weights_[position] = counts(position) ? gate * gate : -1.0;
    }
  }

  void run() {
    unpacked_ = Buffer(product_workers() * quantised_.unpacked_bytes());
    gate_up();
    down();
    if (p_.moments == nullptr) return;
    const std::vector<double> square_of = squared_norms();
    add_moments(square_of);
    if (p_.pairs != nullptr) add_pairs(square_of);
  }

 private:
  bool counts(int64_t position) const { return p_.counted == nullptr || p_.counted[slots_.token_of[position]]; }

  int64_t product_workers() const {
    return workers_for(threads_, slots_.positions() * p_.hidden * p_.intermediate, kMultiplyAddsPerWorker);
  }

  void* unpacked(int64_t worker) const { return unpacked_.bytes() + worker * quantised_.unpacked_bytes(); }

  // (P, H) operands: each position's row of x.
  Buffer gathered_x() const {
    const int64_t row_bytes = p_.hidden * element_size(operand_);
    Buffer rows(slots_.positions() * row_bytes);
    const int64_t workers = workers_for(threads_, slots_.positions() * p_.hidden, kElementsPerWorker);
    const int64_t tasks = (slots_.positions() + kRowsPerTask - 1) / kRowsPerTask;
    for_each_task(threads_, workers, tasks, [&](int64_t task, int64_t) {
      const int64_t end = std::min(slots_.positions(), (task + 1) * kRowsPerTask);
      for (int64_t position = task * kRowsPerTask; position < end; ++position) {
        const char* x = offset(p_.x, p_.dtype, slots_.token_of[position] * p_.hidden);
        char* row = rows.bytes() + position * row_bytes;
        if (operand_ == p_.dtype) {
          std::memcpy(row, x, row_bytes);
        } else {
          loops_.widen(p_.dtype, x, reinterpret_cast<float*>(row), p_.hidden);
        }
      }
    });
    return rows;
  }

  // Rows of operands as the products take them, and the bytes of one.
  Buffer multiplied(Buffer rows, int64_t columns) const {
    if (!p_.int8_activations) return rows;
    return byte_rows(p_, rows.floats(), slots_.positions(), columns, threads_, loops_);
  }
  int64_t multiplied_bytes(int64_t columns) const {
    return p_.int8_activations ? byte_row_bytes(columns) : columns * element_size(operand_);
  }

  // ---- gate_up

  struct GateUpTask {
    int64_t expert;
    int64_t first_column;
    int64_t columns;
  };

  void gate_up() {
    const Buffer x = multiplied(gathered_x(), p_.hidden);
    std::vector<GateUpTask> tasks;
    for (const int64_t expert : active_) {
      const int64_t width = gate_columns(p_.formula);
      for (int64_t first = 0; first < p_.intermediate; first += width) {
        tasks.push_back({expert, first, std::min(width, p_.intermediate - first)});
      }
    }
    const int64_t workers = product_workers();
    h_ = Buffer(slots_.positions() * p_.intermediate * element_size(operand_));
    const Buffer products(workers * busiest_ * kBlockColumns * sizeof(float));
    const int nodes = node_count();
    const auto node_of = [&](int64_t index) { return node_of_row(tasks[index].first_column, p_.intermediate, nodes); };
    for_each_task_by_node(threads_, workers, tasks.size(), node_of, [&](int64_t index, int64_t next, int64_t worker) {
      const GateUpTask& task = tasks[index];
      const int64_t first = slots_.first[task.expert], count = slots_.count(task.expert);
      float* y = products.floats() + worker * busiest_ * kBlockColumns;
      loops_.multiply(p_.dtype, {x.bytes() + first * multiplied_bytes(p_.hidden), rows_of(task),
                                 next < 0 ? kNoWeights : rows_of(tasks[next]), count, p_.formula.rows(task.columns),
                                 p_.hidden, y, gate_up_bias(p_, task.expert, task.first_column, task.columns),
                                 gate_up_stride(p_), quantised_.gate_up(), unpacked(worker), p_.int8_activations});
      char* h = h_.bytes() + (first * p_.intermediate + task.first_column) * element_size(operand_);
      loops_.gate(p_.formula, y, count, task.columns, operand_, h, p_.intermediate);
      if (p_.channels == nullptr) return;
      loops_.energy(operand_, h, p_.intermediate, squared_weights_.data() + first, count, task.columns,
                    p_.channels + task.expert * p_.intermediate + task.first_column);
    });
  }

  WeightRows rows_of(const GateUpTask& task) const {
    return gate_up_rows(p_, task.expert, task.first_column, task.columns);
  }

  // ---- down

  void down() {
    const int64_t width = down_columns(p_.hidden);
    const int64_t tasks = (p_.hidden + width - 1) / width;
    const int64_t workers = product_workers();
    const Buffer products(workers * busiest_ * kBlockColumns * sizeof(float));
    const Buffer sums(workers * p_.tokens * kBlockColumns * sizeof(float));
    const Buffer h = multiplied(std::move(h_), p_.intermediate);
    if (p_.moments != nullptr) squares_.resize(tasks * slots_.positions());
    const int nodes = node_count();
    const auto node_of = [&](int64_t task) { return node_of_row(task * width, p_.hidden, nodes); };
    for_each_task_by_node(threads_, workers, tasks, node_of, [&](int64_t task, int64_t next, int64_t worker) {
      const int64_t first_column = task * width;
      const int64_t columns = std::min(width, p_.hidden - first_column);
      float* y = products.floats() + worker * busiest_ * kBlockColumns;
      float* sum = sums.floats() + worker * p_.tokens * kBlockColumns;
      std::memset(sum, 0, p_.tokens * kBlockColumns * sizeof(float));
      for (size_t i = 0; i < active_.size(); ++i) {
        const int64_t first = slots_.first[active_[i]], count = slots_.count(active_[i]);
        const WeightRows following = i + 1 < active_.size() ? down_rows(p_, active_[i + 1], first_column)
                                     : next < 0             ? kNoWeights
                                                            : down_rows(p_, active_[0], next * width);
        loops_.multiply(p_.dtype,
                        {h.bytes() + first * multiplied_bytes(p_.intermediate), down_rows(p_, active_[i], first_column),
                         following, count, columns, p_.intermediate, y, down_bias(p_, active_[i], first_column),
                         down_stride(p_), quantised_.down(), unpacked(worker), p_.int8_activations});
        float* squares = p_.moments == nullptr ? nullptr : squares_.data() + task * slots_.positions() + first;
        loops_.scatter(y, slots_.weight_of.data() + first, slots_.token_of.data() + first, count, columns, sum,
                       squares);
      }
      for (int64_t token = 0; token < p_.tokens; ++token) {
        char* out = static_cast<char*>(p_.out) + (token * p_.hidden + first_column) * element_size(p_.dtype);
        loops_.narrow(p_.dtype, sum + token * kBlockColumns, out, columns);
      }
    });
  }

  // ---- moments and pairs

  // (P) ||f_e||^2, summed over the down tasks in their order.
  std::vector<double> squared_norms() const {
    const int64_t positions = slots_.positions();
    std::vector<double> square_of(positions, 0.0);
    for (size_t i = 0; i < squares_.size(); i += positions) {
      for (int64_t position = 0; position < positions; ++position) square_of[position] += squares_[i + position];
    }
    return square_of;
  }

  // One thread and position order: the sums are the same for any number of threads, and P * 9 additions are few.
  void add_moments(const std::vector<double>& square_of) {
    for (const int64_t expert : active_) {
      double added[9] = {};
      for (int64_t position = slots_.first[expert]; position < slots_.first[expert + 1]; ++position) {
        if (!counts(position)) continue;
        const double gate = slots_.weight_of[position], norm = std::sqrt(square_of[position]);
        const double gates[3] = {1.0, gate, gate * gate};
        const double norms[3] = {1.0, norm, square_of[position]};
        for (int a = 0; a < 3; ++a) {
          for (int b = 0; b < 3; ++b) added[a * 3 + b] += gates[a] * norms[b];
        }
      }
      for (int i = 0; i < 9; ++i) p_.moments[expert * 9 + i] += added[i];
    }
  }

  // One thread and token order, T * K^2 additions: symmetric to the bit, as both halves add the same products.
  void add_pairs(const std::vector<double>& square_of) {
    std::vector<int64_t> expert_of(p_.tokens * p_.top_k, -1);  // of a slot, -1 where it counts in nothing
    std::vector<double> share_of(p_.tokens * p_.top_k, 0.0);   // g ||f_e||
    for (const int64_t expert : active_) {
      for (int64_t position = slots_.first[expert]; position < slots_.first[expert + 1]; ++position) {
        if (!counts(position)) continue;
        expert_of[slots_.slot_of[position]] = expert;
        share_of[slots_.slot_of[position]] = double{slots_.weight_of[position]} * std::sqrt(square_of[position]);
      }
    }
    for (int64_t first = 0; first < p_.tokens * p_.top_k; first += p_.top_k) {
      for (int64_t one = first; one < first + p_.top_k; ++one) {
        if (expert_of[one] < 0) continue;
        double* row = p_.pairs + expert_of[one] * p_.num_experts;
        for (int64_t other = first; other < first + p_.top_k; ++other) {
          if (expert_of[other] >= 0) row[expert_of[other]] += share_of[one] * share_of[other];
        }
      }
    }
  }

  const ExpertsParams& p_;
  const Threads& threads_;
  const Loops& loops_;
  const DType operand_;
  const QuantisedLayer quantised_;
  const SortedSlots slots_;
  std::vector<int64_t> active_;          // experts that have slots, in order
  int64_t busiest_ = 0;                  // slots of the expert that has most
  Buffer h_;                             // (P, I) operands
  Buffer unpacked_;                      // (workers) weights that a thread has unpacked, of quantised ones
  std::vector<double> squared_weights_;  // (P) g^2, -1 where a slot counts in nothing; only for channels
  std::vector<float> squares_;           // (down tasks, P) parts of ||f_e||^2, only when observing
};

}  // namespace

void experts(const ExpertsParams& p, const Threads& threads) {
  const Loops& loops = active_loops();  // throws if MOE_EXT_ISA cannot be honoured, also without tokens
  for (int64_t first = 0; first < p.tokens; first += kTokensPerRun) {
    ExpertsParams part = p;
    part.tokens = std::min(kTokensPerRun, p.tokens - first);
    part.x = offset(p.x, p.dtype, first * p.hidden);
    part.out = static_cast<char*>(p.out) + first * p.hidden * element_size(p.dtype);
    part.experts = static_cast<const char*>(p.experts) + first * p.top_k * (p.experts_are_int64 ? 8 : 4);
    part.weights = offset(p.weights, p.weights_dtype, first * p.top_k);
    if (p.counted != nullptr) part.counted = p.counted + first;
    ExpertsRun(part, threads, loops).run();
  }
}

}  // namespace moe_ext::cpu
