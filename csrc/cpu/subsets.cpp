// Subset errors: errors[s] = sum over tokens of || F(x) - F_s(x) ||^2                                            (S)
// (arXiv 2402.14800, section 3.2, without running a layer again).
//
// F weights the experts of the first K ranks, F_s those of the first K ranks that subset s keeps; d is the difference
// of the two weight vectors. Both sum to 1, so d sums to 0, and
//   || sum over i of d_i f_i ||^2 = d^T G d = - sum over i < j of d_i d_j || f_i - f_j ||^2,
// which is 0 to the bit where experts are equal or no weight changes. d has at most 2 K entries that are not 0.
//
// Where an expert's output is one number a_i, its projection on a gradient, that is (sum over i of d_i (a_i - a_0))^2,
// a_0 that of any expert whose weight changes.
//
// A task is a block of subsets over all tokens: every sum is one thread's, in token order, whatever the threads.
//
// Cost: about 2 K^2 multiply-adds (2 K of projections) and N look-ups a token and subset. Memory: S floats.
#include <algorithm>
#include <vector>

#include "cpu/workers.h"
#include "moe.h"

namespace moe_ext::cpu {
namespace {

constexpr int64_t kMostSubsetsPerTask = 256;
constexpr int64_t kStepsPerWorker = 1 << 14;

// Scratch of a thread: the ranks that a subset chooses, and the entries of d with their ranks.
struct Scratch {
  explicit Scratch(int64_t depth) : chosen(depth), difference(depth), changed(depth), values(depth) {}
  std::vector<int64_t> chosen;
  std::vector<double> difference;  // (N), all 0 between calls
  std::vector<int64_t> changed;
  std::vector<double> values;
};

// Slots of the first `count` chosen that are not skipped: all, or those of NAEE's rule. Returns the sum of their
// scores; `chosen` loses the others.
double unskipped(const SubsetsParams& p, const double* scores, int64_t* chosen, int64_t* count) {
  double sum = scores[chosen[0]];
  int64_t kept = 1;
  for (int64_t slot = 1; slot < *count; ++slot) {
    const double score = scores[chosen[slot]];
    if (p.thresholds != nullptr && score < double{p.thresholds[slot - 1]} * scores[chosen[0]]) continue;
    chosen[kept++] = chosen[slot];
    sum += score;
  }
  *count = kept;
  return sum;
}

double token_error(const SubsetsParams& p, int64_t token, const bool* keep, double full_sum, Scratch& scratch) {
  const int64_t* ranks = p.ranks + token * p.depth;
  const double* scores = p.scores + token * p.depth;
  int64_t* chosen = scratch.chosen.data();
  int64_t count = 0, rank = 0;
  for (; rank < p.depth && count < p.top_k; ++rank) {
    if (keep[ranks[rank]]) chosen[count++] = rank;
  }
  if (rank == p.top_k && p.thresholds == nullptr) return 0.0;  // the first K ranks are kept
  const double sum = unskipped(p, scores, chosen, &count);

  double* difference = scratch.difference.data();
  for (int64_t i = 0; i < p.top_k; ++i) difference[i] = scores[i] / full_sum;
  for (int64_t slot = 0; slot < count; ++slot) difference[chosen[slot]] -= scores[chosen[slot]] / sum;
  int64_t entries = 0;
  for (int64_t i = 0; i < rank; ++i) {
    if (difference[i] == 0.0) continue;
    scratch.changed[entries] = i;
    scratch.values[entries++] = difference[i];
    difference[i] = 0.0;
  }

  if (p.projections != nullptr) {
    const double* projections = p.projections + token * p.depth;
    double change = 0.0;
    for (int64_t a = 1; a < entries; ++a) {
      change += scratch.values[a] * (projections[scratch.changed[a]] - projections[scratch.changed[0]]);
    }
    return change * change;
  }
  const double* distances = p.distances + token * (p.depth * (p.depth - 1) / 2);
  double error = 0.0;
  for (int64_t a = 0; a < entries; ++a) {
    const int64_t i = scratch.changed[a];
    const double* row = distances + i * (2 * p.depth - i - 1) / 2 - i - 1;  // row[j] = distance of ranks i and j > i
    double of_row = 0.0;
    for (int64_t b = a + 1; b < entries; ++b) of_row += scratch.values[b] * row[scratch.changed[b]];
    error -= scratch.values[a] * of_row;
  }
  return error;
}

}  // namespace

void subset_errors(const SubsetsParams& p, const Threads& threads) {
  std::vector<double> full_sums(p.tokens, 0.0);  // of the scores of the first K ranks
  for (int64_t token = 0; token < p.tokens; ++token) {
    for (int64_t i = 0; i < p.top_k; ++i) full_sums[token] += p.scores[token * p.depth + i];
  }
  const int64_t steps = p.tokens * p.subsets * p.top_k;
  const int64_t workers = workers_for(threads, steps, kStepsPerWorker);
  const int64_t block = std::clamp(p.subsets / (4 * workers), int64_t{1}, kMostSubsetsPerTask);
  const int64_t tasks = (p.subsets + block - 1) / block;
  std::vector<Scratch> scratch(workers, Scratch(p.depth));
  for_each_task(threads, workers, tasks, [&](int64_t task, int64_t worker) {
    const int64_t first = task * block, end = std::min(p.subsets, first + block);
    std::fill(p.errors + first, p.errors + end, 0.0);
    for (int64_t token = 0; token < p.tokens; ++token) {
      for (int64_t s = first; s < end; ++s) {
        p.errors[s] += token_error(p, token, p.keep + s * p.num_experts, full_sums[token], scratch[worker]);
      }
    }
  });
}

}  // namespace moe_ext::cpu
