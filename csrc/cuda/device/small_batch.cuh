// The kernels of small batches (T up to about 16), bf16 and fp16: both products read the weights of every active expert
// once and touch no other's.
//   gate_up   h[s, :] = act(gate[e] x) * (up[e] x),  x = x[token of slot s, :]              (P, I)
//   down      y[s, :] = down[e] h[s, :],  then  out[t, :] = sum over t's slots s of weights[s] * y[s, :]
//
// Every block finds the active experts itself from the P expert indices; (expert, group of rows of weights) are the
// units of work, and block b takes the b-th share of them, so that the grid depends on the device only and a block
// stays with an expert, whose tokens it stages in shared memory once. A group is four m16 tiles of rows (gate_up: 8
// gate rows and the 8 up rows of the same columns each). A warp has one of the tiles and every second piece of k, 256
// bytes of each of its 16 rows (128 of four-bit weights). An H100 reads at three quarters of its memory's rate that way
// (benchmarks/results, gpu).
// Weights go from global memory to registers, 16 bytes a load, and are the first operand of mma.m16n8k16, the tokens
// the second; k is permuted in both alike, so that a thread's 16 bytes are its fragment. As soon as registers are
// multiplied, those bytes of the next piece, which may be the next unit's, are sent for; down's first piece even before
// gate_up has ended. The sums of a tile's two warps meet in shared memory in a fixed order. A unit goes through produce
// (activations), load and multiply (of what a kernel is made with: small_batch.cu, small_batch_packed.cu), leave and
// reduce (the warps' sums), store.
//
// Where energies of channels are observed, a warp reduces the sums of one m16 tile for all tokens of a pass, adds up
// g^2 h^2 of a column over its lanes, and adds that to the channel: an expert's columns are one block's, so that nobody
// else does.
//
// down: where there are too few units for the device, k is split, too (`splits`, from shapes only). A unit writes its
// part of y, then arrives at its group's counter (zeroed by gate_up, for whose end down waits). The last to
// arrive finds all parts there and sums every token's slots in slot order, in float32. Which block that is does not
// matter to the result: it is deterministic.
//
// Cost: reads 3 H I weights of each active expert; activations once per block and expert that it works on (once per
// group where an expert's tokens do not fit into shared memory), P expert indices per block. Bound by bandwidth.
#pragma once

#include <algorithm>

#include "cuda/device/active_experts.cuh"
#include "cuda/device/next_kernel.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/ptx_sm80.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/launch.h"
#include "cuda/params.h"
#include "cuda/shapes.h"

