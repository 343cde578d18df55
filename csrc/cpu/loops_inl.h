// Bodies of the loops declared in loops.h. Each loops_*.cpp defines MOE_EXT_ISA (a namespace name) and includes this
// once. No standard C++ headers with functions here: one instantiated for AVX-512 must not become the program's only
// copy.
#include <math.h>
#include <type_traits>

#include "cpu/loops.h"
#include "cpu/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

// Tile heights: accumulators (rows * 4) + 4 weight vectors + 1 activation vector stay within the register file.
#if defined(MOE_EXT_ISA_AVX512)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 2;
#endif

// out[m][n] = a[m] . b[n] over k elements.
template <int M, int N, typename W>
static inline void dot_tile(const float* const* a, const W* const* b, int64_t k, float (&out)[M][N]) {
  Vec acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[m][n] = Vec::zero();
  }
  int64_t i = 0;
  for (; i + Vec::kLanes <= k; i += Vec::kLanes) {
    Vec bv[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) bv[n] = Vec::load(b[n] + i);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec av = Vec::load(a[m] + i);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] = fma(av, bv[n], acc[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float sum = acc[m][n].sum();
      for (int64_t j = i; j < k; ++j) sum += a[m][j] * to_float(b[n][j]);
      out[m][n] = sum;
    }
  }
}

static inline Vec apply(Activation activation, Vec x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (Vec::all(1.0f) + exp(Vec::zero() - x));
    case Activation::kGeluTanh: {
      const Vec inner = x * fma(Vec::all(0.044715f) * x, x, Vec::all(1.0f)) * Vec::all(0.79788456080286536f);
      const Vec tanh = Vec::all(1.0f) - Vec::all(2.0f) / (exp(inner + inner) + Vec::all(1.0f));
      return Vec::all(0.5f) * x * (Vec::all(1.0f) + tanh);
    }
    case Activation::kGeluErf: {
      float lanes[Vec::kLanes];
      x.store(lanes);
      for (float& lane : lanes) lane = 0.5f * lane * (1.0f + erff(lane * 0.70710678118654752f));
      return Vec::load(lanes);
    }
  }
  return x;
}

// gate[i] = act(gate[i]) * up[i] over whole vectors: both arrays hold kColumnBlock elements.
static inline void apply_gate(Activation activation, float* gate, const float* up, int64_t columns) {
  static_assert(kColumnBlock % Vec::kLanes == 0, "a block is whole vectors");
  for (int64_t i = 0; i < columns; i += Vec::kLanes) {
    (apply(activation, Vec::load(gate + i)) * Vec::load(up + i)).store(gate + i);
  }
}

template <int M, typename W>
static void gate_up_rows(Activation activation, const float* const* rows, const W* gate, const W* up, int64_t columns,
                         int64_t hidden, float* h, int64_t h_stride) {
  float gates[M][kColumnBlock] = {};  // zero beyond `columns`, where the activation also runs
  float ups[M][kColumnBlock] = {};
  int64_t i = 0;
  for (; i + 2 <= columns; i += 2) {
    const W* b[4] = {gate + i * hidden, gate + (i + 1) * hidden, up + i * hidden, up + (i + 1) * hidden};
    float out[M][4];
    dot_tile<M, 4>(rows, b, hidden, out);
    for (int m = 0; m < M; ++m) {
      gates[m][i] = out[m][0];
      gates[m][i + 1] = out[m][1];
      ups[m][i] = out[m][2];
      ups[m][i + 1] = out[m][3];
    }
  }
  if (i < columns) {
    const W* b[2] = {gate + i * hidden, up + i * hidden};
    float out[M][2];
    dot_tile<M, 2>(rows, b, hidden, out);
    for (int m = 0; m < M; ++m) {
      gates[m][i] = out[m][0];
      ups[m][i] = out[m][1];
    }
  }
  for (int m = 0; m < M; ++m) {
    apply_gate(activation, gates[m], ups[m], columns);
    for (int64_t j = 0; j < columns; ++j) h[m * h_stride + j] = gates[m][j];
  }
}

template <int M, typename W>
static void down_rows(const float* h, const W* down, int64_t columns, int64_t intermediate, float* y,
                      int64_t y_stride) {
  const float* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = h + m * intermediate;
  int64_t i = 0;
  for (; i + 4 <= columns; i += 4) {
    const W* first = down + i * intermediate;
    const W* b[4] = {first, first + intermediate, first + 2 * intermediate, first + 3 * intermediate};
    float out[M][4];
    dot_tile<M, 4>(rows, b, intermediate, out);
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < 4; ++n) y[m * y_stride + i + n] = out[m][n];
    }
  }
  for (; i < columns; ++i) {
    const W* b[1] = {down + i * intermediate};
    float out[M][1];
    dot_tile<M, 1>(rows, b, intermediate, out);
    for (int m = 0; m < M; ++m) y[m * y_stride + i] = out[m][0];
  }
}

