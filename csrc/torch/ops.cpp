// Operators of the torch namespace `moe_ext`: schemas and argument checks on torch's ABI-stable API, so that one binary
// runs on every torch from 2.10 on. The only file that knows torch and every operator; it contains no arithmetic. Every
// check runs before a kernel does, names the argument, and says what was expected and what came.
#pragma GCC diagnostic push  // unused parameters in the headers of torch 2.13
#pragma GCC diagnostic ignored "-Wunused-parameter"
#ifdef MOE_EXT_WITH_CUDA
#define USE_CUDA  // shows aoti_torch_get_current_cuda_stream
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#pragma GCC diagnostic pop

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "moe.h"

namespace moe_ext {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

// ---- messages

template <typename... Parts>
[[noreturn]] void refuse(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string text_of(const Shape& shape) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < shape.size(); ++i) text << (i == 0 ? "" : ", ") << shape[i];
  text << (shape.size() == 1 ? ",)" : ")");
  return text.str();
}

const char* text_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

// ---- checks

void check_dims(const char* op, const char* name, const Tensor& tensor, int64_t dims, const char* meaning) {
  if (tensor.dim() != dims) {
    refuse(op, "'", name, "' has shape ", text_of(shape_of(tensor)), "; expected ", dims, " dimensions ", meaning);
  }
}

void check_shape(const char* op, const char* name, const Tensor& tensor, const Shape& expected, const char* meaning) {
  const Shape got = shape_of(tensor);
  if (got != expected) {
    refuse(op, "'", name, "' has shape ", text_of(got), "; expected ", text_of(expected), " = ", meaning);
  }
}

void check_type(const char* op, const char* name, const Tensor& tensor, const std::vector<ScalarType>& allowed) {
  const ScalarType got = tensor.scalar_type();
  std::string expected;
  for (const ScalarType type : allowed) {
    if (type == got) return;
    expected += (expected.empty() ? "" : " or ") + std::string(text_of(type));
  }
  refuse(op, "'", name, "' has dtype ", text_of(got), "; expected ", expected);
}

std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device());
  return "another device";
}

void check_device(const char* op, const char* name, const Tensor& tensor, const char* first_name, const Tensor& first) {
  const std::string expected = device_of(first), got = device_of(tensor);
  if (got != expected) {
    refuse(op, "'", name, "' is on ", got, "; expected ", expected, " like '", first_name, "'");
  }
}

void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.is_contiguous()) refuse(op, "'", name, "' is not contiguous; pass ", name, ".contiguous()");
}

DType float_type(const char* op, const char* name, const Tensor& tensor) {
  check_type(op, name, tensor, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

Activation activation_named(const char* op, const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGeluErf;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  refuse(op, "'activation' is \"", name, "\"; expected \"silu\", \"gelu\" or \"gelu_tanh\"");
}

// Activations and routing are small: a strided one is copied. Weights are not: they must be contiguous
// (check_contiguous).
Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// x at an odd offset of its storage is copied, so that rows can be read 16 bytes at a time. (Weights are not: odd ones
// take the kernels that read element by element.)
Tensor aligned(const Tensor& tensor) {
  const bool odd = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 != 0;
  return odd ? torch::stable::clone(tensor) : tensor;
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return dense(*tensor);
}

// ---- what the kernels get from torch: its threads on the CPU; on CUDA its stream and its memory

void run_on_torch_threads(int64_t workers, void (*body)(void*), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    // A pool smaller than `workers` gives one call several indices: one body call drains the shared queue for all.
    if (begin < end) body(context);
  });
}

Threads torch_threads() { return {static_cast<int64_t>(torch::stable::get_num_threads()), run_on_torch_threads}; }

#ifdef MOE_EXT_WITH_CUDA

// Makes a tensor's device the current one; its current stream is what the kernels run on.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard_(static_cast<int32_t>(tensor.get_device())) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(static_cast<int32_t>(tensor.get_device()), &stream));
    stream_ = static_cast<CUstream_st*>(stream);
  }
  CUstream_st* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  CUstream_st* stream_ = nullptr;
};

// Memory from torch's caching allocator, given back in stream order when this goes.
class TorchScratch {
 public:
  explicit TorchScratch(const Tensor& like) : like_(like) {}
  cuda::Scratch scratch() {
    return {this, [](void* context, int64_t bytes) { return static_cast<TorchScratch*>(context)->allocate(bytes); }};
  }

 private:
  void* allocate(int64_t bytes) {
    tensors_.push_back(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte));
    return tensors_.back().mutable_data_ptr();
  }

  const Tensor& like_;
  std::vector<Tensor> tensors_;
};

