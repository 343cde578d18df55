// What each operator asks of its arguments together. The checks return the kernel's parameters with all sizes and types
// filled in, no pointers; that follows when the tensors are as the kernels read them (dense, aligned).
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "moe.h"
#include "torch/checks.h"
#include "torch/stable_torch.h"

namespace moe_ext {

// ---- layout

// Activations and routing are small: a strided one is copied. Weights are not: they must be contiguous
// (check_contiguous).
inline Tensor dense(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  return with_memory([&] { return torch::stable::contiguous(tensor); }, op, "a contiguous copy of '", name,
                     "' of shape ", text_of(shape_of(tensor)));
}

inline std::optional<Tensor> dense(const char* op, const char* name, const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return dense(op, name, *tensor);
}

// Dense, and on CUDA a copy if it starts at an odd offset of its storage, so that rows can be read 16 bytes at a time.
// (Weights are not copied: odd ones take the kernels that read element by element.)
inline Tensor aligned(const char* op, const char* name, const Tensor& tensor) {
  const Tensor whole = dense(op, name, tensor);
  if (!whole.is_cuda() || reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0) return whole;
  return with_memory([&] { return torch::stable::clone(whole); }, op, "an aligned copy of '", name, "' of shape ",
                     text_of(shape_of(tensor)));
}

// The output of an operator: uninitialised, on the device of `like`.
inline Tensor output(const char* op, const Tensor& like, const Shape& shape, ScalarType type) {
  return with_memory([&] { return torch::stable::new_empty(like, shape, type); }, op, "an output of shape ",
                     text_of(shape));
}

// Null for an argument that was left out.
template <typename T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// ---- route

inline void check_thresholds(const char* op, const std::optional<Tensor>& thresholds, int64_t top_k) {
  if (!thresholds.has_value()) return;
  check_shape(op, "thresholds", *thresholds, {top_k - 1}, "(top_k - 1,)");
  check_type(op, "thresholds", *thresholds, {ScalarType::Float});
}

// What the route operator is given beside logits, K and thresholds; as in its schema.
struct RoutingOptions {
  bool renormalise;
  std::string score;
  std::optional<Tensor> bias;
  bool by_logits;
  int64_t groups, groups_per_token, group_best;
  bool outside_zero;
  double epsilon, least, scale;
};

inline void check_routing(const char* op, RouteParams& p, const RoutingOptions& formula) {
  p.renormalise = formula.renormalise;
  p.score = score_named(op, formula.score);
  p.by_logits = formula.by_logits;
  if (formula.bias.has_value()) {
    check_shape(op, "bias", *formula.bias, {p.num_experts}, "(E,) with E from 'logits'");
    check_type(op, "bias", *formula.bias, {ScalarType::Float});
  }
  if (formula.groups < 1 || p.num_experts % formula.groups != 0) {
    refuse(op, "'groups' is ", formula.groups, "; expected a divisor of ", p.num_experts, ", the number of experts");
  }
  const int64_t size = p.num_experts / formula.groups;
  const int64_t fewest = (p.top_k + size - 1) / size;
  if (formula.groups_per_token < fewest || formula.groups_per_token > formula.groups) {
    refuse(op, "'groups_per_token' is ", formula.groups_per_token, "; expected ", fewest, " to ", formula.groups,
           ", which hold 'top_k' experts");
  }
  if (formula.group_best < 1 || formula.group_best > size) {
    refuse(op, "'group_best' is ", formula.group_best, "; expected 1 to ", size, ", the experts of a group");
  }
  for (const auto& [name, value] : {std::pair{"epsilon", formula.epsilon}, std::pair{"least", formula.least}}) {
    if (!(value >= 0.0 && std::isfinite(value))) refuse(op, "'", name, "' is ", value, "; expected a number from 0 on");
  }
  if (!std::isfinite(formula.scale)) refuse(op, "'scale' is ", formula.scale, "; expected a finite number");
  p.groups = formula.groups;
  p.groups_per_token = formula.groups_per_token;
  p.group_best = formula.group_best;
  p.outside_zero = formula.outside_zero;
  p.epsilon = static_cast<float>(formula.epsilon);
  p.least = static_cast<float>(formula.least);
  p.scale = static_cast<float>(formula.scale);
}

inline RouteParams check_route(const Tensor& logits, int64_t top_k, const std::optional<Tensor>& thresholds,
                               const RoutingOptions& formula) {
  constexpr const char* op = "route";
  check_dims(op, "logits", logits, 2, "(T, E)");
  RouteParams p{};
  p.tokens = logits.size(0);
  p.num_experts = logits.size(1);
  p.top_k = top_k;
  if (top_k < 1 || top_k > p.num_experts) {
    refuse(op, "'top_k' is ", top_k, "; expected 1 to ", p.num_experts, ", the number of experts in 'logits'");
  }
  check_thresholds(op, thresholds, top_k);
  p.dtype = float_type(op, "logits", logits);
  check_routing(op, p, formula);
  if (thresholds.has_value()) check_device(op, "thresholds", *thresholds, "logits", logits);
  if (formula.bias.has_value()) check_device(op, "bias", *formula.bias, "logits", logits);
  if (logits.is_cuda() && p.num_experts > cuda::kMaxRoutedExperts) {
    refuse(op, "'logits' has ", p.num_experts, " experts; the CUDA kernel takes up to ", cuda::kMaxRoutedExperts);
  }
  if (logits.is_cuda() && p.groups > cuda::kMaxRoutedGroups) {
    refuse(op, "'groups' is ", p.groups, "; the CUDA kernel takes up to ", cuda::kMaxRoutedGroups);
  }
  return p;
}

// ---- experts, experts_observed, expert_gram, expert_projection

// The arguments of a layer's operators that few models need, as they come: see Formula, WeightFormat and LayerParams in
// moe.h.
struct LayerOptions {
  std::optional<Tensor> gate_up_bias, down_bias;
  bool gated, interleaved, transposed;
  std::optional<double> limit;
  bool limit_after;
  double alpha, up_offset;
  std::optional<double> gate_cap, up_cap;
  std::optional<std::string> weight_type;
  int64_t group_size;
  std::optional<Tensor> gate_up_scales, down_scales, gate_up_zeros, down_zeros;
  std::optional<std::string> activation_type;
};

// A bound that is left out is none.
inline float check_bound(const char* op, const char* name, const std::optional<double>& value) {
  if (!value.has_value()) return Formula::kNone;
  const float bound = static_cast<float>(*value);
  if (!(bound > 0.0f && bound < Formula::kNone))
    refuse(op, "'", name, "' is ", *value, "; expected more than 0, or none");
  return bound;
}

inline float check_finite(const char* op, const char* name, double value) {
  const float number = static_cast<float>(value);
  if (!(number > -Formula::kNone && number < Formula::kNone))
    refuse(op, "'", name, "' is ", value, "; expected a finite number");
  return number;
}

inline Formula check_formula(const char* op, const std::string& activation, const LayerOptions& options) {
  Formula f;
  f.activation = activation_named(op, activation);
  f.gated = options.gated;
  f.interleaved = options.interleaved;
  f.transposed = options.transposed;
  f.limit = check_bound(op, "limit", options.limit);
  f.limit_after = options.limit_after;
  f.alpha = check_finite(op, "alpha", options.alpha);
  if (f.alpha == 0.0f) refuse(op, "'alpha' is 0; expected another number");
  f.up_offset = check_finite(op, "up_offset", options.up_offset);
  f.gate_cap = check_bound(op, "gate_cap", options.gate_cap);
  f.up_cap = check_bound(op, "up_cap", options.up_cap);
  if (f.activation != Activation::kSilu && (f.alpha != 1.0f || f.gate_cap != Formula::kNone)) {
    refuse(op, "'", f.alpha != 1.0f ? "alpha" : "gate_cap", "' is given with activation \"", activation,
           "\"; it belongs to \"silu\"");
  }
  if (f.limit_after && f.limit == Formula::kNone) refuse(op, "'limit_after' is given without 'limit'");
  if (f.gated) return f;
  const char* of_gate = f.interleaved                  ? "interleaved"
                        : f.limit != Formula::kNone    ? "limit"
                        : f.up_offset != 0.0f          ? "up_offset"
                        : f.gate_cap != Formula::kNone ? "gate_cap"
                        : f.up_cap != Formula::kNone   ? "up_cap"
                                                       : nullptr;
  if (of_gate != nullptr) refuse(op, "'", of_gate, "' is given with gated=False; it belongs to experts with a gate");
  return f;
}

// The name of the first of these tensors that is given, or null.
inline const char* first_given(std::initializer_list<std::pair<const char*, const std::optional<Tensor>*>> tensors) {
  for (const auto& [name, tensor] : tensors) {
    if (tensor->has_value()) return name;
  }
  return nullptr;
}

inline WeightFormat check_format(const char* op, const LayerOptions& options) {
  WeightFormat format;
  if (!options.weight_type.has_value()) {
    const char* of_quantised = options.group_size != 0 ? "group_size"
                                                       : first_given({{"gate_up_scales", &options.gate_up_scales},
                                                                      {"down_scales", &options.down_scales},
                                                                      {"gate_up_zeros", &options.gate_up_zeros},
                                                                      {"down_zeros", &options.down_zeros}});
    if (of_quantised != nullptr) refuse(op, "'", of_quantised, "' is given without 'weight_type'");
    return format;
  }
  const std::string& name = *options.weight_type;
  format.type = weight_type_named(op, name);
  const int64_t size = format.group_size = options.group_size;
  const auto require_size = [&](bool known, const char* expected) {
    if (!known) refuse(op, "'group_size' is ", size, "; expected ", expected, " with weight_type \"", name, "\"");
  };
  switch (format.type) {
    case WeightType::kInt8:
      require_size(size == 0, "0");
      break;
    case WeightType::kInt4:
      require_size(size == 32 || size == 64 || size == 128, "32, 64 or 128");
      break;
    case WeightType::kFloat8:
      require_size(size == 0 || size == 128, "0 or 128");
      format.row_blocks = size == 128;
      break;
    default:
      require_size(size == 32, "32");
  }
  if (options.transposed) refuse(op, "'transposed' is given with 'weight_type'; quantised weights are rows");
  for (const auto& [scales, given] :
       {std::pair{"gate_up_scales", &options.gate_up_scales}, std::pair{"down_scales", &options.down_scales}}) {
    if (!given->has_value()) refuse(op, "'weight_type' is given without '", scales, "'");
  }
  if (const char* zeros =
          first_given({{"gate_up_zeros", &options.gate_up_zeros}, {"down_zeros", &options.down_zeros}})) {
    if (format.type != WeightType::kInt4) {
      refuse(op, "'", zeros, "' is given with weight_type \"", name, "\"; it belongs to \"int4\"");
    }
    if (!options.gate_up_zeros.has_value() || !options.down_zeros.has_value()) {
      refuse(op, "'", zeros, "' is given alone; expected zeros of both weights, or of neither");
    }
  }
  return format;
}

// Whether activations are rounded to 8 bits.
inline bool check_activation_type(const char* op, const LayerOptions& options, const WeightFormat& format,
                                  const Tensor& x) {
  if (!options.activation_type.has_value()) return false;
  const std::string& name = *options.activation_type;
  if (name != "int8") refuse(op, "'activation_type' is \"", name.substr(0, 80), "\"; expected \"int8\", or none");
  if (format.type != WeightType::kInt8 && !has_four_bits(format.type)) {
    refuse(op,
           "'activation_type' is given with weights that are no whole numbers; expected weight_type \"int8\", "
           "\"int4\" or \"mxfp4\"");
  }
  if (x.is_cuda()) refuse(op, "'activation_type' is \"int8\"; CUDA kernels multiply activations as they are");
  return true;
}

// A weight matrix as pack_weights made it, its scales and its zeros; `shape`: "(E, 2I, H)" and the like, which `sizes`
// are.
inline void check_quantised(const char* op, const char* name, const Tensor& weight, const WeightFormat& format,
                            const Shape& sizes, const std::string& shape, const std::string& scales_name,
                            const Tensor& scales, const std::string& zeros_name, const std::optional<Tensor>& zeros,
                            const Tensor& x) {
  const int64_t num_experts = sizes[0], rows = sizes[1], columns = sizes[2];
  const std::string packed = "weights " + shape + " as pack_weights packs them";
  check_shape(op, name, weight, {num_experts, rows, cpu::packed_row_bytes(format.type, columns)}, packed.c_str());
  check_type(op, name, weight, {ScalarType::Byte});
  check_contiguous(op, name, weight);
  check_device(op, name, weight, "x", x);

  Shape expected{num_experts, rows};
  std::string meaning = "a scale for every row of " + shape;
  if (format.row_blocks) expected[1] = (rows + WeightFormat::kRowBlock - 1) / WeightFormat::kRowBlock;
  if (format.group_size != 0) {
    expected.push_back(format.groups(columns));
    meaning = (format.row_blocks ? "a scale for every block of 128 rows and 128 columns of "
                                 : "one for every row and group of columns of ") +
              shape;
  }
  check_shape(op, scales_name.c_str(), scales, expected, meaning.c_str());
  switch (format.type) {
    case WeightType::kInt4:
      check_type(op, scales_name.c_str(), scales, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
      break;
    case WeightType::kMxfp4:
      check_type(op, scales_name.c_str(), scales, {ScalarType::Byte});
      break;
    default:
      check_type(op, scales_name.c_str(), scales, {ScalarType::Float});
  }
  check_contiguous(op, scales_name.c_str(), scales);
  check_device(op, scales_name.c_str(), scales, "x", x);
  if (!zeros.has_value()) return;
  check_shape(op, zeros_name.c_str(), *zeros, expected, meaning.c_str());
  check_type(op, zeros_name.c_str(), *zeros, {ScalarType::Byte});
  check_contiguous(op, zeros_name.c_str(), *zeros);
  check_device(op, zeros_name.c_str(), *zeros, "x", x);
}

// The scales' dtype, once check_quantised has seen them.
inline ScaleType scale_type(const char* op, const Tensor& gate_up_scales, const Tensor& down_scales) {
  check_type(op, "down_scales", down_scales, {gate_up_scales.scalar_type()});
  switch (gate_up_scales.scalar_type()) {
    case ScalarType::BFloat16:
      return ScaleType::kBFloat16;
    case ScalarType::Half:
      return ScaleType::kFloat16;
    case ScalarType::Byte:
      return ScaleType::kE8M0;
    default:
      return ScaleType::kFloat32;
  }
}

inline void check_bias(const char* op, const char* name, const std::optional<Tensor>& bias, const Shape& shape,
                       const char* meaning, const Tensor& x) {
  if (!bias.has_value()) return;
  check_shape(op, name, *bias, shape, meaning);
  check_type(op, name, *bias, {x.scalar_type()});
  check_contiguous(op, name, *bias);
  check_device(op, name, *bias, "x", x);
}

// What the operators on a layer's weights share: the shapes, dtypes and layout of x, the weights, what quantised ones
// come with, and the biases.
inline ExpertsParams check_layer(const char* op, const Tensor& x, const Tensor& gate_up, const Tensor& down,
                                 const std::string& activation, const LayerOptions& options) {
  check_dims(op, "x", x, 2, "(T, H)");
  const Formula f = check_formula(op, activation, options);
  const WeightFormat format = check_format(op, options);
  const char* meaning = f.transposed ? (f.gated ? "(E, H, 2I)" : "(E, H, I)") : f.gated ? "(E, 2I, H)" : "(E, I, H)";
  const char* dims = !format.quantised() ? meaning : f.gated ? "(E, 2I, bytes)" : "(E, I, bytes)";
  check_dims(op, "gate_up", gate_up, 3, dims);

  ExpertsParams p{};
  p.formula = f;
  p.format = format;
  p.int8_activations = check_activation_type(op, options, format, x);
  p.tokens = x.size(0);
  p.hidden = x.size(1);
  p.num_experts = gate_up.size(0);
  const int64_t rows = gate_up.size(f.transposed ? 2 : 1);
  p.intermediate = f.gated ? rows / 2 : rows;
  if (p.num_experts < 1 || p.intermediate < 1 || p.hidden < 1 || f.rows(p.intermediate) != rows) {
    refuse(op, "'gate_up' has shape ", text_of(shape_of(gate_up)), "; expected ", dims,
           f.gated ? (f.transposed ? " with an even last dimension" : " with an even second dimension") : "",
           f.gated ? " and none of them 0" : " with none of them 0");
  }
  const std::string from_x = std::string(meaning) + " with H from 'x'";
  const char* from_gate_up = f.transposed ? "(E, I, H) from 'gate_up'" : "(E, H, I) from 'gate_up'";
  p.dtype = float_type(op, "x", x);
  if (format.quantised()) {
    check_quantised(op, "gate_up", gate_up, format, {p.num_experts, rows, p.hidden}, from_x, "gate_up_scales",
                    *options.gate_up_scales, "gate_up_zeros", options.gate_up_zeros, x);
    check_quantised(op, "down", down, format, {p.num_experts, p.hidden, p.intermediate}, from_gate_up, "down_scales",
                    *options.down_scales, "down_zeros", options.down_zeros, x);
    p.format.scales = scale_type(op, *options.gate_up_scales, *options.down_scales);
  } else {
    check_shape(op, "gate_up", gate_up,
                f.transposed ? Shape{p.num_experts, p.hidden, rows} : Shape{p.num_experts, rows, p.hidden},
                from_x.c_str());
    check_shape(
        op, "down", down,
        f.transposed ? Shape{p.num_experts, p.intermediate, p.hidden} : Shape{p.num_experts, p.hidden, p.intermediate},
        from_gate_up);
    check_type(op, "gate_up", gate_up, {x.scalar_type()});
    check_type(op, "down", down, {x.scalar_type()});
    check_contiguous(op, "gate_up", gate_up);
    check_contiguous(op, "down", down);
    check_device(op, "gate_up", gate_up, "x", x);
    check_device(op, "down", down, "x", x);
  }
  check_bias(op, "gate_up_bias", options.gate_up_bias, {p.num_experts, rows},
             f.gated ? "(E, 2I) from 'gate_up'" : "(E, I) from 'gate_up'", x);
  check_bias(op, "down_bias", options.down_bias, {p.num_experts, p.hidden}, "(E, H) from 'gate_up'", x);
  if (x.is_cuda() && p.num_experts > cuda::kMaxExperts) {
    refuse(op, "'gate_up' has ", p.num_experts, " experts; the CUDA kernels take up to ", cuda::kMaxExperts);
  }
  return p;
}

// Where the weights are, once they are checked.
inline void point_at_weights(LayerParams* p, const Tensor& gate_up, const Tensor& down, const LayerOptions& options) {
  p->gate_up = gate_up.const_data_ptr();
  p->down = down.const_data_ptr();
  p->gate_up_bias = data_of<void>(options.gate_up_bias);
  p->down_bias = data_of<void>(options.down_bias);
  p->gate_up_scales = data_of<void>(options.gate_up_scales);
  p->down_scales = data_of<void>(options.down_scales);
  p->gate_up_zeros = data_of<uint8_t>(options.gate_up_zeros);
  p->down_zeros = data_of<uint8_t>(options.down_zeros);
}

inline ExpertsParams check_experts(const char* op, const Tensor& x, const Tensor& gate_up, const Tensor& down,
                                   const Tensor& experts, const Tensor& weights, const std::string& activation,
                                   const LayerOptions& options) {
  ExpertsParams p = check_layer(op, x, gate_up, down, activation, options);
  check_dims(op, "experts", experts, 2, "(T, K)");
  p.top_k = experts.size(1);
  check_shape(op, "experts", experts, {p.tokens, p.top_k}, "(T, K) with T from 'x'");
  check_shape(op, "weights", weights, {p.tokens, p.top_k}, "(T, K) from 'experts'");
  check_type(op, "experts", experts, {ScalarType::Int, ScalarType::Long});
  check_type(op, "weights", weights, {ScalarType::Float, x.scalar_type()});
  check_device(op, "experts", experts, "x", x);
  check_device(op, "weights", weights, "x", x);
  p.weights_dtype = float_type(op, "weights", weights);
  p.experts_are_int64 = experts.scalar_type() == ScalarType::Long;
  return p;
}

inline void check_observation(const char* op, const ExpertsParams& p, const Tensor& moments,
                              const std::optional<Tensor>& counted, const std::optional<Tensor>& channels,
                              const std::optional<Tensor>& pairs, const Tensor& x) {
  check_shape(op, "moments", moments, {p.num_experts, 3, 3}, "(E, 3, 3) with E from 'gate_up'");
  check_type(op, "moments", moments, {ScalarType::Double});
  check_contiguous(op, "moments", moments);
  if (counted.has_value()) {
    check_shape(op, "counted", *counted, {p.tokens}, "(T,) with T from 'x'");
    check_type(op, "counted", *counted, {ScalarType::Bool});
  }
  check_device(op, "moments", moments, "x", x);
  if (channels.has_value()) {
    check_shape(op, "channels", *channels, {p.num_experts, p.intermediate}, "(E, I) from 'gate_up'");
    check_type(op, "channels", *channels, {ScalarType::Double});
    check_contiguous(op, "channels", *channels);
    check_device(op, "channels", *channels, "x", x);
  }
  if (pairs.has_value()) {
    check_shape(op, "pairs", *pairs, {p.num_experts, p.num_experts}, "(E, E) from 'gate_up'");
    check_type(op, "pairs", *pairs, {ScalarType::Double});
    check_contiguous(op, "pairs", *pairs);
    check_device(op, "pairs", *pairs, "x", x);
  }
  if (counted.has_value()) check_device(op, "counted", *counted, "x", x);
}

inline void check_expert_range(const char* op, const ExpertsParams& p) {
  const int64_t bad = cpu::first_bad_expert(p.experts, p.experts_are_int64, p.tokens * p.top_k, p.num_experts);
  if (bad < 0) return;
  refuse(op, "'experts' holds ",
         p.experts_are_int64 ? static_cast<const int64_t*>(p.experts)[bad]
                             : int64_t{static_cast<const int32_t*>(p.experts)[bad]},
         " at token ", bad / p.top_k, ", slot ", bad % p.top_k, "; expected 0 to ", p.num_experts,
         " (that one marks an empty slot)");
}

inline GramParams check_gram(const Tensor& x, const Tensor& gate_up, const Tensor& down, const std::string& activation,
                             const LayerOptions& options) {
  GramParams p{};
  static_cast<LayerParams&>(p) = check_layer("expert_gram", x, gate_up, down, activation, options);
  return p;
}

inline ProjectionParams check_projection(const Tensor& x, const Tensor& gate_up, const Tensor& down, const Tensor& g,
                                         const std::string& activation, const LayerOptions& options) {
  constexpr const char* op = "expert_projection";
  ProjectionParams p{};
  static_cast<LayerParams&>(p) = check_layer(op, x, gate_up, down, activation, options);
  check_shape(op, "g", g, {p.tokens, p.hidden}, "(T, H) like 'x'");
  check_type(op, "g", g, {ScalarType::Float, x.scalar_type()});
  check_device(op, "g", g, "x", x);
  p.g_dtype = float_type(op, "g", g);
  return p;
}

// ---- pack_weights, unpack_weights

// The dtype of quantised weights before they are packed.
inline ScalarType given_type(WeightType type) {
  return type == WeightType::kInt8     ? ScalarType::Char
         : type == WeightType::kFloat8 ? ScalarType::Float8_e4m3fn
                                       : ScalarType::Byte;
}

inline PackingParams check_pack(const Tensor& values, const std::string& weight_type) {
  constexpr const char* op = "pack_weights";
  PackingParams p{};
  p.type = weight_type_named(op, weight_type);
  const bool pairs = has_four_bits(p.type);
  check_dims(op, "values", values, 3, pairs ? "(E, R, C / 2)" : "(E, R, C)");
  check_type(op, "values", values, {given_type(p.type)});
  p.rows = values.size(0) * values.size(1);
  p.columns = pairs ? 2 * values.size(2) : values.size(2);
  return p;
}

inline PackingParams check_unpack(const Tensor& packed, const std::string& weight_type, int64_t columns) {
  constexpr const char* op = "unpack_weights";
  PackingParams p{};
  p.type = weight_type_named(op, weight_type);
  check_dims(op, "packed", packed, 3, "(E, R, bytes)");
  check_type(op, "packed", packed, {ScalarType::Byte});
  if (columns < 0 || columns > std::numeric_limits<int32_t>::max()) {
    refuse(op, "'columns' is ", columns, "; expected the number that were packed");
  }
  const Shape expected{packed.size(0), packed.size(1), cpu::packed_row_bytes(p.type, columns)};
  check_shape(op, "packed", packed, expected, "(E, R, bytes of 'columns')");
  p.rows = packed.size(0) * packed.size(1);
  p.columns = columns;
  return p;
}

// ---- subset_errors, projected_errors

// `distances` or `projections`: the other is null.
inline SubsetsParams check_subsets(const char* op, const Tensor* distances, const Tensor* projections,
                                   const Tensor& ranks, const Tensor& scores, const Tensor& keep, int64_t top_k,
                                   const std::optional<Tensor>& thresholds) {
  check_dims(op, "ranks", ranks, 2, "(T, N)");
  check_dims(op, "keep", keep, 2, "(S, E)");
  SubsetsParams p{};
  p.tokens = ranks.size(0);
  p.depth = ranks.size(1);
  p.subsets = keep.size(0);
  p.num_experts = keep.size(1);
  p.top_k = top_k;
  if (distances != nullptr) {
    check_shape(op, "distances", *distances, {p.tokens, p.depth * (p.depth - 1) / 2},
                "(T, N (N - 1) / 2) with T and N from 'ranks'");
  } else {
    check_shape(op, "projections", *projections, {p.tokens, p.depth}, "(T, N) from 'ranks'");
  }
  check_shape(op, "scores", scores, {p.tokens, p.depth}, "(T, N) from 'ranks'");
  if (distances != nullptr) {
    check_type(op, "distances", *distances, {ScalarType::Double});
  } else {
    check_type(op, "projections", *projections, {ScalarType::Double});
  }
  check_type(op, "ranks", ranks, {ScalarType::Long});
  check_type(op, "scores", scores, {ScalarType::Double});
  check_type(op, "keep", keep, {ScalarType::Bool});
  if (p.depth > p.num_experts) {
    refuse(op, "'ranks' has N = ", p.depth, " ranks a token; expected at most ", p.num_experts,
           ", the number of experts in 'keep'");
  }
  if (top_k < 1 || top_k > p.depth) {
    refuse(op, "'top_k' is ", top_k, "; expected 1 to ", p.depth, ", the number of ranks in 'ranks'");
  }
  check_thresholds(op, thresholds, top_k);
  return p;
}

// Of the values: every rank is an expert's, and every subset leaves K of a token's ranks.
inline void check_subset_values(const char* op, const SubsetsParams& p) {
  for (int64_t i = 0; i < p.tokens * p.depth; ++i) {
    if (p.ranks[i] >= 0 && p.ranks[i] < p.num_experts) continue;
    refuse(op, "'ranks' holds ", p.ranks[i], " at token ", i / p.depth, ", rank ", i % p.depth, "; expected 0 to ",
           p.num_experts - 1);
  }
  for (int64_t s = 0; s < p.subsets; ++s) {
    int64_t dropped = 0;
    for (int64_t e = 0; e < p.num_experts; ++e) dropped += !p.keep[s * p.num_experts + e];
    if (dropped <= p.depth - p.top_k) continue;
    refuse(op, "'keep' drops ", dropped, " experts in subset ", s, "; the ", p.depth,
           " ranks of a token leave top_k = ", p.top_k, " experts for up to ", p.depth - p.top_k);
  }
}

}  // namespace moe_ext
