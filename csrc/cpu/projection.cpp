// Projections: out[t, e] = <g[t, :], f_e(x[t, :])>, float64                                                      (T, E)
//              f_e(x) = down[e] h + down_bias[e],  h = act(gate[e] x) * (up[e] x) or as the layer's formula says
//              (moe.h)
//
// Every expert computes every token, and f is never stored: a block of its columns stays in the thread's cache until g
// has been multiplied with it. (<g, down h> = <down^T g, h> would take as many FLOPs, but read down against its rows.)
//
// Tokens run in parts, and experts in groups, so that h (group, part, I) takes a few tens of megabytes. Two passes over
// the group's experts, each spread over the threads task by task:
//   gate_up   a task is one expert and half a block of its I columns: reads those gate and up rows once for all of the
//             part's tokens and writes h, of the variant's operand type.
//   down      a task is one expert and one block of the H columns: reads those rows of down once, and takes the
//             products' scalar products with g in float64 (vector/project_inl.h).
// Then a token's blocks are added in their order. Every number is computed by one thread in a fixed order, which
// depends on H and I alone: neither on the number of threads nor on the rest of the batch.
//
// Cost: reads 3 H I weights of every expert once a part; 6 H I FLOPs a token and expert. Memory: h, part (2 H) floats,
// group * part * H / 64 doubles, and 256 bytes for every token of a part and thread.
#include <algorithm>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/byte_activations.h"
#include "cpu/layer_weights.h"
#include "cpu/numeric.h"
#include "cpu/vector/loops.h"
#include "cpu/workers.h"
#include "moe.h"

namespace moe_ext::cpu {
namespace {

constexpr int64_t kActivationBytes = 64 << 20;  // of h
constexpr int64_t kLeastTokens = 32, kMostTokens = 2048;
constexpr int64_t kRowsPerTask = 16;
constexpr int64_t kMultiplyAddsPerWorker = 1 << 17;
constexpr int64_t kElementsPerWorker = 1 << 15;

int64_t blocks_of(int64_t size, int64_t width) { return (size + width - 1) / width; }

class ProjectionRun {
 public:
  ProjectionRun(const ProjectionParams& p, const Threads& threads, const Loops& loops)
      : p_(p),
        threads_(threads),
        loops_(loops),
        operand_(p.int8_activations ? DType::kFloat32 : loops.operand(p.dtype)),
        quantised_(p),
        h_row_bytes_(p.intermediate * element_size(operand_)),
        part_(std::min(p.tokens, std::clamp(kActivationBytes / h_row_bytes_, kLeastTokens, kMostTokens))),
        group_(std::clamp(kActivationBytes / (part_ * h_row_bytes_), int64_t{1}, p.num_experts)),
        gate_columns_(gate_columns(p.formula)),
        workers_(workers_for(threads, group_ * part_ * p.hidden * p.intermediate, kMultiplyAddsPerWorker)),
        h_(group_ * part_ * h_row_bytes_),
        products_(workers_ * part_ * kBlockColumns * sizeof(float)),
        unpacked_(workers_ * quantised_.unpacked_bytes()),
        sums_(group_ * blocks_of(p.hidden, kBlockColumns) * part_) {}

  void run() {
    for (int64_t first = 0; first < p_.tokens; first += part_) {
      const int64_t tokens = std::min(part_, p_.tokens - first);
      Buffer wide_x, wide_g;
      const char* x = rows_of(p_.x, p_.dtype, operand_, first, tokens, &wide_x);
      if (p_.int8_activations) {
        wide_x = byte_rows(p_, reinterpret_cast<const float*>(x), tokens, p_.hidden, threads_, loops_);
        x = wide_x.bytes();
      }
      const char* g = rows_of(p_.g, p_.g_dtype, DType::kFloat32, first, tokens, &wide_g);
      for (int64_t expert = 0; expert < p_.num_experts; expert += group_) {
        const int64_t experts = std::min(group_, p_.num_experts - expert);
        gate_up(expert, experts, x, tokens);
        down(expert, experts, reinterpret_cast<const float*>(g), tokens);
        add_blocks(expert, experts, first, tokens);
      }
    }
  }

 private:
  // Rows [first, first + tokens) of a (T, H) array as `wanted`: in place, or widened to float32 in `buffer`.
  const char* rows_of(const void* rows, DType dtype, DType wanted, int64_t first, int64_t tokens,
                      Buffer* buffer) const {
    const char* source = offset(rows, dtype, first * p_.hidden);
    if (dtype == wanted) return source;
    *buffer = Buffer(tokens * p_.hidden * sizeof(float));
    const int64_t workers = workers_for(threads_, tokens * p_.hidden, kElementsPerWorker);
    for_each_task(threads_, workers, blocks_of(tokens, kRowsPerTask), [&](int64_t task, int64_t) {
      const int64_t begin = task * kRowsPerTask, end = std::min(tokens, begin + kRowsPerTask);
      loops_.widen(dtype, offset(source, dtype, begin * p_.hidden), buffer->floats() + begin * p_.hidden,
                   (end - begin) * p_.hidden);
    });
    return buffer->bytes();
  }

