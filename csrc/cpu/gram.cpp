// Gram matrices: gram[t, i, j] = <f_i(x[t, :]), f_j(x[t, :])>, float64, f_e rounded to the dtype         (T, E, E)
//
// Tokens run in parts, so that a part's outputs y (E, part, H) take a few tens of megabytes. Of a part, every expert
// computes all tokens by the experts operator (one slot of weight 1): its y is the operator's to the bit. Then a task
// is a few tokens, whose rows of y are multiplied by pairs (vector/gram_inl.h): the bits are the same for any
// instruction set and any number of threads, given y.
//
// Cost: 6 E H I FLOPs a token for y, E (E + 1) H for the products. Memory: y, and what the experts operator takes.
#include <algorithm>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/layer_weights.h"
#include "cpu/numeric.h"
#include "cpu/vector/loops.h"
#include "cpu/workers.h"
#include "moe.h"

namespace moe_ext::cpu {
namespace {

constexpr int64_t kPartBytes = 64 << 20;  // of y
constexpr int64_t kLeastTokens = 32, kMostTokens = 2048;
constexpr int64_t kTokensPerTask = 4;
constexpr int64_t kMultiplyAddsPerWorker = 1 << 17;

// y[e, t, :] = f_e(x[first + t, :]) for the part's tokens, of `dtype`.
void compute_outputs(const GramParams& p, int64_t first, int64_t tokens, char* y, const Threads& threads) {
  const std::vector<int64_t> first_expert(tokens, 0);
  const std::vector<float> ones(tokens, 1.0f);
  for (int64_t e = 0; e < p.num_experts; ++e) {
    ExpertsParams one{};
    static_cast<LayerParams&>(one) = only_expert(p, e);
    one.x = offset(p.x, p.dtype, first * p.hidden);
    one.experts = first_expert.data();
    one.weights = ones.data();
    one.out = y + e * tokens * p.hidden * element_size(p.dtype);
    one.tokens = tokens;
    one.top_k = 1;
    one.weights_dtype = DType::kFloat32;
    one.experts_are_int64 = true;
    experts(one, threads);
  }
}

}  // namespace

void gram(const GramParams& p, const Threads& threads) {
  const Loops& loops = active_loops();
  const int64_t token_bytes = p.num_experts * p.hidden * element_size(p.dtype);
  const int64_t part = std::min(p.tokens, std::clamp(kPartBytes / token_bytes, kLeastTokens, kMostTokens));
  const Buffer y(part * token_bytes);
  const int64_t work = part * p.num_experts * p.num_experts * p.hidden;
  const int64_t workers = workers_for(threads, work, kMultiplyAddsPerWorker);
  const int64_t scratch_doubles = gram_scratch(p.num_experts);
  const Buffer scratch(workers * scratch_doubles * sizeof(double));
  std::fill_n(scratch.doubles(), workers * scratch_doubles, 0.0);

  for (int64_t first = 0; first < p.tokens; first += part) {
    const int64_t tokens = std::min(part, p.tokens - first);
    compute_outputs(p, first, tokens, y.bytes(), threads);
    const int64_t tasks = (tokens + kTokensPerTask - 1) / kTokensPerTask;
    for_each_task(threads, workers, tasks, [&](int64_t task, int64_t worker) {
      const int64_t end = std::min(tokens, (task + 1) * kTokensPerTask);
      for (int64_t t = task * kTokensPerTask; t < end; ++t) {
        const TokenRows token{offset(y.bytes(), p.dtype, t * p.hidden), tokens * p.hidden, p.num_experts, p.hidden};
        loops.gram(p.dtype, token, scratch.doubles() + worker * scratch_doubles,
                   p.gram + (first + t) * p.num_experts * p.num_experts);
      }
    });
  }
}

}  // namespace moe_ext::cpu
