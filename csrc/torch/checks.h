// Checks of one argument: its shape, dtype, device, layout or name. A refusal is a std::runtime_error that names
// operator and argument and says what was expected and what came.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "moe.h"
#include "torch/stable_torch.h"

namespace moe_ext {

using Shape = std::vector<int64_t>;

// ---- messages

template <typename... Parts>
[[noreturn]] inline void refuse(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline std::string text_of(const Shape& shape) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < shape.size(); ++i) text << (i == 0 ? "" : ", ") << shape[i];
  text << (shape.size() == 1 ? ",)" : ")");
  return text.str();
}

inline const char* text_of(ScalarType type) {
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
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    default:
      return "another dtype";
  }
}

inline Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

// make(), which does nothing but take memory from torch and fill it; refused with what it was for where there is none.
// torch's ABI-stable API gives no reason of a failure.
template <typename Make, typename... Parts>
Tensor with_memory(const Make& make, const char* op, const Parts&... what) {
  try {
    return make();
  } catch (const std::exception&) {
    refuse(op, "torch gave no memory for ", what...);
  }
}

// ---- checks

inline void check_dims(const char* op, const char* name, const Tensor& tensor, int64_t dims, const char* meaning) {
  if (tensor.dim() != dims) {
    refuse(op, "'", name, "' has shape ", text_of(shape_of(tensor)), "; expected ", dims, " dimensions ", meaning);
  }
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, const Shape& expected,
                        const char* meaning) {
  const Shape got = shape_of(tensor);
  if (got != expected) {
    refuse(op, "'", name, "' has shape ", text_of(got), "; expected ", text_of(expected), " = ", meaning);
  }
}

inline void check_type(const char* op, const char* name, const Tensor& tensor, const std::vector<ScalarType>& allowed) {
  const ScalarType got = tensor.scalar_type();
  std::string expected;
  for (const ScalarType type : allowed) {
    if (type == got) return;
    expected += (expected.empty() ? "" : " or ") + std::string(text_of(type));
  }
  refuse(op, "'", name, "' has dtype ", text_of(got), "; expected ", expected);
}

inline std::string device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device());
  return "another device";
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const char* first_name,
                         const Tensor& first) {
  const std::string expected = device_of(first), got = device_of(tensor);
  if (got != expected) {
    refuse(op, "'", name, "' is on ", got, "; expected ", expected, " like '", first_name, "'");
  }
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.is_contiguous()) refuse(op, "'", name, "' is not contiguous; pass ", name, ".contiguous()");
}

inline DType float_type(const char* op, const char* name, const Tensor& tensor) {
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

inline Activation activation_named(const char* op, const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGeluErf;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu2") return Activation::kRelu2;
  refuse(op, "'activation' is \"", name.substr(0, 80), "\"; expected \"silu\", \"gelu\", \"gelu_tanh\" or \"relu2\"");
}

inline Score score_named(const char* op, const std::string& name) {
  if (name == "softmax") return Score::kSoftmax;
  if (name == "sigmoid") return Score::kSigmoid;
  if (name == "sqrtsoftplus") return Score::kSqrtSoftplus;
  refuse(op, "'score' is \"", name.substr(0, 80), "\"; expected \"softmax\", \"sigmoid\" or \"sqrtsoftplus\"");
}

inline WeightType weight_type_named(const char* op, const std::string& name) {
  if (name == "int8") return WeightType::kInt8;
  if (name == "int4") return WeightType::kInt4;
  if (name == "fp8") return WeightType::kFloat8;
  if (name == "mxfp4") return WeightType::kMxfp4;
  refuse(op, "'weight_type' is \"", name.substr(0, 80), "\"; expected \"int8\", \"int4\", \"fp8\" or \"mxfp4\"");
}

}  // namespace moe_ext