namespace moe_ext::cuda::small_batch {

inline constexpr int kWarps = kSmallBatchWarps;
inline constexpr int kThreads = kWarps * kWarpSize;
inline constexpr int kTiles = 4;                 // m16 tiles of a group
inline constexpr int kParts = kSmallBatchParts;  // warps that share a tile, and take its pieces of k in turn
inline constexpr int kGateUpColumns = kSmallBatchColumns / 2;  // of h, a group: their rows of gate and of up
inline constexpr int kDownColumns = kSmallBatchColumns;        // of y, a group
template <Product kProduct>
inline constexpr int kColumns = kProduct == Product::kGateUp ? kGateUpColumns : kDownColumns;
static_assert(kSmallBatchColumns == kTiles * 16 && kWarps == kTiles * kParts);
inline constexpr int kAtOnce = 4;  // parts of y that a thread of combine_group reads at once

// Elements of k of one token that fit when `tokens` are staged.
template <typename Weights>
constexpr int staged_elements(int64_t staged_bytes, int tokens) {
  constexpr int kRound = kParts * Weights::kPiece;
  return (static_cast<int>(staged_bytes) / tokens - Weights::kPadding) / 2 / kRound * kRound;
}

constexpr int64_t sums_bytes(int token_tiles) { return int64_t{kWarps} * token_tiles * kWarpSize * 16; }

// Which row of an m16 tile of weights this lane loads, and the one eight on; also the token of a token tile.
__device__ __forceinline__ int row_of_lane() { return threadIdx.x % kWarpSize / 4; }
// The warp's tile of the group, and which of its pieces the warp takes.
__device__ __forceinline__ int tile_of_warp() { return threadIdx.x / kWarpSize % kTiles; }
__device__ __forceinline__ int part_of_warp() { return threadIdx.x / kWarpSize / kTiles; }

// out[t, columns of the group] of all tokens, and the group's part of every ||y||^2. A thread has four columns of a
// token and reads kAtOnce parts of y before it adds the first. All threads call.
template <typename T>
__device__ void combine_group(const SmallBatchParams& p, int group, const Lists& lists) {
  const ExpertsParams& e = p.experts;
  constexpr int kThreadsPerToken = kDownColumns / 4;
  const int64_t column = int64_t{group} * kDownColumns + threadIdx.x % kThreadsPerToken * 4;
  const bool inside = column < e.hidden;  // H is a multiple of 8
  const int splits = static_cast<int>(p.splits), top_k = static_cast<int>(e.top_k);
  // __ldcg: past L1, where nothing of y can be valid that was read before the last part arrived.
  const auto part_of_y = [&](int64_t part) {
    return __ldcg(reinterpret_cast<const float4*>(p.y + part * e.hidden + column));
  };

  for (int token = threadIdx.x / kThreadsPerToken; token < e.tokens; token += kThreads / kThreadsPerToken) {
    if (!inside) continue;
    const int first = token * top_k * splits, end = first + top_k * splits;  // parts of y, by slot and split
    float4 sum = make_float4(0, 0, 0, 0);
    for (int batch = first; batch < end; batch += kAtOnce) {
      float4 y[kAtOnce];
      float weights[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int slot = (batch + i) / splits;
        const bool present = batch + i < end && lists.expert_of_slot[slot] < e.num_experts;
        y[i] = present ? part_of_y(batch + i) : make_float4(0, 0, 0, 0);
        weights[i] = present ? weight_of(e.weights, e.weights_dtype, slot) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        sum.x += weights[i] * y[i].x, sum.y += weights[i] * y[i].y;
        sum.z += weights[i] * y[i].z, sum.w += weights[i] * y[i].w;
      }
    }
    *reinterpret_cast<uint2*>(static_cast<T*>(e.out) + token * e.hidden + column) =
        make_uint2(pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w));
  }

  if (p.squares == nullptr) return;
  const int slots = static_cast<int>(e.tokens) * top_k;
  for (int first = 0; first < slots; first += kThreads / kThreadsPerToken) {  // the whole warp stays: it adds below
    const int slot = first + threadIdx.x / kThreadsPerToken;
    float square = 0.0f;
    if (slot < slots && inside && lists.expert_of_slot[slot] < e.num_experts) {
      float4 y = make_float4(0, 0, 0, 0);
      for (int part = slot * splits; part < (slot + 1) * splits; ++part) {
        const float4 more = part_of_y(part);
        y.x += more.x, y.y += more.y, y.z += more.z, y.w += more.w;
      }
      square = y.x * y.x + y.y * y.y + y.z * y.z + y.w * y.w;
    }
#pragma unroll
    for (int distance = kThreadsPerToken / 2; distance > 0; distance /= 2) {
      square += __shfl_xor_sync(kAllLanes, square, distance);
    }
    if (slot < slots && threadIdx.x % kThreadsPerToken == 0) {
      p.squares[slot * small_batch_groups(e.hidden) + group] = square;
    }
  }
}

// What the units build on: gate_up zeroes the counters of down, and down zeroes `out` where no expert is active.
template <typename T, Product kProduct>
__device__ __forceinline__ void prepare(const SmallBatchParams& p, int active) {
  const ExpertsParams& e = p.experts;
  const int64_t begin = int64_t{blockIdx.x} * kThreads + threadIdx.x, step = int64_t{gridDim.x} * kThreads;
  if constexpr (kProduct == Product::kGateUp) {
    for (int64_t i = begin; i < small_batch_groups(e.hidden); i += step) p.arrivals[i] = 0;
  } else if (active == 0) {
    for (int64_t i = begin; i < e.tokens * e.hidden; i += step) static_cast<T*>(e.out)[i] = from_float<T>(0.0f);
  }
}

// Sends elements [k_begin, k_begin + length) of the activations of `tokens` slots to shared memory, zeros from last_k
// on.
template <typename T, Product kProduct>
__device__ __forceinline__ void produce(const SmallBatchParams& p, const int* slots, int tokens, int inner, int k_begin,
                                        int last_k, int length, int row_bytes, char* staged) {
  constexpr bool kGateUp = kProduct == Product::kGateUp;
  const ExpertsParams& e = p.experts;
  const T* activations = static_cast<const T*>(kGateUp ? e.x : p.h) + k_begin;
  for (int token = 0; token < tokens; ++token) {
    const int slot = slots[token];
    const T* row = activations + int64_t{kGateUp ? slot / static_cast<int>(e.top_k) : slot} * inner;
    for (int k = threadIdx.x * 8; k < length; k += kThreads * 8) {
      ptx::copy_async(ptx::shared_address(staged + token * row_bytes + k * 2), row + k, k_begin + k < last_k);
    }
  }
  ptx::copy_async_commit();
}

