// Experts: out[t, :] = sum over slots s of g * f_e(x[t, :]), e = experts[t, s], g = weights[t, s]                   (T,
// H)
//          f_e(x) = down[e] (act(gate[e] x) * (up[e] x))
//
// Three passes over the slots sorted by expert, each spread over the threads task by task:
//   gate_up   a task is one expert and kColumnBlock of its I columns: reads those gate and up rows once, keeps them in
//   L2
//             for all of the expert's tokens, writes h (P, I) float32.
//   down      a task is one expert and kColumnBlock of its H columns: reads those rows once, writes y (P, H) float32.
//   combine   a task is a few tokens: weights and sums a token's rows of y in slot order, and when observing takes
//             ||f_e||^2 from the same registers.
// Then the observed norms are summed per expert in position order, in float64. Every element is computed by one thread
// in a fixed order, so the result does not depend on the number of threads or on the other tokens of the batch.
//
// Cost: reads 3 H I weights of each expert that has a token, once per kTokensPerRun tokens; 6 H I FLOPs a slot.
// Memory: P (I + H) floats, and T H more where x is not float32; P = slots that are no sentinel, of at most
// kTokensPerRun tokens.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/loops.h"
#include "cpu/numeric.h"
#include "cpu/slots.h"
#include "cpu/workers.h"
#include "moe.h"

namespace moe_ext::cpu {
namespace {

// Longer inputs run in parts, which bounds the memory: an expert still sees hundreds of tokens each time it is read.
constexpr int64_t kTokensPerRun = 2048;
constexpr int64_t kTokensPerTask = 16;
constexpr int64_t kMultiplyAddsPerWorker = 1 << 17;
constexpr int64_t kElementsPerWorker = 1 << 15;

int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const void* offset(const void* data, DType dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * element_size(dtype);
}

float element(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(data)[index];
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(data)[index]);
    case DType::kFloat16:
      return to_float(static_cast<const Float16*>(data)[index]);
  }
  return 0.0f;
}

using Floats = std::unique_ptr<float[]>;
Floats uninitialised(int64_t count) { return Floats(new float[static_cast<size_t>(count)]); }

// Tasks of one grouped product: every expert that has tokens, times its blocks of columns.
struct BlockTask {
  int64_t expert;
  int64_t first_column;
  int64_t columns;
};

std::vector<BlockTask> block_tasks(const SortedSlots& slots, int64_t num_experts, int64_t columns) {
  std::vector<BlockTask> tasks;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    if (slots.count(expert) == 0) continue;
    for (int64_t first = 0; first < columns; first += kColumnBlock) {
      tasks.push_back({expert, first, std::min(kColumnBlock, columns - first)});
    }
  }
  return tasks;
}

class ExpertsRun {
 public:
  ExpertsRun(const ExpertsParams& p, const Threads& threads, const Loops& loops)
      : p_(p), threads_(threads), loops_(loops), slots_(sort_slots(p)) {}

  void run() {
    gate_up();
    down();
    combine();
    if (p_.moments != nullptr) add_moments();
  }

 private:
  int64_t product_workers() const {
    return workers_for(threads_, slots_.positions() * p_.hidden * p_.intermediate, kMultiplyAddsPerWorker);
  }

  int64_t token_tasks() const { return (p_.tokens + kTokensPerTask - 1) / kTokensPerTask; }

  // x as float32: the caller's array, or a widened copy.
  const float* float_x(Floats& copy) const {
    if (p_.dtype == DType::kFloat32) return static_cast<const float*>(p_.x);
    copy = uninitialised(p_.tokens * p_.hidden);
    const int64_t workers = workers_for(threads_, p_.tokens * p_.hidden, kElementsPerWorker);
    for_each_task(threads_, workers, token_tasks(), [&](int64_t task, int64_t) {
      const int64_t first = task * kTokensPerTask * p_.hidden;
      const int64_t end = std::min(p_.tokens * p_.hidden, first + kTokensPerTask * p_.hidden);
      loops_.widen(p_.dtype, offset(p_.x, p_.dtype, first), copy.get() + first, end - first);
    });
    return copy.get();
  }

