// Operators of the torch namespace `moe_ext`: their schemas, and for each its checks, its output and its kernels. No
// arithmetic here; every check runs before a kernel does.
#include <optional>
#include <string>
#include <tuple>

#include "moe.h"
#include "torch/arguments.h"
#include "torch/backend.h"
#include "torch/checks.h"
#include "torch/stable_torch.h"

namespace moe_ext {
namespace {

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t top_k, std::optional<Tensor> thresholds,
                                 bool renormalise, std::string score, std::optional<Tensor> bias, bool by_logits,
                                 int64_t groups, int64_t groups_per_token, int64_t group_best, bool outside_zero,
                                 double epsilon, double least, double scale) {
  constexpr const char* op = "route";
  RouteParams p = check_route(
      logits, top_k, thresholds,
      {renormalise, score, bias, by_logits, groups, groups_per_token, group_best, outside_zero, epsilon, least, scale});
  const std::optional<Tensor> dense_bias = dense(op, "bias", bias);
  const Tensor dense_logits = dense(op, "logits", logits);
  const std::optional<Tensor> dense_thresholds = dense(op, "thresholds", thresholds);
  const Tensor weights = output(op, logits, {p.tokens, top_k}, ScalarType::Float);
  const Tensor experts = output(op, logits, {p.tokens, top_k}, ScalarType::Long);
  p.logits = dense_logits.const_data_ptr();
  p.thresholds = data_of<float>(dense_thresholds);
  p.bias = data_of<float>(dense_bias);
  p.weights = static_cast<float*>(weights.mutable_data_ptr());
  p.experts = static_cast<int64_t*>(experts.mutable_data_ptr());
  dispatch(
      op, logits, [&](const Threads& threads) { cpu::route(p, threads); },
      [&](const auto&, auto* stream) { cuda::route(p, stream); });
  return {weights, experts};
}

// The arguments of a layer's operators that few models need, in the order of the schemas.
#define MOE_EXT_LAYER_OPTIONS                                                                                         \
  std::optional<Tensor> gate_up_bias, std::optional<Tensor> down_bias, bool gated, bool interleaved, bool transposed, \
      std::optional<double> limit, bool limit_after, double alpha, double up_offset, std::optional<double> gate_cap,  \
      std::optional<double> up_cap, std::optional<std::string> weight_type, int64_t group_size,                       \
      std::optional<Tensor> gate_up_scales, std::optional<Tensor> down_scales, std::optional<Tensor> gate_up_zeros,   \
      std::optional<Tensor> down_zeros, std::optional<std::string> activation_type
#define MOE_EXT_OPTIONS_GIVEN                                                                                        \
  LayerOptions {                                                                                                     \
    gate_up_bias, down_bias, gated, interleaved, transposed, limit, limit_after, alpha, up_offset, gate_cap, up_cap, \
        weight_type, group_size, gate_up_scales, down_scales, gate_up_zeros, down_zeros, activation_type             \
  }

// moments, counted, channels, pairs: of experts_observed; null for experts.
Tensor run_experts(const char* op, const Tensor& x, const Tensor& gate_up, const Tensor& down, const Tensor& experts,
                   const Tensor& weights, const std::string& activation, const LayerOptions& options,
                   const Tensor* moments, const std::optional<Tensor>& counted, const std::optional<Tensor>& channels,
                   const std::optional<Tensor>& pairs) {
  ExpertsParams p = check_experts(op, x, gate_up, down, experts, weights, activation, options);
  if (moments != nullptr) check_observation(op, p, *moments, counted, channels, pairs, x);

  const Tensor dense_x = aligned(op, "x", x);
  const Tensor dense_experts = dense(op, "experts", experts);
  const Tensor dense_weights = dense(op, "weights", weights);
  const std::optional<Tensor> dense_counted = dense(op, "counted", counted);
  p.x = dense_x.const_data_ptr();
  point_at_weights(&p, gate_up, down, options);
  p.experts = dense_experts.const_data_ptr();
  p.weights = dense_weights.const_data_ptr();
  p.moments = moments != nullptr ? static_cast<double*>(moments->mutable_data_ptr()) : nullptr;
  p.channels = channels.has_value() ? static_cast<double*>(channels->mutable_data_ptr()) : nullptr;
  p.pairs = pairs.has_value() ? static_cast<double*>(pairs->mutable_data_ptr()) : nullptr;
  p.counted = data_of<bool>(dense_counted);
  if (x.is_cpu()) check_expert_range(op, p);  // on CUDA the kernels assert it: the host does not wait for them

  const Tensor out = output(op, x, {p.tokens, p.hidden}, x.scalar_type());
  p.out = out.mutable_data_ptr();
  dispatch(
      op, x, [&](const Threads& threads) { cpu::experts(p, threads); },
      [&](const auto& scratch, auto* stream) { cuda::experts(p, scratch, stream); });
  return out;
}

Tensor experts(const Tensor& x, const Tensor& gate_up, const Tensor& down, const Tensor& experts, const Tensor& weights,
               std::string activation, MOE_EXT_LAYER_OPTIONS) {
  return run_experts("experts", x, gate_up, down, experts, weights, activation, MOE_EXT_OPTIONS_GIVEN, nullptr,
                     std::nullopt, std::nullopt, std::nullopt);
}

Tensor experts_observed(const Tensor& x, const Tensor& gate_up, const Tensor& down, const Tensor& experts,
                        const Tensor& weights, std::string activation, const Tensor& moments,
                        std::optional<Tensor> counted, std::optional<Tensor> channels, std::optional<Tensor> pairs,
                        MOE_EXT_LAYER_OPTIONS) {
  return run_experts("experts_observed", x, gate_up, down, experts, weights, activation, MOE_EXT_OPTIONS_GIVEN,
                     &moments, counted, channels, pairs);
}

Tensor expert_gram(const Tensor& x, const Tensor& gate_up, const Tensor& down, std::string activation,
                   MOE_EXT_LAYER_OPTIONS) {
  constexpr const char* op = "expert_gram";
  const LayerOptions options = MOE_EXT_OPTIONS_GIVEN;
  GramParams p = check_gram(x, gate_up, down, activation, options);
  const Tensor dense_x = aligned(op, "x", x);
  const Tensor gram = output(op, x, {p.tokens, p.num_experts, p.num_experts}, ScalarType::Double);
  p.x = dense_x.const_data_ptr();
  point_at_weights(&p, gate_up, down, options);
  p.gram = static_cast<double*>(gram.mutable_data_ptr());
  dispatch(
      op, x, [&](const Threads& threads) { cpu::gram(p, threads); },
      [&](const auto& scratch, auto* stream) { cuda::gram(p, scratch, stream); });
  return gram;
}

Tensor expert_projection(const Tensor& x, const Tensor& gate_up, const Tensor& down, const Tensor& g,
                         std::string activation, MOE_EXT_LAYER_OPTIONS) {
  constexpr const char* op = "expert_projection";
  const LayerOptions options = MOE_EXT_OPTIONS_GIVEN;
  ProjectionParams p = check_projection(x, gate_up, down, g, activation, options);
  const Tensor dense_x = aligned(op, "x", x);
  const Tensor dense_g = aligned(op, "g", g);
  const Tensor out = output(op, x, {p.tokens, p.num_experts}, ScalarType::Double);
  p.x = dense_x.const_data_ptr();
  point_at_weights(&p, gate_up, down, options);
  p.g = dense_g.const_data_ptr();
  p.out = static_cast<double*>(out.mutable_data_ptr());
  dispatch(
      op, x, [&](const Threads& threads) { cpu::projection(p, threads); },
      [&](const auto& scratch, auto* stream) { cuda::projection(p, scratch, stream); });
  return out;
}
#undef MOE_EXT_LAYER_OPTIONS
#undef MOE_EXT_OPTIONS_GIVEN

Tensor pack_weights(const Tensor& values, std::string weight_type) {
  constexpr const char* op = "pack_weights";
  const PackingParams p = check_pack(values, weight_type);
  const Tensor dense_values = dense(op, "values", values);
  const Shape shape{values.size(0), values.size(1), cpu::packed_row_bytes(p.type, p.columns)};
  const Tensor packed = output(op, values, shape, ScalarType::Byte);
  const auto* from = static_cast<const uint8_t*>(dense_values.const_data_ptr());
  auto* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  dispatch(
      op, values, [&](const Threads& threads) { cpu::pack_weights(p, from, to, threads); },
      [&](const auto&, auto* stream) { cuda::pack_weights(p, from, to, stream); });
  return packed;
}

Tensor unpack_weights(const Tensor& packed, std::string weight_type, int64_t columns) {
  constexpr const char* op = "unpack_weights";
  const PackingParams p = check_unpack(packed, weight_type, columns);
  const Tensor dense_packed = dense(op, "packed", packed);
  const Shape shape{packed.size(0), packed.size(1), cpu::given_row_bytes(p.type, columns)};
  const Tensor values = output(op, packed, shape, given_type(p.type));
  const auto* from = static_cast<const uint8_t*>(dense_packed.const_data_ptr());
  auto* to = static_cast<uint8_t*>(values.mutable_data_ptr());
  dispatch(
      op, packed, [&](const Threads& threads) { cpu::unpack_weights(p, from, to, threads); },
      [&](const auto&, auto* stream) { cuda::unpack_weights(p, from, to, stream); });
  return values;
}

Tensor run_subsets(const char* op, const Tensor* distances, const Tensor* projections, const Tensor& ranks,
                   const Tensor& scores, const Tensor& keep, int64_t top_k, const std::optional<Tensor>& thresholds) {
  SubsetsParams p = check_subsets(op, distances, projections, ranks, scores, keep, top_k, thresholds);
  const Tensor dense_outputs =
      distances != nullptr ? dense(op, "distances", *distances) : dense(op, "projections", *projections);
  const Tensor dense_ranks = dense(op, "ranks", ranks);
  const Tensor dense_scores = dense(op, "scores", scores);
  const Tensor dense_keep = dense(op, "keep", keep);
  const std::optional<Tensor> dense_thresholds = dense(op, "thresholds", thresholds);
  (distances != nullptr ? p.distances : p.projections) = static_cast<const double*>(dense_outputs.const_data_ptr());
  p.ranks = static_cast<const int64_t*>(dense_ranks.const_data_ptr());
  p.scores = static_cast<const double*>(dense_scores.const_data_ptr());
  p.keep = static_cast<const bool*>(dense_keep.const_data_ptr());
  p.thresholds = data_of<float>(dense_thresholds);
  check_subset_values(op, p);

  const Tensor errors = output(op, scores, {p.subsets}, ScalarType::Double);
  p.errors = static_cast<double*>(errors.mutable_data_ptr());
  dispatch(op, scores, [&](const Threads& threads) { cpu::subset_errors(p, threads); }, [](const auto&, auto*) {});
  return errors;
}

Tensor subset_errors(const Tensor& distances, const Tensor& ranks, const Tensor& scores, const Tensor& keep,
                     int64_t top_k, std::optional<Tensor> thresholds) {
  return run_subsets("subset_errors", &distances, nullptr, ranks, scores, keep, top_k, thresholds);
}

Tensor projected_errors(const Tensor& projections, const Tensor& ranks, const Tensor& scores, const Tensor& keep,
                        int64_t top_k, std::optional<Tensor> thresholds) {
  return run_subsets("projected_errors", nullptr, &projections, ranks, scores, keep, top_k, thresholds);
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY(moe_ext, m) {
  m.def(
      "route(Tensor logits, int top_k, Tensor? thresholds=None, bool renormalise=True, str score='softmax', "
      "Tensor? bias=None, bool by_logits=False, int groups=1, int groups_per_token=1, int group_best=1, "
      "bool outside_zero=False, float epsilon=0., float least=0., float scale=1.) -> (Tensor, Tensor)");
#define MOE_EXT_LAYER_OPTIONS                                                                                \
  ", Tensor? gate_up_bias=None, Tensor? down_bias=None, bool gated=True, bool interleaved=False, "           \
  "bool transposed=False, float? limit=None, bool limit_after=False, float alpha=1.0, float up_offset=0.0, " \
  "float? gate_cap=None, float? up_cap=None, str? weight_type=None, int group_size=0, "                      \
  "Tensor? gate_up_scales=None, Tensor? down_scales=None, Tensor? gate_up_zeros=None, "                      \
  "Tensor? down_zeros=None, str? activation_type=None) -> Tensor"
  m.def("experts(Tensor x, Tensor gate_up, Tensor down, Tensor experts, Tensor weights, str activation"  //
        MOE_EXT_LAYER_OPTIONS);
  m.def(
      "experts_observed(Tensor x, Tensor gate_up, Tensor down, Tensor experts, Tensor weights, str activation, "
      "Tensor(a!) moments, Tensor? counted=None, Tensor(b!)? channels=None, Tensor(c!)? pairs=None"  //
      MOE_EXT_LAYER_OPTIONS);
  m.def("expert_gram(Tensor x, Tensor gate_up, Tensor down, str activation" MOE_EXT_LAYER_OPTIONS);
  m.def("expert_projection(Tensor x, Tensor gate_up, Tensor down, Tensor g, str activation" MOE_EXT_LAYER_OPTIONS);
#undef MOE_EXT_LAYER_OPTIONS
  m.def("pack_weights(Tensor values, str weight_type) -> Tensor");
  m.def("unpack_weights(Tensor packed, str weight_type, int columns) -> Tensor");
  m.def(
      "subset_errors(Tensor distances, Tensor ranks, Tensor scores, Tensor keep, int top_k, Tensor? thresholds=None) "
      "-> Tensor");
  m.def(
      "projected_errors(Tensor projections, Tensor ranks, Tensor scores, Tensor keep, int top_k, "
      "Tensor? thresholds=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("route", TORCH_BOX(&moe_ext::route));
  m.impl("experts", TORCH_BOX(&moe_ext::experts));
  m.impl("experts_observed", TORCH_BOX(&moe_ext::experts_observed));
  m.impl("expert_gram", TORCH_BOX(&moe_ext::expert_gram));
  m.impl("expert_projection", TORCH_BOX(&moe_ext::expert_projection));
  m.impl("pack_weights", TORCH_BOX(&moe_ext::pack_weights));
  m.impl("unpack_weights", TORCH_BOX(&moe_ext::unpack_weights));
  m.impl("subset_errors", TORCH_BOX(&moe_ext::subset_errors));
  m.impl("projected_errors", TORCH_BOX(&moe_ext::projected_errors));
}

#ifdef MOE_EXT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) {
  m.impl("route", TORCH_BOX(&moe_ext::route));
  m.impl("experts", TORCH_BOX(&moe_ext::experts));
  m.impl("experts_observed", TORCH_BOX(&moe_ext::experts_observed));
  m.impl("expert_gram", TORCH_BOX(&moe_ext::expert_gram));
  m.impl("expert_projection", TORCH_BOX(&moe_ext::expert_projection));
  m.impl("pack_weights", TORCH_BOX(&moe_ext::pack_weights));
  m.impl("unpack_weights", TORCH_BOX(&moe_ext::unpack_weights));
}
#endif
