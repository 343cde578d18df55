// The sets of K ranks that a token can come to use, numbered; and which of them a subset of the experts leaves it.
//
// Many subsets of experts leave a token the same K of its N ranks: of 16 experts, 65536 subsets leave 1820 sets of 4.
// What a set costs is then worked out once a token and looked up a subset. A set's number is that of a combination in
// colexicographic order: ranks r_0 < r_1 < ... give the sum of binomial(r_i, i + 1).
//
// Layout: subsets as words of E bits; of each token a table (E / 8, 256) that turns a byte of them into bits by rank;
// one table (N / 8, K + 1, 256) for all tokens that turns a byte of those, with the ranks found so far, into a part of
// the number. Cost a token and subset: E / 8 + N / 8 + 1 look-ups.
#pragma once

#include <cstdint>
#include <vector>

namespace moe_ext::cpu {

class ChosenSets {
 public:
  static constexpr int64_t kMostExperts = 64;    // bits of a word
  static constexpr int64_t kMostSets = 1 << 20;  // 8 MB a token

  // binomial(n, k), or kMostSets + 1 if it is larger than kMostSets.
  static int64_t count_of(int64_t n, int64_t k) {
    int64_t count = 1;
    for (int64_t i = 1; i <= k; ++i) {
      count = count * (n - k + i) / i;  // a binomial after every step, so that nothing is rounded
      if (count > kMostSets) return kMostSets + 1;
    }
    return count;
  }

  ChosenSets(int64_t num_experts, int64_t depth, int64_t top_k)
      : expert_bytes_((num_experts + 7) / 8), rank_bytes_((depth + 7) / 8), top_k_(top_k), depth_(depth) {
    steps_.resize(rank_bytes_ * (top_k + 1) * 256);
    for (int64_t byte = 0; byte < rank_bytes_; ++byte) {
      for (int64_t found = 0; found <= top_k; ++found) {
        for (int64_t bits = 0; bits < 256; ++bits) {
          uint32_t number = 0, count = static_cast<uint32_t>(found);
          for (int64_t bit = 0; bit < 8 && count < static_cast<uint32_t>(top_k); ++bit) {
            const int64_t rank = 8 * byte + bit;
            if ((bits >> bit & 1) == 0 || rank >= depth) continue;
            ++count;
            if (rank >= count) number += static_cast<uint32_t>(count_of(rank, count));
          }
          steps_[(byte * (top_k + 1) + found) * 256 + bits] = number << 8 | count;
        }
      }
    }
  }

  int64_t size() const { return count_of(depth_, top_k_); }

  // Calls visit(number, ranks) for every set, `ranks` ascending.
  template <typename Visit>
  void for_each(std::vector<int64_t>& ranks, const Visit& visit) const {
    for (int64_t i = 0; i < top_k_; ++i) ranks[i] = i;
    for (int64_t number = 0;; ++number) {
      visit(number, ranks.data());
      int64_t i = 0;  // the first rank that can move up; those below it start again
      while (i + 1 < top_k_ && ranks[i] + 1 == ranks[i + 1]) ++i;
      if (++ranks[i] == depth_) return;
      for (int64_t below = 0; below < i; ++below) ranks[below] = below;
    }
  }

  // Of a token: by_rank (expert_bytes(), 256), the bits by rank of every byte of a subset's word.
  void permute(const int64_t* experts_of_ranks, uint64_t* by_rank) const {
    for (int64_t byte = 0; byte < expert_bytes_; ++byte) {
      uint64_t of_expert[8] = {};
      for (int64_t rank = 0; rank < depth_; ++rank) {
        const int64_t expert = experts_of_ranks[rank] - 8 * byte;
        if (expert >= 0 && expert < 8) of_expert[expert] |= uint64_t{1} << rank;
      }
      uint64_t* table = by_rank + 256 * byte;
      table[0] = 0;
      for (int64_t bit = 0; bit < 8; ++bit) {
        for (int64_t bits = 0; bits < int64_t{1} << bit; ++bits) {
          table[bits | int64_t{1} << bit] = table[bits] | of_expert[bit];
        }
      }
    }
  }

  // The number of the first K ranks that a subset keeps. It keeps at least K of the N.
  int64_t number_of(uint64_t subset, const uint64_t* by_rank) const {
    uint64_t kept = 0;
    for (int64_t byte = 0; byte < expert_bytes_; ++byte) kept |= by_rank[256 * byte + (subset >> 8 * byte & 255)];
    uint32_t number = 0, found = 0;
    for (int64_t byte = 0; byte < rank_bytes_; ++byte) {
      const uint32_t step = steps_[(byte * (top_k_ + 1) + found) * 256 + (kept >> 8 * byte & 255)];
      number += step >> 8;
      found = step & 255;
    }
    return number;
  }

  int64_t expert_bytes() const { return expert_bytes_; }

 private:
  int64_t expert_bytes_, rank_bytes_, top_k_, depth_;
  std::vector<uint32_t> steps_;  // a part of the number, and in the low byte the ranks found by then
};

}  // namespace moe_ext::cpu
