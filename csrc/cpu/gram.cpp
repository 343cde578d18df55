// Gram matrices: gram[t, i, j] = <f_i(x[t, :]), f_j(x[t, :])>, f_e rounded to the dtype                (T, E, E)
// float64
//
// Tokens run in parts, so that a part's outputs y (E, part, H) take a few tens of megabytes. Of a part, every expert
// computes all tokens by the experts operator (one slot of weight 1): its y is the operator's to the bit. Then a task
// is a few tokens: kChunk columns of a token's E rows at a time are widened to float64 and multiplied in tiles of rows.
//
// A product of two float32 is exact in float64, and every sum has eight partial sums, chunk by chunk, added in a fixed
// order: the bits are the same for any instruction set and any number of threads, given y.
//
// Cost: 6 E H I FLOPs a token for y, E (E + 1) H for the products. Memory: y, and what the experts operator takes.
#include <algorithm>
#include <iterator>
#include <memory>
#include <vector>

#include "cpu/numeric.h"
#include "cpu/workers.h"
#include "moe.h"

namespace moe_ext::cpu {
namespace {

constexpr int64_t kPartBytes = 64 << 20;  // of y
constexpr int64_t kLeastTokens = 32, kMostTokens = 2048;
constexpr int64_t kTokensPerTask = 4;
constexpr int64_t kMultiplyAddsPerWorker = 1 << 17;
constexpr int64_t kLanes = 8;
constexpr int64_t kChunk = 512;
constexpr int64_t kTallestTile = 4;

typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double))));  // lowered to what the target has

#define MOE_EXT_INLINE inline __attribute__((always_inline))

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A token's rows of y, one an expert.
struct TokenRows {
  const void* first;
  int64_t stride;  // elements from an expert's row to the next's
  int64_t num_experts;
  int64_t hidden;
};

// rows[e, i] = y[e, first + i], zero from `count` to a multiple of kLanes.
template <typename T>
MOE_EXT_INLINE void widen_rows(const TokenRows& y, int64_t first, int64_t count, double* rows) {
  for (int64_t e = 0; e < y.num_experts; ++e) {
    const T* source = static_cast<const T*>(y.first) + e * y.stride + first;
    double* row = rows + e * kChunk;
    for (int64_t i = 0; i < count; ++i) row[i] = to_float(source[i]);
    for (int64_t i = count; i < round_up(count, kLanes); ++i) row[i] = 0.0;
  }
}

// gram[r, c] += a[r] . b[c] for the R x R rows of a tile, over `count` columns.
template <int R>
MOE_EXT_INLINE void add_tile(const double* a, const double* b, int64_t count, double (&sums)[R][R]) {
  Doubles partial[R][R] = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    Doubles left[R], right[R];
    for (int r = 0; r < R; ++r) left[r] = *reinterpret_cast<const Doubles*>(a + r * kChunk + i);
    for (int c = 0; c < R; ++c) right[c] = *reinterpret_cast<const Doubles*>(b + c * kChunk + i);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < R; ++c) partial[r][c] += left[r] * right[c];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < R; ++c) {
      const Doubles& p = partial[r][c];
      sums[r][c] = ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
    }
  }
}

// gram (E, E) of one token. rows: (E rounded up to tiles, kChunk) scratch whose rows from E on are zero.
template <int R, typename T>
MOE_EXT_INLINE void gram_of_token_typed(const TokenRows& y, double* rows, double* gram) {
  const int64_t experts = y.num_experts;
  std::fill(gram, gram + experts * experts, 0.0);
  for (int64_t first = 0; first < y.hidden; first += kChunk) {
    const int64_t count = std::min(kChunk, y.hidden - first);
    widen_rows<T>(y, first, count, rows);
    for (int64_t i = 0; i < experts; i += R) {
      for (int64_t j = i; j < experts; j += R) {
        double sums[R][R];
        add_tile<R>(rows + i * kChunk, rows + j * kChunk, round_up(count, kLanes), sums);
        for (int64_t r = 0; r < std::min<int64_t>(R, experts - i); ++r) {
          for (int64_t c = 0; c < std::min<int64_t>(R, experts - j); ++c) gram[(i + r) * experts + j + c] += sums[r][c];
        }
      }
    }
  }
  for (int64_t i = 0; i < experts; ++i) {
    for (int64_t j = 0; j < i; ++j) gram[i * experts + j] = gram[j * experts + i];
  }
}

