// Bodies of the loops declared in loops.h. avx512.cpp and its like define MOE_EXT_ISA (a namespace name) and include
// this once. No standard C++ headers with functions here: one instantiated for AVX-512 must not become the program's
// only copy.
#include <math.h>
#include <type_traits>

#include "cpu/vector/dot.h"
#include "cpu/vector/loops.h"
#include "cpu/vector/vec.h"

namespace moe_ext::cpu::MOE_EXT_ISA {

// Tiles of at most kTileRows activation rows times kTileColumns weight rows: kTileRows * kTileColumns accumulators,
// kTileColumns weight vectors and one activation vector stay within the register file.
#if defined(MOE_EXT_ISA_AVX512)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 2;
#endif
constexpr int kTileColumns = 4;
// Twice as many columns where the registers hold them, so few activation rows are there, and where weight rows are so
// short that the pauses between tiles count.
#if defined(MOE_EXT_ISA_AVX512)
constexpr int kWideTileRows = 2;
#else
constexpr int kWideTileRows = 1;
#endif
constexpr int64_t kShortRowBytes = 4096;
constexpr int64_t kLineBytes = 64;
// Beyond so many rows a chunk of them leaves a usual L2, and comes from the last cache for every block.
constexpr int64_t kRowsInL2 = 128;

// A number known at compile time, as a parameter of a generic lambda.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Weights that are multiplied later: `lines` cache lines of each of a tile's rows, one with every step of the
// reduction.
template <typename W>
struct Fetch {
  const W* rows = nullptr;
  int64_t lines = 0;
};

// Instead of a pointer into an activation row that the next tile multiplies, a line of which is fetched with every
// step.
struct NoRowAhead {};

// y[m, n] = or += a[m] . b[n] over k elements; a_stride, b_stride: elements from row to row.
template <int M, int N, typename A, typename W, typename RowAhead>
static inline void dot_tile(const A* a, int64_t a_stride, const W* b, int64_t b_stride, int64_t k, bool add, float* y,
                            Fetch<W> fetch, RowAhead row_ahead) {
  using Dot = DotOf<A, W>;
  Vec acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[m][n] = Vec::zero();
  }
  const auto step = [&] {
    if constexpr (std::is_pointer_v<RowAhead>) {
      __builtin_prefetch(row_ahead, 0, 2);
      row_ahead += Dot::kStep;
    }
    typename Dot::Weight bv[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) bv[n] = Dot::load_weight(b + n * b_stride);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename Dot::Row av = Dot::load_row(a + m * a_stride);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] = Dot::add(acc[m][n], av, bv[n]);
    }
    a += Dot::kStep;
    b += Dot::kStep;
  };
  const int64_t steps = k / Dot::kStep;
  const int64_t fetching = fetch.lines < steps ? fetch.lines : steps;
  const char* line = reinterpret_cast<const char*>(fetch.rows);
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i < fetching; ++i) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) __builtin_prefetch(line + n * b_stride * static_cast<int64_t>(sizeof(W)));
    line += kLineBytes;
    step();
  }
#pragma GCC unroll 4
  for (; i < steps; ++i) step();
  const int64_t rest = k % Dot::kStep;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    float sums[N];
    if constexpr (N % 4 == 0) {
#pragma GCC unroll 8
      for (int n = 0; n < N; n += 4) sums_of(acc[m][n], acc[m][n + 1], acc[m][n + 2], acc[m][n + 3], sums + n);
    } else {
      for (int n = 0; n < N; ++n) sums[n] = acc[m][n].sum();
    }
    for (int64_t j = 0; j < rest; ++j) {
      for (int n = 0; n < N; ++n) sums[n] += to_float(a[m * a_stride + j]) * to_float(b[n * b_stride + j]);
    }
    float* out = y + m * kBlockColumns;
    if (add) {
      for (int n = 0; n < N; ++n) out[n] += sums[n];
    } else {
      for (int n = 0; n < N; ++n) out[n] = sums[n];
    }
  }
}

// A typed Product, and the orders in which its tiles are computed. All cut rows into the same chunks and add the
// chunks' sums in order: they give the same bits.
template <typename A, typename W>
struct Block {
  static constexpr int64_t kChunk = kChunkBytes / static_cast<int64_t>(sizeof(A));

  const Product& p;