// Leaves this warp's sums in shared memory, (parts, tiles, token tiles, lanes), beside those of the others.
template <int kTokenTiles>
__device__ __forceinline__ void leave(const float (&acc)[kTokenTiles][4], float4* sums) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
    const float (&c)[4] = acc[token_tile];
    sums[(warp * kTokenTiles + token_tile) * kWarpSize + lane] = make_float4(c[0], c[1], c[2], c[3]);
  }
}

// Number i of (tiles, token tiles, lanes), added over the parts in their order.
template <int kTokenTiles>
__device__ __forceinline__ float4 reduce(const float4* sums, int i) {
  float4 sum = sums[i];
#pragma unroll
  for (int part = 1; part < kParts; ++part) {
    const float4 more = sums[part * kTiles * kTokenTiles * kWarpSize + i];
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  return sum;
}

// h of an element: gate and up as the products gave them.
template <typename T>
__device__ __forceinline__ float h_of(const SmallBatchParams& p, float gate, float up, int expert, int columns,
                                      int column) {
  const ExpertsParams& e = p.experts;
  if (p.special) {
    const auto row = [&](bool of_up) {
      return weight_row<Product::kGateUp, int64_t>(expert, columns, column, of_up, e.formula.interleaved);
    };
    gate += bias_at<T>(e.gate_up_bias, row(false));
    up += bias_at<T>(e.gate_up_bias, row(true));
    shape(p.shaping, gate, up);
  }
  return activate<false>(e.formula.activation, gate) * up;
}

// h of a group's columns for `tokens` slots, and the columns' energies.
template <typename T, int kTokenTiles>
__device__ __forceinline__ void store_observed(const SmallBatchParams& p, const float4* sums, const int* slots,
                                               int tokens, int columns, int first_column, int expert) {
  const ExpertsParams& e = p.experts;
  const int tile = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (tile >= kTiles) return;
  const int column = first_column + tile * (kGateUpColumns / kTiles) + row_of_lane();
  float energy = 0.0f;
#pragma unroll
  for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
    const float4 sum = reduce<kTokenTiles>(sums, (tile * kTokenTiles + token_tile) * kWarpSize + lane);
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      const int token = token_tile * 8 + lane % 4 * 2 + next;
      if (token >= tokens || column >= columns) continue;
      const float gate = next == 0 ? sum.x : sum.y, up = next == 0 ? sum.z : sum.w;
      const float h = h_of<T>(p, gate, up, expert, columns, column);
      const int slot = slots[token];
      static_cast<T*>(p.h)[int64_t{slot} * columns + column] = from_float<T>(h);
      if (e.counted != nullptr && !e.counted[slot / static_cast<int>(e.top_k)]) continue;
      const float weight = weight_of(e.weights, e.weights_dtype, slot);
      add_energy(weight * weight, h, energy);
    }
  }
  energy += __shfl_xor_sync(kAllLanes, energy, 1);
  energy += __shfl_xor_sync(kAllLanes, energy, 2);
  if (lane % 4 == 0 && column < columns) e.channels[int64_t{expert} * columns + column] += energy;
}