  float* products(int64_t worker) const { return products_.floats() + worker * part_ * kBlockColumns; }
  void* unpacked(int64_t worker) const { return unpacked_.bytes() + worker * quantised_.unpacked_bytes(); }
  char* h(int64_t slot) const { return h_.bytes() + slot * part_ * h_row_bytes_; }

  void gate_up(int64_t expert, int64_t experts, const char* x, int64_t tokens) const {
    const int64_t blocks = blocks_of(p_.intermediate, gate_columns_);
    for_each_task_ahead(threads_, workers_, experts * blocks, [&](int64_t task, int64_t next, int64_t worker) {
      const int64_t slot = task / blocks, first = task % blocks * gate_columns_;
      const int64_t columns = columns_at(first);
      float* y = products(worker);
      loops_.multiply(p_.dtype,
                      {x, rows_of(expert, task, blocks), next < 0 ? kNoWeights : rows_of(expert, next, blocks), tokens,
                       p_.formula.rows(columns), p_.hidden, y, gate_up_bias(p_, expert + slot, first, columns),
                       gate_up_stride(p_), quantised_.gate_up(), unpacked(worker), p_.int8_activations});
      loops_.gate(p_.formula, y, tokens, columns, operand_, h(slot) + first * element_size(operand_), p_.intermediate);
    });
  }

  int64_t columns_at(int64_t first) const { return std::min(gate_columns_, p_.intermediate - first); }

  WeightRows rows_of(int64_t expert, int64_t task, int64_t blocks) const {
    const int64_t first = task % blocks * gate_columns_;
    return gate_up_rows(p_, expert + task / blocks, first, columns_at(first));
  }

  void down(int64_t expert, int64_t experts, const float* g, int64_t tokens) {
    const int64_t blocks = blocks_of(p_.hidden, kBlockColumns);
    Buffer bytes;  // of h (experts * part, I); rows beyond `tokens` are what they are, and no one's
    if (p_.int8_activations) {
      bytes = byte_rows(p_, h_.floats(), experts * part_, p_.intermediate, threads_, loops_);
    }
    for_each_task_ahead(threads_, workers_, experts * blocks, [&](int64_t task, int64_t next, int64_t worker) {
      const int64_t first = task % blocks * kBlockColumns;
      const int64_t columns = std::min(kBlockColumns, p_.hidden - first);
      float* y = products(worker);
      const auto rows_of = [&](int64_t index) {
        return down_rows(p_, expert + index / blocks, index % blocks * kBlockColumns);
      };
      const char* rows = p_.int8_activations ? bytes.bytes() + task / blocks * part_ * byte_row_bytes(p_.intermediate)
                                             : h(task / blocks);
      loops_.multiply(p_.dtype, {rows, rows_of(task), next < 0 ? kNoWeights : rows_of(next), tokens, columns,
                                 p_.intermediate, y, down_bias(p_, expert + task / blocks, first), down_stride(p_),
                                 quantised_.down(), unpacked(worker), p_.int8_activations});
      loops_.project(y, g + first, p_.hidden, tokens, columns, sums_.data() + task * part_);
    });
  }

  // One thread: H / 64 additions a token and expert are few beside its products.
  void add_blocks(int64_t expert, int64_t experts, int64_t first, int64_t tokens) const {
    const int64_t blocks = blocks_of(p_.hidden, kBlockColumns);
    for (int64_t slot = 0; slot < experts; ++slot) {
      for (int64_t t = 0; t < tokens; ++t) {
        double sum = 0.0;
        for (int64_t block = 0; block < blocks; ++block) sum += sums_[(slot * blocks + block) * part_ + t];
        p_.out[(first + t) * p_.num_experts + expert + slot] = sum;
      }
    }
  }

  const ProjectionParams& p_;
  const Threads& threads_;
  const Loops& loops_;
  const DType operand_;
  const QuantisedLayer quantised_;
  const int64_t h_row_bytes_, part_, group_, gate_columns_, workers_;
  const Buffer h_;            // (group, part, I) operands
  const Buffer products_;     // (workers, part, kBlockColumns) floats
  const Buffer unpacked_;     // (workers) weights that a thread has unpacked, of quantised ones
  std::vector<double> sums_;  // (group, H blocks, part)
};

}  // namespace

void projection(const ProjectionParams& p, const Threads& threads) {
  const Loops& loops = active_loops();  // throws if MOE_EXT_ISA cannot be honoured, also without tokens
  if (p.tokens > 0) ProjectionRun(p, threads, loops).run();
}

}  // namespace moe_ext::cpu