#endif

// ---- route

struct RouteShape {
  int64_t tokens;
  int64_t num_experts;
};

RouteShape check_route(const Tensor& logits, int64_t top_k, const std::optional<Tensor>& thresholds) {
  constexpr const char* op = "route";
  check_dims(op, "logits", logits, 2, "(T, E)");
  const RouteShape shape{logits.size(0), logits.size(1)};
  if (top_k < 1 || top_k > shape.num_experts) {
    refuse(op, "'top_k' is ", top_k, "; expected 1 to ", shape.num_experts, ", the number of experts in 'logits'");
  }
  if (thresholds.has_value()) {
    check_shape(op, "thresholds", *thresholds, {top_k - 1}, "(top_k - 1,)");
    check_type(op, "thresholds", *thresholds, {ScalarType::Float});
  }
  return shape;
}

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t top_k, std::optional<Tensor> thresholds,
                                 bool renormalise) {
  constexpr const char* op = "route";
  const RouteShape shape = check_route(logits, top_k, thresholds);
  const DType dtype = float_type(op, "logits", logits);
  if (thresholds.has_value()) check_device(op, "thresholds", *thresholds, "logits", logits);
  if (logits.is_cuda() && shape.num_experts > cuda::kMaxRoutedExperts) {
    refuse(op, "'logits' has ", shape.num_experts, " experts; the CUDA kernel takes up to ", cuda::kMaxRoutedExperts);
  }

  const Tensor dense_logits = dense(logits);
  const std::optional<Tensor> dense_thresholds = dense(thresholds);
  const Tensor weights = torch::stable::new_empty(logits, {shape.tokens, top_k}, ScalarType::Float);
  const Tensor experts = torch::stable::new_empty(logits, {shape.tokens, top_k}, ScalarType::Long);

  RouteParams p{};
  p.logits = dense_logits.const_data_ptr();
  p.thresholds = dense_thresholds.has_value() ? static_cast<const float*>(dense_thresholds->const_data_ptr()) : nullptr;
  p.weights = static_cast<float*>(weights.mutable_data_ptr());
  p.experts = static_cast<int64_t*>(experts.mutable_data_ptr());
  p.tokens = shape.tokens;
  p.num_experts = shape.num_experts;
  p.top_k = top_k;
  p.dtype = dtype;
  p.renormalise = renormalise;
#ifdef MOE_EXT_WITH_CUDA
  if (logits.is_cuda()) {
    const OnDeviceOf device(logits);
    cuda::route(p, device.stream());
    return {weights, experts};
  }
#endif
  cpu::route(p, torch_threads());
  return {weights, experts};
}

// ---- experts, experts_observed

// What the operators on a layer's weights share: the shapes, dtypes and layout of x, gate_up and down.
ExpertsParams check_layer(const char* op, const Tensor& x, const Tensor& gate_up, const Tensor& down,
                          const std::string& activation) {
  check_dims(op, "x", x, 2, "(T, H)");
  check_dims(op, "gate_up", gate_up, 3, "(E, 2I, H)");

  ExpertsParams p{};
  p.tokens = x.size(0);
  p.hidden = x.size(1);
  p.num_experts = gate_up.size(0);
  p.intermediate = gate_up.size(1) / 2;
  if (p.num_experts < 1 || p.intermediate < 1 || p.hidden < 1 || gate_up.size(1) % 2 != 0) {
    refuse(op, "'gate_up' has shape ", text_of(shape_of(gate_up)),
           "; expected (E, 2I, H) with an even second dimension and none of them 0");
  }
  check_shape(op, "gate_up", gate_up, {p.num_experts, 2 * p.intermediate, p.hidden}, "(E, 2I, H) with H from 'x'");
  check_shape(op, "down", down, {p.num_experts, p.hidden, p.intermediate}, "(E, H, I) from 'gate_up'");

  p.dtype = float_type(op, "x", x);
  check_type(op, "gate_up", gate_up, {x.scalar_type()});
  check_type(op, "down", down, {x.scalar_type()});
  check_contiguous(op, "gate_up", gate_up);
  check_contiguous(op, "down", down);
  check_device(op, "gate_up", gate_up, "x", x);
  check_device(op, "down", down, "x", x);
  p.activation = activation_named(op, activation);
  if (x.is_cuda() && p.num_experts > cuda::kMaxExperts) {
    refuse(op, "'gate_up' has ", p.num_experts, " experts; the CUDA kernels take up to ", cuda::kMaxExperts);
  }
  return p;
}