// h, or down's part of y in split `split`, of a group's columns for `tokens` slots.
template <typename T, int kTokenTiles, Product kProduct>
__device__ __forceinline__ void store(const SmallBatchParams& p, const float4* sums, const int* slots, int tokens,
                                      int columns, int first_column, int splits, int split, int expert) {
  for (int i = threadIdx.x; i < kTiles * kTokenTiles * kWarpSize; i += kThreads) {
    const float4 sum = reduce<kTokenTiles>(sums, i);
    const int tile = i / (kTokenTiles * kWarpSize), token_tile = i / kWarpSize % kTokenTiles;
    const int column = first_column + tile * (kColumns<kProduct> / kTiles) + row_of_lane();
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      const int token = token_tile * 8 + threadIdx.x % 4 * 2 + next;
      if (token >= tokens || column >= columns) continue;
      const float upper = next == 0 ? sum.x : sum.y, lower = next == 0 ? sum.z : sum.w;
      const int64_t at = (int64_t{slots[token]} * splits + split) * columns + column;
      if constexpr (kProduct == Product::kGateUp) {
        static_cast<T*>(p.h)[at] = from_float<T>(h_of<T>(p, upper, lower, expert, columns, column));
      } else {
        float first = upper, second = lower;
        if (p.experts.down_bias != nullptr && split == 0) {  // part of the first split's sum
          const int64_t row = int64_t{expert} * columns + column;
          first += bias_at<T>(p.experts.down_bias, row);
          if (column + 8 < columns) second += bias_at<T>(p.experts.down_bias, row + 8);
        }
        p.y[at] = first;
        if (column + 8 < columns) p.y[at + 8] = second;
      }
    }
  }
}

// Counts the block's part of a group's columns of y; the last of `parts` to arrive combines them. All threads call.
template <typename T>
__device__ __forceinline__ void finish(const SmallBatchParams& p, int group, int parts, const Lists& lists) {
  __shared__ bool last;
  __syncthreads();  // the block's part of y is written
  if (threadIdx.x == 0) last = ptx::arrive(&p.arrivals[group]) == static_cast<uint32_t>(parts) - 1;
  __syncthreads();
  if (last) combine_group<T>(p, group, lists);
}

