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
// A task is a block of subsets: every sum is one thread's, in token order, whatever the threads. Where there are more
// subsets than sets of K ranks, what every set costs is worked out first, some tokens at a time (chosen_sets.h).
//
// Cost: about 2 K^2 multiply-adds (2 K of projections) and N look-ups a token and subset; or, if that is less, a token
// and set of K ranks, and (E + N) / 8 look-ups a token and subset. Memory: 2 S numbers, and 4 MB of tables.
#include <algorithm>
#include <vector>

#include "cpu/chosen_sets.h"
#include "cpu/workers.h"
#include "moe.h"

namespace moe_ext::cpu {
namespace {

constexpr int64_t kMostSubsetsPerTask = 256;
constexpr int64_t kStepsPerWorker = 1 << 14;
constexpr int64_t kTableBytes = 4 << 20;

// Scratch of a thread: the ranks that a subset chooses, and the entries of d with their ranks.
struct Scratch {
  explicit Scratch(int64_t depth) : chosen(depth), set(depth), difference(depth), changed(depth), values(depth) {}
  std::vector<int64_t> chosen;
  std::vector<int64_t> set;        // that is next
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

// Of a token that comes to use the `count` ranks in scratch.chosen, ascending.
[[gnu::noinline]] double error_of_chosen(const SubsetsParams& p, int64_t token, int64_t count, double full_sum,
                                         Scratch& scratch) {
  const double* scores = p.scores + token * p.depth;
  int64_t* chosen = scratch.chosen.data();
  const int64_t reached = chosen[count - 1] + 1;
  if (reached == p.top_k && p.thresholds == nullptr) return 0.0;  // the first K ranks are kept
  const double sum = unskipped(p, scores, chosen, &count);

  double* difference = scratch.difference.data();
  for (int64_t i = 0; i < p.top_k; ++i) difference[i] = scores[i] / full_sum;
  for (int64_t slot = 0; slot < count; ++slot) difference[chosen[slot]] -= scores[chosen[slot]] / sum;
  int64_t entries = 0;
  for (int64_t i = 0; i < reached; ++i) {
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

double token_error(const SubsetsParams& p, int64_t token, const bool* keep, double full_sum, Scratch& scratch) {
  const int64_t* ranks = p.ranks + token * p.depth;
  int64_t count = 0;
  for (int64_t rank = 0; rank < p.depth && count < p.top_k; ++rank) {
    if (keep[ranks[rank]]) scratch.chosen[count++] = rank;
  }
  return error_of_chosen(p, token, count, full_sum, scratch);
}

bool by_sets(const SubsetsParams& p) {
  return p.num_experts <= ChosenSets::kMostExperts &&
         ChosenSets::count_of(p.depth, p.top_k) <= std::min(p.subsets / 2, ChosenSets::kMostSets);
}

struct Work {
  const SubsetsParams& p;
  const Threads& threads;
  const std::vector<double>& full_sums;
  std::vector<Scratch>& scratch;
  int64_t workers, block, tasks;  // of blocks of subsets
};

void add_errors_by_subset(const Work& work) {
  const SubsetsParams& p = work.p;
  for_each_task(work.threads, work.workers, work.tasks, [&](int64_t task, int64_t worker) {
    const int64_t first = task * work.block, end = std::min(p.subsets, first + work.block);
    for (int64_t token = 0; token < p.tokens; ++token) {
      for (int64_t s = first; s < end; ++s) {
        p.errors[s] += token_error(p, token, p.keep + s * p.num_experts, work.full_sums[token], work.scratch[worker]);
      }
    }
  });
}

void add_errors_by_set(const Work& work) {
  const SubsetsParams& p = work.p;
  const ChosenSets sets(p.num_experts, p.depth, p.top_k);
  std::vector<uint64_t> subsets(p.subsets, 0);
  for (int64_t s = 0; s < p.subsets; ++s) {
    for (int64_t e = 0; e < p.num_experts; ++e) subsets[s] |= uint64_t{p.keep[s * p.num_experts + e]} << e;
  }
  const int64_t count = sets.size(), bits = 256 * sets.expert_bytes();
  const int64_t most = std::clamp(kTableBytes / (8 * (count + bits)), int64_t{1}, p.tokens);  // tokens at a time
  std::vector<double> errors(most * count);
  std::vector<uint64_t> by_rank(most * bits);
  for (int64_t start = 0; start < p.tokens; start += most) {
    const int64_t tokens = std::min(most, p.tokens - start);
    for_each_task(work.threads, work.workers, tokens, [&](int64_t task, int64_t worker) {
      Scratch& scratch = work.scratch[worker];
      const int64_t token = start + task;
      sets.permute(p.ranks + token * p.depth, by_rank.data() + task * bits);
      sets.for_each(scratch.set, [&](int64_t number, const int64_t* ranks) {
        std::copy(ranks, ranks + p.top_k, scratch.chosen.data());
        errors[task * count + number] = error_of_chosen(p, token, p.top_k, work.full_sums[token], scratch);
      });
    });
    for_each_task(work.threads, work.workers, work.tasks, [&](int64_t task, int64_t) {
      const int64_t first = task * work.block, end = std::min(p.subsets, first + work.block);
      for (int64_t token = 0; token < tokens; ++token) {
        const double* of_token = errors.data() + token * count;
        const uint64_t* bits_of_token = by_rank.data() + token * bits;
        for (int64_t s = first; s < end; ++s) p.errors[s] += of_token[sets.number_of(subsets[s], bits_of_token)];
      }
    });
  }
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
  std::fill(p.errors, p.errors + p.subsets, 0.0);
  const Work work{p, threads, full_sums, scratch, workers, block, tasks};
  by_sets(p) ? add_errors_by_set(work) : add_errors_by_subset(work);
}

}  // namespace moe_ext::cpu