  void gate_up() {
    Floats copy;
    const float* x = float_x(copy);
    std::vector<const float*> rows(slots_.positions());
    for (size_t position = 0; position < rows.size(); ++position) {
      rows[position] = x + slots_.token_of[position] * p_.hidden;
    }
    h_ = uninitialised(slots_.positions() * p_.intermediate);
    const std::vector<BlockTask> tasks = block_tasks(slots_, p_.num_experts, p_.intermediate);
    for_each_task(threads_, product_workers(), static_cast<int64_t>(tasks.size()), [&](int64_t index, int64_t) {
      const BlockTask& task = tasks[index];
      const int64_t first = slots_.first[task.expert];
      const int64_t gate_row = task.expert * 2 * p_.intermediate + task.first_column;
      loops_.gate_up(p_.dtype, p_.activation, rows.data() + first, slots_.count(task.expert),
                     offset(p_.gate_up, p_.dtype, gate_row * p_.hidden),
                     offset(p_.gate_up, p_.dtype, (gate_row + p_.intermediate) * p_.hidden), task.columns, p_.hidden,
                     h_.get() + first * p_.intermediate + task.first_column, p_.intermediate);
    });
  }

  void down() {
    y_ = uninitialised(slots_.positions() * p_.hidden);
    const std::vector<BlockTask> tasks = block_tasks(slots_, p_.num_experts, p_.hidden);
    for_each_task(threads_, product_workers(), static_cast<int64_t>(tasks.size()), [&](int64_t index, int64_t) {
      const BlockTask& task = tasks[index];
      const int64_t first = slots_.first[task.expert];
      const int64_t down_row = task.expert * p_.hidden + task.first_column;
      loops_.down(p_.dtype, h_.get() + first * p_.intermediate, slots_.count(task.expert),
                  offset(p_.down, p_.dtype, down_row * p_.intermediate), task.columns, p_.intermediate,
                  y_.get() + first * p_.hidden + task.first_column, p_.hidden);
    });
  }

  void combine() {
    const bool observe = p_.moments != nullptr;
    if (observe) norms_.assign(slots_.positions(), 0.0);
    const int64_t workers = workers_for(threads_, p_.tokens * p_.top_k * p_.hidden, kElementsPerWorker);
    const Floats sums = uninitialised(workers * p_.hidden);
    for_each_task(threads_, workers, token_tasks(), [&](int64_t task, int64_t worker) {
      float* sum = sums.get() + worker * p_.hidden;
      const int64_t end = std::min(p_.tokens, (task + 1) * kTokensPerTask);
      for (int64_t token = task * kTokensPerTask; token < end; ++token) combine_token(token, sum, observe);
    });
  }

  void combine_token(int64_t token, float* sum, bool observe) {
    std::memset(sum, 0, sizeof(float) * p_.hidden);
    for (int64_t slot = token * p_.top_k; slot < (token + 1) * p_.top_k; ++slot) {
      const int64_t position = slots_.position_of[slot];
      if (position < 0) continue;
      const float weight = element(p_.weights, p_.weights_dtype, slot);
      const float squares = loops_.accumulate(weight, y_.get() + position * p_.hidden, sum, p_.hidden, observe);
      if (observe) norms_[position] = std::sqrt(static_cast<double>(squares));
    }
    char* out = static_cast<char*>(p_.out) + token * p_.hidden * element_size(p_.dtype);
    loops_.narrow(p_.dtype, sum, out, p_.hidden);
  }

  // One thread and slot order: the sums are the same for any number of threads, and T * K * 9 additions are few.
  void add_moments() {
    std::vector<double> added(p_.num_experts * 9, 0.0);
    for (int64_t slot = 0; slot < p_.tokens * p_.top_k; ++slot) {
      const int64_t position = slots_.position_of[slot];
      if (position < 0 || (p_.counted != nullptr && !p_.counted[slot / p_.top_k])) continue;
      const double gate = element(p_.weights, p_.weights_dtype, slot);
      const double norm = norms_[position];
      const double gates[3] = {1.0, gate, gate * gate};
      const double norms[3] = {1.0, norm, norm * norm};
      double* moments = added.data() + expert_of(slot) * 9;
      for (int a = 0; a < 3; ++a) {
        for (int b = 0; b < 3; ++b) moments[a * 3 + b] += gates[a] * norms[b];
      }
    }
    for (size_t i = 0; i < added.size(); ++i) p_.moments[i] += added[i];
  }

  int64_t expert_of(int64_t slot) const {
    return p_.experts_are_int64 ? static_cast<const int64_t*>(p_.experts)[slot]
                                : static_cast<const int32_t*>(p_.experts)[slot];
  }

  const ExpertsParams& p_;
  const Threads& threads_;
  const Loops& loops_;
  const SortedSlots slots_;
  Floats h_;                   // (P, I)
  Floats y_;                   // (P, H)
  std::vector<double> norms_;  // (P) ||f_e||, only when observing
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