// kTokenTiles: tiles of 8 tokens that a pass over an expert's weights multiplies. kEnergies: those of channels are
// observed if there are any. Weights is what a warp multiplies with:
//   Element, kProduct  of activations
//   kPiece             elements of k that a warp multiplies at a time
//   kPadding           bytes between staged rows
//   Piece              registers of a piece
//   begin(...)         the pieces to come are those of a group of rows of an expert, from k on
//   load_early()       sends half of the first of them for registers, and
//   load_rest()        the other half: what comes between has registers of its own
//   multiply()         acc += the piece * the staged tokens, and sends the next piece for the same registers; half of
//                      it where it is another pass's
//   scale()            acc *= what a whole row of weights is multiplied by, once all pieces are
template <typename Weights, int kTokenTiles, bool kEnergies>
__global__ void __launch_bounds__(kThreads, kSmallBatchBlocksPerMultiprocessor) small_batch_kernel(SmallBatchParams p) {
  using T = typename Weights::Element;
  constexpr Product kProduct = Weights::kProduct;
  constexpr bool kGateUp = kProduct == Product::kGateUp;
  constexpr int kRound = kParts * Weights::kPiece;
  static_assert(kRound == small_batch_round(Weights::kType) &&
                Weights::kPadding == small_batch_padding(Weights::kType));
  constexpr int kTokens = kTokenTiles * 8;
  extern __shared__ __align__(16) char shared[];
  const ExpertsParams& e = p.experts;
  const int slots = static_cast<int>(e.tokens * e.top_k);
  float4* sums = reinterpret_cast<float4*>(shared);  // (parts, tiles, token tiles, lanes)
  char* staged = shared + sums_bytes(kTokenTiles);
  const Lists lists = lists_at(staged + static_cast<int>(p.staged_bytes), slots, e.num_experts);

  const int inner = static_cast<int>(kGateUp ? e.hidden : e.intermediate);
  const int columns = static_cast<int>(kGateUp ? e.intermediate : e.hidden);  // of the result
  const int groups = kGateUp ? p.gate_up_groups : p.down_groups;
  const int first_of_warp = part_of_warp() * Weights::kPiece;  // k of a round

  // From the call's input, which no kernel of it writes, as the weights are.
  __shared__ int active;
  if (const int found = find_active<kThreads>(e, slots, lists); threadIdx.x == 0) active = found;
  __syncthreads();

  // Split s takes k in [s, s + 1) * split_length. A block stays with an expert and a split for all groups that it can.
  const int splits = kGateUp ? 1 : static_cast<int>(p.splits);
  const int split_length = kGateUp ? inner : static_cast<int>(p.split_length);
  const int64_t units = int64_t{active} * splits * groups;
  const int begin = static_cast<int>(units * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(units * (blockIdx.x + 1) / gridDim.x);
  Weights weights(p, inner, columns);
  typename Weights::Piece piece;
  const auto begin_unit = [&](int unit) {
    const int first_k = unit / groups % splits * split_length;
    weights.begin(lists.active[unit / groups / splits], unit % groups * kColumns<kProduct>, first_k + first_of_warp,
                  min(inner, first_k + split_length));
  };
  if (begin < end) begin_unit(begin), weights.load_early(piece);

  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  prepare<T, kProduct>(p, active);

  int current = -1, count = 0;          // expert and split under way, and the expert's slots
  int staged_from = -1, staged_k = -1;  // first slot of the list, and first k, of what is staged
  for (int unit = begin; unit < end; ++unit) {
    if (unit / groups != current) {
      current = unit / groups;
      count = find_slots<kThreads>(lists.active[current / splits], slots, lists);
      staged_from = -1;
    }
    const int first_column = unit % groups * kColumns<kProduct>;
    const int split = current % splits;
    const int first_k = split * split_length, last_k = min(inner, first_k + split_length);

    for (int from = 0; from < count; from += kTokens) {
      const int tokens = min(kTokens, count - from);
      // As many elements of k as fit; all of them, and then they stay for the next group, if that is possible.
      const int pieces = (last_k - first_k + Weights::kPiece - 1) / Weights::kPiece;
      const int length = min(staged_elements<Weights>(p.staged_bytes, tokens), pieces * Weights::kPiece);
      const int row_bytes = length * 2 + Weights::kPadding;
      const int following = from + kTokens < count ? unit : unit + 1;  // whose pieces are multiplied after this pass

      float acc[kTokenTiles][4] = {};
      weights.load_rest(piece);
      for (int k_begin = first_k; k_begin < last_k; k_begin += length) {
        if (staged_from != from || staged_k != k_begin) {
          __syncthreads();  // what is staged is not read any more
          produce<T, kProduct>(p, lists.slots + from, tokens, inner, k_begin, last_k, length, row_bytes, staged);
          staged_from = from;
          staged_k = k_begin;
        }
        ptx::copy_async_wait<0>();
        __syncthreads();                                 // the activations are there, and sums are not read any more
        const int here = min(last_k - k_begin, length);  // elements of k in what is staged
        for (int k = first_of_warp; k < here; k += kRound) {
          const bool last = k_begin + k + kRound >= last_k;
          if (last && following < end) begin_unit(following);
          weights.multiply(acc, piece, staged, row_bytes, tokens, k, last);
        }
      }
      if (first_k + first_of_warp >= last_k && following < end) {  // the warp has no piece of this pass
        begin_unit(following);
        weights.load_early(piece);
      }

      const int expert = lists.active[current / splits];
      weights.scale(acc, expert, first_column);
      leave(acc, sums);
      __syncthreads();
      if (kEnergies && e.channels != nullptr) {
        store_observed<T, kTokenTiles>(p, sums, lists.slots + from, tokens, columns, first_column, expert);
      } else {
        store<T, kTokenTiles, kProduct>(p, sums, lists.slots + from, tokens, columns, first_column, splits, split,
                                        expert);
      }
    }

    if constexpr (!kGateUp) finish<T>(p, unit % groups, active * splits, lists);
  }
}

template <typename Weights, int kTokenTiles, bool kEnergies>
void launch(const SmallBatchParams& p, cudaStream_t stream) {
  constexpr bool kGateUp = Weights::kProduct == Product::kGateUp;
  const ExpertsParams& e = p.experts;
  const int64_t slots = e.tokens * e.top_k;
  const int64_t groups = kGateUp ? p.gate_up_groups : p.down_groups * p.splits;
  const int64_t units = std::max<int64_t>(1, std::min(slots, e.num_experts) * groups);
  const int bytes = static_cast<int>(sums_bytes(kTokenTiles) + lists_bytes(slots, e.num_experts) + p.staged_bytes);
  allow_shared(small_batch_kernel<Weights, kTokenTiles, kEnergies>, static_cast<int>(p.shared_limit));
  const unsigned blocks = grid_size(std::min(units, p.blocks));
  if constexpr (kGateUp) {
    small_batch_kernel<Weights, kTokenTiles, kEnergies><<<blocks, kThreads, bytes, stream>>>(p);
    check_launch("small_batch_kernel");
  } else {
    launch_next<small_batch_kernel<Weights, kTokenTiles, kEnergies>>("small_batch_kernel", blocks, kThreads, bytes,
                                                                     stream, p);
  }
}

}  // namespace moe_ext::cuda::small_batch
