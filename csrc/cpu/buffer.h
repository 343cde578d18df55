// Uninitialised memory that starts a cache line: what vectors are loaded from and stored to.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace moe_ext::cpu {

class Buffer {
 public:
  explicit Buffer(int64_t bytes = 0) : data_(static_cast<char*>(::operator new(static_cast<size_t>(bytes), kLine))) {}
  char* bytes() const { return data_.get(); }
  float* floats() const { return reinterpret_cast<float*>(data_.get()); }
  double* doubles() const { return reinterpret_cast<double*>(data_.get()); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(char* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<char[], Free> data_;
};

}  // namespace moe_ext::cpu