template <int R>
MOE_EXT_INLINE void gram_of_token(DType dtype, const TokenRows& y, double* rows, double* gram) {
  switch (dtype) {
    case DType::kFloat32:
      return gram_of_token_typed<R, float>(y, rows, gram);
    case DType::kBFloat16:
      return gram_of_token_typed<R, BFloat16>(y, rows, gram);
    case DType::kFloat16:
      return gram_of_token_typed<R, Float16>(y, rows, gram);
  }
}

// One copy an instruction set, in the order of active_isa(); 16 sums of eight lanes need AVX-512's registers.
using GramOfToken = void (*)(DType dtype, const TokenRows& y, double* rows, double* gram);

#if defined(__x86_64__)
__attribute__((target("avx512f,avx2,fma"))) void gram_avx512(DType dtype, const TokenRows& y, double* rows,
                                                             double* gram) {
  gram_of_token<4>(dtype, y, rows, gram);
}
__attribute__((target("avx2,fma"))) void gram_avx2(DType dtype, const TokenRows& y, double* rows, double* gram) {
  gram_of_token<2>(dtype, y, rows, gram);
}
#endif
void gram_portable(DType dtype, const TokenRows& y, double* rows, double* gram) {
  gram_of_token<2>(dtype, y, rows, gram);
}

#if defined(__x86_64__)
constexpr GramOfToken kVariants[] = {gram_avx512, gram_avx512, gram_avx2, gram_portable};
#else
constexpr GramOfToken kVariants[] = {nullptr, nullptr, nullptr, gram_portable};
#endif
static_assert(std::size(kVariants) == kIsaCount, "one for every instruction set of isa.cpp");

// y[e, t, :] = f_e(x[first + t, :]) for the part's tokens, of `dtype`.
void compute_outputs(const GramParams& p, int64_t first, int64_t tokens, char* y, const Threads& threads) {
  const std::vector<int64_t> only_expert(tokens, 0);
  const std::vector<float> ones(tokens, 1.0f);
  for (int64_t e = 0; e < p.num_experts; ++e) {
    ExpertsParams one{};
    one.x = offset(p.x, p.dtype, first * p.hidden);
    one.gate_up = offset(p.gate_up, p.dtype, e * 2 * p.intermediate * p.hidden);
    one.down = offset(p.down, p.dtype, e * p.hidden * p.intermediate);
    one.experts = only_expert.data();
    one.weights = ones.data();
    one.out = y + e * tokens * p.hidden * element_size(p.dtype);
    one.tokens = tokens;
    one.num_experts = one.top_k = 1;
    one.hidden = p.hidden;
    one.intermediate = p.intermediate;
    one.dtype = p.dtype;
    one.weights_dtype = DType::kFloat32;
    one.activation = p.activation;
    one.experts_are_int64 = true;
    experts(one, threads);
  }
}

}  // namespace

void gram(const GramParams& p, const Threads& threads) {
  const GramOfToken gram_of_token = kVariants[active_isa()];
  const int64_t token_bytes = p.num_experts * p.hidden * element_size(p.dtype);
  const int64_t part = std::min(p.tokens, std::clamp(kPartBytes / token_bytes, kLeastTokens, kMostTokens));
  const std::unique_ptr<char[]> y(new char[static_cast<size_t>(part * token_bytes)]);
  const int64_t work = part * p.num_experts * p.num_experts * p.hidden;
  const int64_t workers = workers_for(threads, work, kMultiplyAddsPerWorker);
  const int64_t row_doubles = round_up(p.num_experts, kTallestTile) * kChunk;
  std::vector<double> rows(workers * row_doubles + kLanes);  // zeros
  double* aligned_rows = rows.data();
  while (reinterpret_cast<uintptr_t>(aligned_rows) % sizeof(Doubles) != 0) ++aligned_rows;

  for (int64_t first = 0; first < p.tokens; first += part) {
    const int64_t tokens = std::min(part, p.tokens - first);
    compute_outputs(p, first, tokens, y.get(), threads);
    const int64_t tasks = (tokens + kTokensPerTask - 1) / kTokensPerTask;
    for_each_task(threads, workers, tasks, [&](int64_t task, int64_t worker) {
      const int64_t end = std::min(tokens, (task + 1) * kTokensPerTask);
      for (int64_t t = task * kTokensPerTask; t < end; ++t) {
        const TokenRows token{offset(y.get(), p.dtype, t * p.hidden), tokens * p.hidden, p.num_experts, p.hidden};
        gram_of_token(p.dtype, token, aligned_rows + worker * row_doubles,
                      p.gram + (first + t) * p.num_experts * p.num_experts);
      }
    });
  }
}

}  // namespace moe_ext::cpu