// Calls f.template run<M>(first_row) for tiles of kTileRows rows and one smaller tile for the rest.
template <int M, typename F>
static inline void rest_tile(int64_t first, int64_t rest, const F& f) {
  if constexpr (M > 0) {
    if (rest == M) {
      f.template run<M>(first);
    } else {
      rest_tile<M - 1>(first, rest, f);
    }
  }
}

template <typename F>
static inline void for_each_tile(int64_t row_count, const F& f) {
  int64_t first = 0;
  for (; first + kTileRows <= row_count; first += kTileRows) f.template run<kTileRows>(first);
  rest_tile<kTileRows - 1>(first, row_count - first, f);
}

template <typename W>
struct GateUpTiles {
  Activation activation;
  const float* const* rows;
  const W* gate;
  const W* up;
  int64_t columns;
  int64_t hidden;
  float* h;
  int64_t h_stride;

  template <int M>
  void run(int64_t first) const {
    gate_up_rows<M>(activation, rows + first, gate, up, columns, hidden, h + first * h_stride, h_stride);
  }
};

template <typename W>
struct DownTiles {
  const float* h;
  const W* down;
  int64_t columns;
  int64_t intermediate;
  float* y;
  int64_t y_stride;

  template <int M>
  void run(int64_t first) const {
    down_rows<M>(h + first * intermediate, down, columns, intermediate, y + first * y_stride, y_stride);
  }
};

// Calls f(typed null pointer) for the C++ type of `dtype`.
template <typename F>
static inline void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
  }
}

template <typename Pointer>
using Pointee = std::remove_pointer_t<Pointer>;

static void gate_up(DType dtype, Activation activation, const float* const* rows, int64_t row_count, const void* gate,
                    const void* up, int64_t columns, int64_t hidden, float* h, int64_t h_stride) {
  with_type(dtype, [&](auto* type) {
    using W = Pointee<decltype(type)>;
    for_each_tile(row_count, GateUpTiles<W>{activation, rows, static_cast<const W*>(gate), static_cast<const W*>(up),
                                            columns, hidden, h, h_stride});
  });
}

static void down(DType dtype, const float* h, int64_t row_count, const void* weight, int64_t columns,
                 int64_t intermediate, float* y, int64_t y_stride) {
  with_type(dtype, [&](auto* type) {
    using W = Pointee<decltype(type)>;
    for_each_tile(row_count, DownTiles<W>{h, static_cast<const W*>(weight), columns, intermediate, y, y_stride});
  });
}

static void widen(DType dtype, const void* src, float* dst, int64_t n) {
  with_type(dtype, [&](auto* type) {
    const auto* typed = static_cast<const Pointee<decltype(type)>*>(src);
    int64_t i = 0;
    for (; i + Vec::kLanes <= n; i += Vec::kLanes) Vec::load(typed + i).store(dst + i);
    for (; i < n; ++i) dst[i] = to_float(typed[i]);
  });
}

static void narrow(DType dtype, const float* src, void* dst, int64_t n) {
  with_type(dtype, [&](auto* type) {
    auto* typed = static_cast<decltype(type)>(dst);
    int64_t i = 0;
    for (; i + Vec::kLanes <= n; i += Vec::kLanes) store(Vec::load(src + i), typed + i);
    for (; i < n; ++i) from_float(src[i], typed + i);
  });
}

template <bool kObserve>
static inline float accumulate_row(float weight, const float* y, float* sum, int64_t n) {
  const Vec scale = Vec::all(weight);
  Vec squares = Vec::zero();
  int64_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) {
    const Vec value = Vec::load(y + i);
    fma(scale, value, Vec::load(sum + i)).store(sum + i);
    if (kObserve) squares = fma(value, value, squares);
  }
  float total = squares.sum();
  for (; i < n; ++i) {
    sum[i] += weight * y[i];
    if (kObserve) total += y[i] * y[i];
  }
  return total;
}

static float accumulate(float weight, const float* y, float* sum, int64_t n, bool observe) {
  return observe ? accumulate_row<true>(weight, y, sum, n) : accumulate_row<false>(weight, y, sum, n);
}

static constexpr Loops kLoops = {widen, gate_up, down, accumulate, narrow};

}  // namespace moe_ext::cpu::MOE_EXT_ISA