ExpertsParams check_experts(const char* op, const Tensor& x, const Tensor& gate_up, const Tensor& down,
                            const Tensor& experts, const Tensor& weights, const std::string& activation) {
  ExpertsParams p = check_layer(op, x, gate_up, down, activation);
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

void check_observation(const char* op, const ExpertsParams& p, const Tensor& moments,
                       const std::optional<Tensor>& counted) {
  check_shape(op, "moments", moments, {p.num_experts, 3, 3}, "(E, 3, 3) with E from 'gate_up'");
  check_type(op, "moments", moments, {ScalarType::Double});
  check_contiguous(op, "moments", moments);
  if (counted.has_value()) {
    check_shape(op, "counted", *counted, {p.tokens}, "(T,) with T from 'x'");
    check_type(op, "counted", *counted, {ScalarType::Bool});
  }
}

void check_expert_range(const char* op, const ExpertsParams& p) {
  const int64_t bad = cpu::first_bad_expert(p.experts, p.experts_are_int64, p.tokens * p.top_k, p.num_experts);
  if (bad < 0) return;
  refuse(op, "'experts' holds ",
         p.experts_are_int64 ? static_cast<const int64_t*>(p.experts)[bad]
                             : int64_t{static_cast<const int32_t*>(p.experts)[bad]},
         " at token ", bad / p.top_k, ", slot ", bad % p.top_k, "; expected 0 to ", p.num_experts,
         " (that one marks an empty slot)");
}

Tensor run_experts(const char* op, const Tensor& x, const Tensor& gate_up, const Tensor& down, const Tensor& experts,
                   const Tensor& weights, const std::string& activation, const Tensor* moments,
                   const std::optional<Tensor>& counted) {
  ExpertsParams p = check_experts(op, x, gate_up, down, experts, weights, activation);
  if (moments != nullptr) {
    check_observation(op, p, *moments, counted);
    check_device(op, "moments", *moments, "x", x);
    if (counted.has_value()) check_device(op, "counted", *counted, "x", x);
  }

  const Tensor dense_x = x.is_cuda() ? aligned(dense(x)) : dense(x);
  const Tensor dense_experts = dense(experts);
  const Tensor dense_weights = dense(weights);
  const std::optional<Tensor> dense_counted = dense(counted);
  p.x = dense_x.const_data_ptr();
  p.gate_up = gate_up.const_data_ptr();
  p.down = down.const_data_ptr();
  p.experts = dense_experts.const_data_ptr();
  p.weights = dense_weights.const_data_ptr();
  p.moments = moments != nullptr ? static_cast<double*>(moments->mutable_data_ptr()) : nullptr;
  p.counted = dense_counted.has_value() ? static_cast<const bool*>(dense_counted->const_data_ptr()) : nullptr;
  if (x.is_cpu()) check_expert_range(op, p);  // on CUDA the kernels assert it: the host does not wait for them

  const Tensor out = torch::stable::new_empty(x, {p.tokens, p.hidden});
  p.out = out.mutable_data_ptr();
#ifdef MOE_EXT_WITH_CUDA
  if (x.is_cuda()) {
    const OnDeviceOf device(x);
    TorchScratch memory(x);
    cuda::experts(p, memory.scratch(), device.stream());
    return out;
  }
#endif
  cpu::experts(p, torch_threads());
  return out;
}

Tensor experts(const Tensor& x, const Tensor& gate_up, const Tensor& down, const Tensor& experts, const Tensor& weights,
               std::string activation) {
  return run_experts("experts", x, gate_up, down, experts, weights, activation, nullptr, std::nullopt);
}

Tensor experts_observed(const Tensor& x, const Tensor& gate_up, const Tensor& down, const Tensor& experts,
                        const Tensor& weights, std::string activation, const Tensor& moments,
                        std::optional<Tensor> counted) {
  return run_experts("experts_observed", x, gate_up, down, experts, weights, activation, &moments, counted);
}

// ---- expert_gram

Tensor expert_gram(const Tensor& x, const Tensor& gate_up, const Tensor& down, std::string activation) {
  const ExpertsParams layer = check_layer("expert_gram", x, gate_up, down, activation);
  const Tensor dense_x = x.is_cuda() ? aligned(dense(x)) : dense(x);
  const Tensor gram =
      torch::stable::new_empty(x, {layer.tokens, layer.num_experts, layer.num_experts}, ScalarType::Double);

  GramParams p{};
  p.x = dense_x.const_data_ptr();
  p.gate_up = gate_up.const_data_ptr();
  p.down = down.const_data_ptr();
  p.gram = static_cast<double*>(gram.mutable_data_ptr());
  p.tokens = layer.tokens;
  p.num_experts = layer.num_experts;
  p.hidden = layer.hidden;
  p.intermediate = layer.intermediate;
  p.dtype = layer.dtype;
  p.activation = layer.activation;
#ifdef MOE_EXT_WITH_CUDA
  if (x.is_cuda()) {
    const OnDeviceOf device(x);
    TorchScratch memory(x);
    cuda::gram(p, memory.scratch(), device.stream());
    return gram;
  }
#endif
  cpu::gram(p, torch_threads());
  return gram;
}

// ---- subset_errors

void check_subset_values(const char* op, const SubsetsParams& p) {
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

Tensor subset_errors(const Tensor& distances, const Tensor& ranks, const Tensor& scores, const Tensor& keep,
                     int64_t top_k, std::optional<Tensor> thresholds) {
  constexpr const char* op = "subset_errors";
  check_dims(op, "ranks", ranks, 2, "(T, N)");
  check_dims(op, "keep", keep, 2, "(S, E)");
  SubsetsParams p{};
  p.tokens = ranks.size(0);
  p.depth = ranks.size(1);
  p.subsets = keep.size(0);
  p.num_experts = keep.size(1);
  p.top_k = top_k;
  check_shape(op, "distances", distances, {p.tokens, p.depth * (p.depth - 1) / 2},
              "(T, N (N - 1) / 2) with T and N from 'ranks'");
  check_shape(op, "scores", scores, {p.tokens, p.depth}, "(T, N) from 'ranks'");
  check_type(op, "distances", distances, {ScalarType::Double});
  check_type(op, "ranks", ranks, {ScalarType::Long});
  check_type(op, "scores", scores, {ScalarType::Double});
  check_type(op, "keep", keep, {ScalarType::Bool});
  if (top_k < 1 || top_k > p.depth) {
    refuse(op, "'top_k' is ", top_k, "; expected 1 to ", p.depth, ", the number of ranks in 'ranks'");
  }
  if (thresholds.has_value()) {
    check_shape(op, "thresholds", *thresholds, {top_k - 1}, "(top_k - 1,)");
    check_type(op, "thresholds", *thresholds, {ScalarType::Float});
  }

  const Tensor dense_distances = dense(distances), dense_ranks = dense(ranks), dense_scores = dense(scores);
  const Tensor dense_keep = dense(keep);
  const std::optional<Tensor> dense_thresholds = dense(thresholds);
  p.distances = static_cast<const double*>(dense_distances.const_data_ptr());
  p.ranks = static_cast<const int64_t*>(dense_ranks.const_data_ptr());
  p.scores = static_cast<const double*>(dense_scores.const_data_ptr());
  p.keep = static_cast<const bool*>(dense_keep.const_data_ptr());
  p.thresholds = dense_thresholds.has_value() ? static_cast<const float*>(dense_thresholds->const_data_ptr()) : nullptr;
  check_subset_values(op, p);
  const Tensor errors = torch::stable::new_empty(scores, {p.subsets});
  p.errors = static_cast<double*>(errors.mutable_data_ptr());
  cpu::subset_errors(p, torch_threads());
  return errors;
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY(moe_ext, m) {
  m.def("route(Tensor logits, int top_k, Tensor? thresholds=None, bool renormalise=True) -> (Tensor, Tensor)");
  m.def("experts(Tensor x, Tensor gate_up, Tensor down, Tensor experts, Tensor weights, str activation) -> Tensor");
  m.def(
      "experts_observed(Tensor x, Tensor gate_up, Tensor down, Tensor experts, Tensor weights, str activation, "
      "Tensor(a!) moments, Tensor? counted=None) -> Tensor");
  m.def("expert_gram(Tensor x, Tensor gate_up, Tensor down, str activation) -> Tensor");
  m.def(
      "subset_errors(Tensor distances, Tensor ranks, Tensor scores, Tensor keep, int top_k, Tensor? thresholds=None) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("route", TORCH_BOX(&moe_ext::route));
  m.impl("experts", TORCH_BOX(&moe_ext::experts));
  m.impl("experts_observed", TORCH_BOX(&moe_ext::experts_observed));
  m.impl("expert_gram", TORCH_BOX(&moe_ext::expert_gram));
  m.impl("subset_errors", TORCH_BOX(&moe_ext::subset_errors));
}

#ifdef MOE_EXT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) {
  m.impl("route", TORCH_BOX(&moe_ext::route));
  m.impl("experts", TORCH_BOX(&moe_ext::experts));
  m.impl("experts_observed", TORCH_BOX(&moe_ext::experts_observed));
  m.impl("expert_gram", TORCH_BOX(&moe_ext::expert_gram));
}
#endif
