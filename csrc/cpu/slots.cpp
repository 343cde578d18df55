// Counting sort of (token, slot) pairs by expert. Cost: two passes over T * K indices and one over E counts.
#include "cpu/slots.h"

#include "cpu/numeric.h"

namespace moe_ext::cpu {
namespace {

float weight(const ExpertsParams& p, int64_t slot) {
  float value = 0.0f;
  with_type(p.weights_dtype,
            [&](auto* type) { value = to_float(static_cast<const Pointee<decltype(type)>*>(p.weights)[slot]); });
  return value;
}

template <typename Index>
SortedSlots sort_typed(const Index* experts, const ExpertsParams& p) {
  SortedSlots sorted;
  sorted.first.assign(p.num_experts + 1, 0);
  const int64_t slots = p.tokens * p.top_k;
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (experts[slot] < p.num_experts) ++sorted.first[experts[slot] + 1];
  }
  for (int64_t expert = 0; expert < p.num_experts; ++expert) sorted.first[expert + 1] += sorted.first[expert];

  std::vector<int64_t> next(sorted.first.begin(), sorted.first.end() - 1);
  sorted.slot_of.resize(sorted.positions());
  sorted.token_of.resize(sorted.positions());
  sorted.weight_of.resize(sorted.positions());
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (experts[slot] == p.num_experts) continue;
    const int64_t position = next[experts[slot]]++;
    sorted.slot_of[position] = slot;
    sorted.token_of[position] = slot / p.top_k;
    sorted.weight_of[position] = weight(p, slot);
  }
  return sorted;
}

template <typename Index>
int64_t first_bad_typed(const Index* experts, int64_t slots, int64_t num_experts) {
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (experts[slot] < 0 || experts[slot] > num_experts) return slot;
  }
  return -1;
}

}  // namespace

SortedSlots sort_slots(const ExpertsParams& p) {
  return p.experts_are_int64 ? sort_typed(static_cast<const int64_t*>(p.experts), p)
                             : sort_typed(static_cast<const int32_t*>(p.experts), p);
}

int64_t first_bad_expert(const void* experts, bool is_int64, int64_t slots, int64_t num_experts) {
  return is_int64 ? first_bad_typed(static_cast<const int64_t*>(experts), slots, num_experts)
                  : first_bad_typed(static_cast<const int32_t*>(experts), slots, num_experts);
}

}  // namespace moe_ext::cpu
