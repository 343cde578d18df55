// The (token, slot) pairs that have an expert, sorted by expert: what the grouped products run over.
#pragma once

#include <cstdint>
#include <vector>

#include "moe.h"

namespace moe_ext::cpu {

// Stable counting sort: within an expert, positions follow the flattened (token, slot) order. Sentinels have no
// position.
struct SortedSlots {
  std::vector<int64_t> first;     // (E + 1) first position of each expert; the last is the number of positions P
  std::vector<int64_t> slot_of;   // (P) index of a position in the flattened (token, slot) order
  std::vector<int64_t> token_of;  // (P) its token
  std::vector<float> weight_of;   // (P) its routing weight

  int64_t count(int64_t expert) const { return first[expert + 1] - first[expert]; }
  int64_t positions() const { return first.back(); }
};

SortedSlots sort_slots(const ExpertsParams& p);

}  // namespace moe_ext::cpu