  static const W* weight_row(const WeightRows& weights, int64_t n, int64_t k) {
    return n < weights.split ? static_cast<const W*>(weights.first) + n * k
                             : static_cast<const W*>(weights.second) + (n - weights.split) * k;
  }
  int64_t chunk_at(int64_t first) const { return p.k - first < kChunk ? p.k - first : kChunk; }
  static int64_t lines(int64_t elements) {
    return (elements * static_cast<int64_t>(sizeof(W)) + kLineBytes - 1) / kLineBytes;
  }

  // `count` lines from line `from` on of the chunk at `first` of weight rows [n, n + kTileColumns).
  Fetch<W> fetch_of(const WeightRows& weights, int64_t n, int64_t first, int64_t from, int64_t count) const {
    if (weights.first == nullptr) return {};
    return {weight_row(weights, n, p.k) + first + from * (kLineBytes / static_cast<int64_t>(sizeof(W))), count};
  }

  // Rows [row, row + M) against columns [n, n + N), over the chunk at `first`.
  template <int M, int N, typename RowAhead>
  void tile(int64_t row, int64_t n, int64_t first, Fetch<W> fetch, RowAhead row_ahead) const {
    dot_tile<M, N>(static_cast<const A*>(p.rows) + row * p.k + first, p.k, weight_row(p.weights, n, p.k) + first, p.k,
                   chunk_at(first), first > 0, p.y + row * kBlockColumns + n, fetch, row_ahead);
  }

  // Calls f(n, width) for tiles of columns: kWidest, kTileColumns or 1 wide, none with rows from both sides of the
  // split.
  template <int kWidest, typename F>
  void for_each_columns(const F& f) const {
    const int64_t split = p.weights.split < p.columns ? p.weights.split : p.columns;
    for (int64_t n = 0; n < p.columns;) {
      const int64_t end = n < split ? split : p.columns;
      if (kWidest > kTileColumns && n + kWidest <= end) {
        f(n, Constant<kWidest>());
        n += kWidest;
      } else if (n + kTileColumns <= end) {
        f(n, Constant<kTileColumns>());
        n += kTileColumns;
      } else {
        f(n, Constant<1>());
        ++n;
      }
    }
  }

  // At most a tile of activation rows: bound by reading the weights. A few weight rows from end to end, while the next
  // few are fetched.
  template <int M>
  void few_rows() const {
    const auto columns = [&](int64_t n, auto width) {
      constexpr int kWidth = decltype(width)::value;
      const bool last = n + 2 * kWidth > p.columns;
      const WeightRows& next = last ? p.next_weights : p.weights;
      for (int64_t first = 0; first < p.k; first += kChunk) {
        const Fetch<W> fetch = this->fetch_of(next, last ? 0 : n + kWidth, first, 0, lines(this->chunk_at(first)));
        this->template tile<M, kWidth>(0, n, first, fetch, NoRowAhead());
      }
    };
    if (M <= kWideTileRows && p.k * static_cast<int64_t>(sizeof(W)) < kShortRowBytes) {
      for_each_columns<2 * kTileColumns>(columns);
    } else {
      for_each_columns<kTileColumns>(columns);
    }
  }

  // Many tiles of activation rows: bound by arithmetic. Chunk by chunk, so that a tile's part of the activations stays
  // in L1 and the block's part of the weights in L2; each tile fetches its share of what comes next, so that the
  // requests are spread evenly.
  template <bool kAhead>
  void many_rows() const {
    const int64_t tiles = (p.row_count + kTileRows - 1) / kTileRows;
    for (int64_t first = 0; first < p.k; first += kChunk) {
      const bool last = first + kChunk >= p.k;
      const WeightRows& next = last ? p.next_weights : p.weights;
      const int64_t next_first = last ? 0 : first + kChunk;
      const int64_t next_lines = lines(chunk_at(next_first));
      for (int64_t t = 0; t < tiles; ++t) {  // of nearly equal heights: a flat last one would waste loads
        const int64_t row = p.row_count * t / tiles, end = p.row_count * (t + 1) / tiles;
        const int64_t from = next_lines * t / tiles, count = next_lines * (t + 1) / tiles - from;
        with_height<kTileRows>(end - row, [&](auto height) {
          this->template for_each_columns<kTileColumns>([&](int64_t n, auto width) {
            const Fetch<W> fetch = this->fetch_of(next, n, next_first, from, count);
            constexpr int kHeight = decltype(height)::value, kWidth = decltype(width)::value;
            if constexpr (kAhead) {
              const int64_t ahead = end + n / kTileColumns;  // a row of the next tile with every tile of columns
              const A* rows = static_cast<const A*>(p.rows) + first;
              this->template tile<kHeight, kWidth>(row, n, first, fetch,
                                                   rows + (ahead < p.row_count ? ahead : row) * p.k);
            } else {
              this->template tile<kHeight, kWidth>(row, n, first, fetch, NoRowAhead());
            }
          });
        });
      }
    }
  }

