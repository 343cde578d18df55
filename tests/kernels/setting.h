// What the kernel tests share: threads to run on, instruction sets to run with, arrays of the three dtypes.
#pragma once

#include <stdlib.h>

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/numeric.h"
#include "moe.h"

namespace setting {

using moe_ext::DType;
using moe_ext::Threads;

inline constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

inline const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

// Half a unit in the last place, relative, and the smallest absolute error where the dtype has subnormals.
inline double rounding(DType dtype) {
  return dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
}
inline double smallest(DType dtype) { return dtype == DType::kFloat16 ? 0x1p-25 : 0.0; }

// ---- threads

// Says that it has `count` threads and then gives one: what a busy pool may do.
inline Threads serial(int64_t count = 1) {
  return {count, [](int64_t, void (*body)(void*), void* context) { body(context); }};
}

inline Threads std_threads(int64_t count) {
  return {count, [](int64_t workers, void (*body)(void*), void* context) {
            std::vector<std::thread> started;
            for (int64_t worker = 1; worker < workers; ++worker) started.emplace_back(body, context);
            body(context);
            for (std::thread& thread : started) thread.join();
          }};
}

// ---- instruction sets

// Sets MOE_EXT_ISA while it lives.
class ForcedIsa {
 public:
  explicit ForcedIsa(const std::string& name) { setenv("MOE_EXT_ISA", name.c_str(), 1); }
  ~ForcedIsa() { unsetenv("MOE_EXT_ISA"); }
  ForcedIsa(const ForcedIsa&) = delete;
  ForcedIsa& operator=(const ForcedIsa&) = delete;
};

// Calls body(name) with every instruction set that runs here in force.
template <typename Body>
void with_every_isa(const Body& body) {
  for (int isa = 0; isa < moe_ext::cpu::kIsaCount; ++isa) {
    if (!moe_ext::cpu::isa_runs_here(isa)) continue;
    const ForcedIsa forced(moe_ext::cpu::isa_name(isa));
    body(moe_ext::cpu::isa_name(isa));
  }
}

// ---- arrays

// A float32, bfloat16 or float16 array of exactly the size asked for, so that a sanitizer sees any access beyond it.
class Array {
 public:
  Array(DType dtype, int64_t size) : dtype_(dtype), bytes_(static_cast<size_t>(size) * element_size()) {}

  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  const std::vector<char>& bytes() const { return bytes_; }
  int64_t size() const { return static_cast<int64_t>(bytes_.size() / element_size()); }

  float operator[](int64_t index) const {
    switch (dtype_) {
      case DType::kFloat32:
        return read<float>(index);
      case DType::kBFloat16:
        return read<moe_ext::cpu::BFloat16>(index);
      default:
        return read<moe_ext::cpu::Float16>(index);
    }
  }

  void set(int64_t index, float value) {
    switch (dtype_) {
      case DType::kFloat32:
        return write<float>(index, value);
      case DType::kBFloat16:
        return write<moe_ext::cpu::BFloat16>(index, value);
      default:
        return write<moe_ext::cpu::Float16>(index, value);
    }
  }

 private:
  size_t element_size() const { return dtype_ == DType::kFloat32 ? 4 : 2; }

  template <typename T>
  float read(int64_t index) const {
    T value;
    std::memcpy(&value, bytes_.data() + index * sizeof(T), sizeof(T));
    return moe_ext::cpu::to_float(value);
  }

  template <typename T>
  void write(int64_t index, float number) {
    T value;
    moe_ext::cpu::from_float(number, &value);
    std::memcpy(bytes_.data() + index * sizeof(T), &value, sizeof(T));
  }

  DType dtype_;
  std::vector<char> bytes_;
};

// mt19937 gives the same numbers everywhere; the standard's distributions do not.
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}

  uint32_t bits() { return static_cast<uint32_t>(engine_()); }
  int64_t below(int64_t bound) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(bound)); }
  float between(float low, float high) { return low + (high - low) * static_cast<float>(bits() >> 8) * 0x1p-24f; }

  Array array(DType dtype, int64_t size, float bound) {
    Array values(dtype, size);
    for (int64_t i = 0; i < size; ++i) values.set(i, between(-bound, bound));
    return values;
  }

 private:
  std::mt19937 engine_;
};

}  // namespace setting