  // Calls f(Constant<M>) for the M <= kMax that `height` is.
  template <int kMax, typename F>
  static void with_height(int64_t height, const F& f) {
    if constexpr (kMax > 0) {
      if (height == kMax) {
        f(Constant<kMax>());
      } else {
        with_height<kMax - 1>(height, f);
      }
    }
  }

  void run() const {
    if (p.row_count > kRowsInL2) {
      many_rows<true>();
    } else if (p.row_count > kTileRows) {
      many_rows<false>();
    } else {
      with_height<kTileRows>(p.row_count, [&](auto height) { this->template few_rows<decltype(height)::value>(); });
    }
  }
};

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

template <typename H>
static void gate_typed(Activation activation, const float* y, int64_t row_count, int64_t columns, H* h,
                       int64_t h_stride) {
  constexpr int64_t kHalf = kBlockColumns / 2;
  static_assert(kHalf % Vec::kLanes == 0, "half a block is whole vectors");
  for (int64_t r = 0; r < row_count; ++r, y += kBlockColumns, h += h_stride) {
    if (columns == kHalf) {
      for (int64_t i = 0; i < kHalf; i += Vec::kLanes) {
        (apply(activation, Vec::load(y + i)) * Vec::load(y + kHalf + i)).store(h + i);
      }
      continue;
    }
    float gates[kHalf] = {}, ups[kHalf] = {};
    for (int64_t i = 0; i < columns; ++i) {
      gates[i] = y[i];
      ups[i] = y[columns + i];
    }
    for (int64_t i = 0; i < kHalf; i += Vec::kLanes) {
      (apply(activation, Vec::load(gates + i)) * Vec::load(ups + i)).store(gates + i);
    }
    for (int64_t i = 0; i < columns; ++i) from_float(gates[i], h + i);
  }
}

template <bool kObserve>
static void scatter_rows(const float* y, const float* weights, const int64_t* tokens, int64_t row_count,
                         int64_t columns, float* sums, float* squares) {
  for (int64_t r = 0; r < row_count; ++r, y += kBlockColumns) {
    float* sum = sums + tokens[r] * kBlockColumns;
    const Vec scale = Vec::all(weights[r]);
    Vec square = Vec::zero();
    int64_t i = 0;
    for (; i + Vec::kLanes <= columns; i += Vec::kLanes) {
      const Vec value = Vec::load(y + i);
      fma(scale, value, Vec::load(sum + i)).store(sum + i);
      if (kObserve) square = fma(value, value, square);
    }
    float total = kObserve ? square.sum() : 0.0f;
    for (; i < columns; ++i) {
      sum[i] += weights[r] * y[i];
      if (kObserve) total += y[i] * y[i];
    }
    if (kObserve) squares[r] = total;
  }
}

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

static void multiply(DType dtype, const Product& p) {
  with_type(dtype, [&](auto* type) {
    using W = Pointee<decltype(type)>;
    using A = std::conditional_t<kBFloat16Operands && std::is_same_v<W, BFloat16>, BFloat16, float>;
    Block<A, W>{p}.run();
  });
}

static void gate(Activation activation, const float* y, int64_t row_count, int64_t columns, DType operand, void* h,
                 int64_t h_stride) {
  if (operand == DType::kBFloat16) {
    gate_typed(activation, y, row_count, columns, static_cast<BFloat16*>(h), h_stride);
  } else {
    gate_typed(activation, y, row_count, columns, static_cast<float*>(h), h_stride);
  }
}

static void scatter(const float* y, const float* weights, const int64_t* tokens, int64_t row_count, int64_t columns,
                    float* sums, float* squares) {
  if (squares != nullptr) {
    scatter_rows<true>(y, weights, tokens, row_count, columns, sums, squares);
  } else {
    scatter_rows<false>(y, weights, tokens, row_count, columns, sums, nullptr);
  }
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
    for (; i + Vec::kLanes <= n; i += Vec::kLanes) Vec::load(src + i).store(typed + i);
    for (; i < n; ++i) from_float(src[i], typed + i);
  });
}

static constexpr Loops kLoops = {kBFloat16Operands, widen, multiply, gate, scatter, narrow};

}  // namespace moe_ext::cpu::MOE_EXT_ISA
