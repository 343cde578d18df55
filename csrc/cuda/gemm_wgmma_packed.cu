// Grouped products of quantised weights for large batches on sm_90a (H100, H200), float32 accumulation:
//   gate_up   h[p, :] = act(gate[e] x) * (up[e] x),  x = x[token of p, :]          (positions, I)
//   down      y[p, :] = down[e] h[p, :]                                            (positions, H)
//
// As gemm_wgmma.cu: transposed, a tile is 256 rows of weights (in gate_up 128 of gate and the 128 of up for the same
// columns of c) by up to 128 positions of one expert, and one block a multiprocessor takes every gridDim.x-th tile.
// mma.sync turns a weight into an operand for at most 64 positions (gemm_packed.cu); here it is turned once for the
// tile and left in shared memory, where wgmma reads it:
//   converters  two warpgroups, each 128 of the tile's rows. A warp has 32 rows to itself and a ring of their lines of
//               64 bytes (packed.cuh), filled by its own cp.async, four lanes a row, so that no barrier but a warp's
//               stands before the bytes. A thread converts one row: it has the row's scales and zero points, read
//               some groups ahead, and neither its reads nor its writes conflict with its neighbours'
//   producer    one warpgroup: activations, gathered row by row as in gemm_wgmma.cu
//   consumers   two warpgroups, each 128 of the tile's rows in two wgmmas m64, in gate_up of gate and of up
// They meet at two mbarriers for each of kStages steps of 64 elements of k: `full`, where the warps of converters and
// producer arrive, and `empty`. A line of four-bit weights is two steps, of eight-bit weights one.
//
// Scales: that of a whole row multiplies the row's sums, in float32. Those of groups and blocks multiply weights, which
// are rounded once more, to bfloat16: a scale is the sum of two bfloat16, high + low, and w * high + (w * low) is one
// rounding and less than 2^-8 of another. mxfp4's powers of two are exact. In fp16 such products could leave its range:
// there formats with groups stay with gemm_packed.cu (known_to_hopper()).
//
// Memory order: as the producer's cp.async, a converter's stores are its own writes: it fences them towards wgmma's
// proxy and its warp arrives. Rows of weights beyond an expert's last give columns that are not stored; columns beyond
// k are the zeros of a line's padding, or other finite weights, times zeros.
//
// Biases and limits of gate and up are applied to copies of the accumulators (what is done to them in place makes ptxas
// wait for every wgmma). Energies of channels: launch_energy_rows().
//
// Every element is a sum in order of k by one warpgroup: deterministic. Cost of a tile: 2 * 256 * rows * k FLOPs, with
// rows rounded up to a multiple of 16; reads 256 * k weights of 4 or 8 bits, their scales, and rows * k activations. A
// step of 128 rows is 1024 cycles of the tensor cores at best; through shared memory go 32 KB of converted weights
// twice, 64 + 16 KB of activations, and 16 or 32 KB of packed lines: 1280 or 1408 cycles, its bound. A converter's warp
// has 2.5 (int8 in fp16), 3.7 (int8), 4.3 to 4.9 (int4), 4.9 (mxfp4), 4.5 (fp8) or 6 (fp8 in blocks) instructions in
// its loop for a weight of each of its 32 rows (python -m tools.sass.report), of four-bit weights a fifth of them for
// scales that most lines do not read: at most 3100 of the 5100 that the schedulers can issue in a step.
#include <algorithm>

#include "cuda/device/dispatch.cuh"
#include "cuda/device/next_kernel.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/packed.cuh"
#include "cuda/device/ptx_sm80.cuh"
#include "cuda/device/tiles.cuh"
#include "cuda/launch.h"
#include "cuda/params.h"
#include "cuda/shapes.h"
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include "cuda/device/ptx_sm90.cuh"
#include "cuda/device/wgmma.cuh"
#endif

namespace moe_ext::cuda {
namespace {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupWarps = kGroupThreads / kWarpSize;
constexpr int kConsumers = 2, kConverters = 2;  // warpgroups, in this order; the producer comes last
constexpr int kThreads = (kConsumers + kConverters + 1) * kGroupThreads;
constexpr int kMaxRows = kHopperPackedRows;  // positions of a tile
constexpr int kWeightRows = kHopperColumns;
constexpr int kHalfRows = kWeightRows / 2;  // of weights, of a converter or consumer; in gate_up those of gate or up
constexpr int kInner = 64;                  // elements of k of a step: a row of 128 bytes
constexpr int kStages = 3;
constexpr int kWeightBytes = kWeightRows * kInner * 2;
constexpr int kStageBytes = kWeightBytes + kMaxRows * kInner * 2;
constexpr int kLines = 4;                               // of a row: the one that is converted, and those on their way
constexpr int kWarpLineBytes = kWarpSize * kLineBytes;  // of a converter's warp
constexpr int kOutRows = 64, kOutColumns = 64;          // of c that a consumer passes through shared memory at once
constexpr int kOutBytes = kOutRows * kOutColumns * 2;
// Offsets; the stages come first.
constexpr int kFirstLine = kStages * kStageBytes;
constexpr int kFirstOut = kFirstLine + kConverters * kGroupWarps * kLines * kWarpLineBytes;
constexpr int kBarriers = kFirstOut + kConsumers * kOutBytes;
constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
static_assert(kSharedBytes <= 227 * 1024 && kStageBytes % 1024 == 0 && kHalfRows == kGroupThreads);

// Of 640 threads, which have 96 each as they start: what is taken may not be more than what is given. Converters of
// four bits need more, consumers of eight bits, which may hold scales.
template <WeightType kType>
inline constexpr int kConverterRegisters = has_four_bits(kType) ? 56 : 48;
template <WeightType kType>
inline constexpr int kConsumerRegisters = has_four_bits(kType) ? 168 : 176;
constexpr int kProducerRegisters = 32;
static_assert(kConsumers * kConsumerRegisters<WeightType::kInt4> +
                  kConverters * kConverterRegisters<WeightType::kInt4> + kProducerRegisters <=
              kThreads / kGroupThreads * 96);
static_assert(kConsumers * kConsumerRegisters<WeightType::kInt8> +
                  kConverters * kConverterRegisters<WeightType::kInt8> + kProducerRegisters <=
              kThreads / kGroupThreads * 96);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kChunks = kInner / 8;  // of 16 bytes, of a row of a stage; and of a line:
constexpr int kPieces = kLineBytes / 16;

// The ring of steps, as one role goes through it.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ uint32_t full(uint32_t shared, int stage) { return shared + kBarriers + stage * 8; }
__device__ __forceinline__ uint32_t empty(uint32_t shared, int stage) { return full(shared, kStages + stage); }

template <Product kProduct>
inline constexpr int kTileColumns = kProduct == Product::kGateUp ? kHalfRows : kWeightRows;  // of c

// What the warp's lanes wrote becomes readable for wgmma, and one lane says so.
__device__ __forceinline__ void announce(uint32_t barrier) {
  ptx::fence_async_proxy();
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) ptx::barrier_arrive(barrier);
}

// ---- producer

template <Product kProduct>
__device__ __forceinline__ void produce(const GemmParams& p, uint32_t shared, unsigned tiles) {
  constexpr int kRowStep = kGroupThreads / kChunks;  // rows that all threads copy at once
  constexpr int kCopies = kMaxRows / kRowStep;
  static_assert(kRowStep == kFragment);
  const int thread = threadIdx.x % kGroupThreads;
  const int chunk = thread % kChunks, copy_row = thread / kChunks;
  const uint32_t copy_to = shared + kWeightBytes + swizzled<kChunks>(copy_row, chunk);
  const int chunks = static_cast<int>(p.inner) / 8;
  const int steps = (chunks + kChunks - 1) / kChunks;
  Ring ring;
  int unannounced = -1;  // the stage whose copies are under way

  for (unsigned index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Place place = place_of(p, index, kMaxRows, kTileColumns<kProduct>);
    if (place.expert < 0) break;
    // Where this thread's chunks of a begin, in 16 bytes: 32 bits, for there are few registers (fits_hopper()).
    uint32_t sources[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = copy_row + i * kRowStep;
      sources[i] = 0;
      if (row < place.rows) {
        const uint32_t position = static_cast<uint32_t>(place.first_position) + row;
        const uint32_t a_row = kProduct == Product::kGateUp
                                   ? static_cast<uint32_t>(p.slot_of[position]) / static_cast<uint32_t>(p.top_k)
                                   : position;
        sources[i] = a_row * static_cast<uint32_t>(chunks);
      }
    }
    for (int step = 0; step < steps; ++step) {
      ptx::barrier_wait(empty(shared, ring.stage), ring.parity ^ 1);
      const uint32_t stage = copy_to + ring.stage * kStageBytes;
      const uint4* a = static_cast<const uint4*>(p.a) + step * kChunks + chunk;
      const int rows = step * kChunks + chunk < chunks ? place.rows - copy_row : 0;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (i * kRowStep >= place.rows) break;
        ptx::copy_async(stage + i * kRowStep * kInner * 2, a + sources[i], i * kRowStep < rows);
      }
      ptx::copy_async_commit();
      if (unannounced >= 0) {
        ptx::copy_async_wait<1>();
        announce(full(shared, unannounced));
      }
      unannounced = ring.stage;
      ring.advance();
    }
  }
  ptx::copy_async_wait<0>();
  if (unannounced >= 0) announce(full(shared, unannounced));
}

// ---- converters

// Both elements of a pair times a scale that is high + low.
struct Factors {
  uint32_t high, low;
};

template <typename T>
__device__ __forceinline__ uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c) {
  using Pair = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162, __half2>;
  Pair x, y, z;
  memcpy(&x, &a, sizeof(x));
  memcpy(&y, &b, sizeof(y));
  memcpy(&z, &c, sizeof(z));
  const Pair sum = __hfma2(x, y, z);
  uint32_t bits;
  memcpy(&bits, &sum, sizeof(bits));
  return bits;
}

// Whether one number of T is enough for scales of a type, so that there is no low.
template <typename T, ScaleType kScales>
inline constexpr bool kExact =
    std::is_same_v<T, __nv_bfloat16> && (kScales == ScaleType::kBFloat16 || kScales == ScaleType::kE8M0);

template <typename T, ScaleType kScales>
__device__ __forceinline__ Factors factors_of(uint32_t bits) {
  const float scale = scale_of_bits(kScales, bits);
  const float rest = kExact<T, kScales> ? 0.0f : scale - to_float(from_float<T>(scale));
  return {pack<T>(scale, scale), pack<T>(rest, rest)};
}

template <typename T, ScaleType kScales>
__device__ __forceinline__ uint32_t scaled(uint32_t pair, const Factors& factors) {
  if constexpr (kExact<T, kScales>) return multiply_pairs<T>(pair, factors.high);
  return multiply_add_pairs<T>(pair, factors.high, multiply_pairs<T>(pair, factors.low));
}

// The scales, and zero points, of some neighbouring groups of a row as they are stored: they are looked at only where
// they are used. A warp's rows lie far apart, so that a load of any width costs the same.
template <WeightType kType, ScaleType kScales>
struct RowScales {
  static constexpr int kGroups = has_four_bits(kType) ? 4 : 1;  // at once
  static constexpr int kBytes = kScales == ScaleType::kFloat32 ? 4 : kScales == ScaleType::kE8M0 ? 1 : 2;
  static constexpr int kWords = (kGroups * kBytes + 3) / 4;
  uint32_t words[kWords];
  uint32_t zeros;  // a byte each

  // Whether every row's scales begin where loads of all groups at once can.
  static __device__ __forceinline__ bool aligned(const Quantisation& q) {
    const auto begins = [](const void* pointer, int bytes) {
      return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
    };
    return q.groups % kGroups == 0 && begins(q.scales, kGroups * kBytes) &&
           (kType != WeightType::kInt4 || begins(q.zeros, kGroups));
  }

  // Groups kGroups * index and those after it of the row whose scales begin at `row`; beyond the last, others.
  __device__ __forceinline__ void read(const Quantisation& q, int row, int index, bool aligned) {
    using Wide = std::conditional_t<kWords == 4, uint4, std::conditional_t<kWords == 2, uint2, uint32_t>>;
    using Narrow = std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>;
    if (kGroups == 1 || aligned) {
      const int at = row + min(index * kGroups, q.groups - kGroups);
      const Wide wide = __ldg(reinterpret_cast<const Wide*>(static_cast<const Narrow*>(q.scales) + at));
      memcpy(words, &wide, sizeof(words));
      if constexpr (kType == WeightType::kInt4) {
        zeros = q.zeros == nullptr ? 0x08080808u : __ldg(reinterpret_cast<const uint32_t*>(q.zeros + at));
      }
    } else {
      Narrow narrow[kGroups];
      uint8_t zero[kGroups];
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int at = row + min(index * kGroups + i, q.groups - 1);
        narrow[i] = __ldg(static_cast<const Narrow*>(q.scales) + at);
        if constexpr (kType == WeightType::kInt4) zero[i] = q.zeros == nullptr ? 8 : __ldg(q.zeros + at);
      }
      memcpy(words, narrow, sizeof(words));
      if constexpr (kType == WeightType::kInt4) memcpy(&zeros, zero, sizeof(zeros));
    }
  }

  // Of a group that is there.
  __device__ __forceinline__ uint32_t scale(int group) const {
    const int i = group % kGroups;
    if constexpr (kGroups == 1) return words[0];
    if constexpr (kBytes == 4) {
      const uint32_t low = i % 2 == 0 ? words[0] : words[1 % kWords];
      const uint32_t high = i % 2 == 0 ? words[2 % kWords] : words[3 % kWords];
      return i < 2 ? low : high;
    }
    if constexpr (kBytes == 2) return (i < 2 ? words[0] : words[1 % kWords]) >> i % 2 * 16 & 0xffffu;
    return words[0] >> i * 8 & 0xffu;
  }
  __device__ __forceinline__ uint32_t zero(int group) const { return zeros >> group % kGroups * 8 & 0xffu; }
};

// One row's step: from its line, of which it is step kHalf, to its chunks of the stage. `chunks`: address of the row's
// chunk 0, from which the others are an exclusive or away (swizzled()).
template <typename T, WeightType kType, ScaleType kScales, bool kGroups, int kHalf>
__device__ __forceinline__ void convert(const Quantisation& q, const char* shared, int line, uint32_t chunks,
                                        const RowScales<kType, kScales>& scales, int step) {
  constexpr int kCount = has_four_bits(kType) ? 2 : 1;  // groups of a step at most
  [[maybe_unused]] Factors factors[kCount];
  uint32_t zeros[kCount] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    [[maybe_unused]] const int group = (step * kInner + i * kStepColumns) >> q.group_shift;
    if constexpr (kGroups) factors[i] = factors_of<T, kScales>(scales.scale(group));
    if constexpr (kType == WeightType::kInt4) zeros[i] = zero_pair<T>(scales.zero(group));
  }
  // A piece is read before the one before it is written: reads would not be moved over the writes.
  const auto read = [&](int t) { return *reinterpret_cast<const uint4*>(shared + (line ^ t * 16)); };
  uint4 next = read(0);
#pragma unroll
  for (int t = 0; t < kPieces; ++t) {
    const uint4 piece = next;
    if (t + 1 < kPieces) next = read(t + 1);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int group = has_four_bits(kType) ? s : 0;
      uint32_t pairs[4];
      values_of<kType, T>(piece, has_four_bits(kType) ? 2 * kHalf + s : s, zeros[group], pairs);
      if constexpr (kGroups) {
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = scaled<T, kScales>(pairs[i], factors[group]);
      }
      const int chunk = has_four_bits(kType) ? 4 * s + t : 2 * t + s;
      ptx::store_shared(chunks ^ chunk * 16, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    }
  }
}

template <typename T, WeightType kType, ScaleType kScales, bool kGroups, Product kProduct>
__device__ __forceinline__ void convert_all(const GemmParams& p, char* memory, int half, unsigned tiles) {
  constexpr bool kGateUp = kProduct == Product::kGateUp;
  constexpr int kStepsPerNewLine = kLineColumns<kType> / kInner;
  constexpr int kCopyRows = kWarpSize / kPieces, kCopies = kWarpSize / kCopyRows;
  const Quantisation& q = p.quantisation;
  const uint32_t shared = ptx::shared_address(memory);
  const int thread = threadIdx.x % kGroupThreads, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int steps = (static_cast<int>(p.inner) + kInner - 1) / kInner;
  const int lines = (steps + kStepsPerNewLine - 1) / kStepsPerNewLine;
  const int columns = static_cast<int>(p.columns);
  const bool interleaved = kGateUp && p.interleaved, up = kGateUp && half == 1;

  const int own_lines = kFirstLine + (half * kGroupWarps + warp) * kLines * kWarpLineBytes;  // the warp's
  const int row_in_line = swizzled<kPieces>(lane, 0);
  const uint32_t copy_to = shared + own_lines + swizzled<kPieces>(lane / kPieces, lane % kPieces);
  const uint32_t chunks = shared + swizzled<kChunks>(half * kHalfRows + thread, 0);
  const bool aligned = RowScales<kType, kScales>::aligned(q);
  // step >> read_shift has its scales read at once: a line or more.
  const int read_shift = q.group_shift - (has_four_bits(kType) ? 4 : 6);
  Ring ring;
  int line_slot = 0;  // of the line to be converted

  for (unsigned index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Place place = place_of(p, index, kMaxRows, kTileColumns<kProduct>);
    if (place.expert < 0) break;
    const int first_column = place.first_column + (kGateUp ? 0 : half * kHalfRows);
    const int own_column = min(first_column + thread, columns - 1);
    const int own_scales = static_cast<int>(
        scales_of_row(q, place.expert, weight_row<kProduct, int>(0, columns, own_column, up, interleaved)));

    // This lane copies a piece of every kCopyRows-th row.
    const int copy_column = first_column + warp * kWarpSize + lane / kPieces;
    const int row_step = kCopyRows * (interleaved ? 2 : 1) * static_cast<int>(q.row_bytes);
    const uint8_t* source =
        static_cast<const uint8_t*>(p.b) + lane % kPieces * 16 +
        q.row_bytes * weight_row<kProduct, int64_t>(place.expert, columns, copy_column, up, interleaved);
    const auto copy_line = [&](int line, int slot) {
      if (line < lines) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          ptx::copy_async(copy_to + slot * kWarpLineBytes + i * kCopyRows * kLineBytes,
                          source + int64_t{i} * row_step + line * kLineBytes, copy_column + i * kCopyRows < columns);
        }
      }
      ptx::copy_async_commit();
    };
    const auto slot_after = [](int slot, int ahead) {
      return slot + ahead < kLines ? slot + ahead : slot + ahead - kLines;
    };

    for (int line = 0; line < kLines; ++line) copy_line(line, slot_after(line_slot, line));
    RowScales<kType, kScales> scales{}, next{};
    if constexpr (kGroups) next.read(q, own_scales, 0, aligned);

    // What is read ahead is asked for behind a step's fence, which may wait for it.
    const auto convert_step = [&](auto of_line, int step) {
      const bool reads = kGroups && of_line.value == 0 && (step & ((1 << read_shift) - 1)) == 0;
      if (reads) scales = next;
      ptx::barrier_wait(empty(shared, ring.stage), ring.parity ^ 1);
      convert<T, kType, kScales, kGroups, of_line.value>(q, memory,
                                                         own_lines + line_slot * kWarpLineBytes + row_in_line,
                                                         chunks + ring.stage * kStageBytes, scales, step);
      announce(full(shared, ring.stage));
      ring.advance();
      if (reads) next.read(q, own_scales, (step >> read_shift) + 1, aligned);
    };
    for (int line = 0; line < lines; ++line) {
      ptx::copy_async_wait<kLines - 1>();
      __syncwarp();  // the line is there
      const int step = line * kStepsPerNewLine;
      convert_step(std::integral_constant<int, 0>{}, step);
      if constexpr (kStepsPerNewLine == 2) {
        if (step + 1 < steps) convert_step(std::integral_constant<int, 1>{}, step + 1);
      }
      copy_line(line + kLines, line_slot);  // all lanes have read it, and met in announce()
      line_slot = slot_after(line_slot, 1);
    }
  }
  ptx::copy_async_wait<0>();
}

// ---- consumers

// sums[m] = 64 rows of weights by kRows positions, over all of k.
template <typename T, bool kGateUp, int kRows>
__device__ __forceinline__ void multiply(float (&sums)[2][kMaxRows / 2], uint32_t shared, int group, int steps,
                                         Ring& ring) {
  constexpr int kNextBlock = (kGateUp ? kHalfRows : 64) * kInner * 2;  // from the one m64 to the other
  const int first_row = group * (kGateUp ? 64 : kHalfRows);
  const uint64_t a = ptx::wgmma_operand(shared + first_row * kInner * 2);
  const uint64_t b = ptx::wgmma_operand(shared + kWeightBytes);
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    ptx::barrier_wait(full(shared, ring.stage), ring.parity);
    const int offset = ring.stage * (kStageBytes >> 4);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kInner / 16; ++k) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        ptx::wgmma<kRows, T>(sums[m], a + offset + m * (kNextBlock >> 4) + k * 2, b + offset + k * 2, step + k > 0);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (step > 0 && threadIdx.x % kWarpSize == 0) ptx::barrier_arrive(empty(shared, previous));
    previous = ring.stage;
    ring.advance();
  }
  ptx::wgmma_wait<0>();
  if (threadIdx.x % kWarpSize == 0) ptx::barrier_arrive(empty(shared, previous));
}

// Columns [column, column + 64) of c from pairs of 16-bit results: value(i, half) is row lane / 4 + 8 * half of the
// warp's 16 columns at positions 8 i + 2 (lane % 4) and the next. They pass through shared memory kOutRows at a time.
template <typename T, typename Value>
__device__ __forceinline__ void store(const GemmParams& p, const Place& place, int column, char* staged, int group,
                                      const Value& value) {
  const int thread = threadIdx.x % kGroupThreads, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int chunk = thread % kChunks;
#pragma unroll
  for (int first = 0; first < kMaxRows; first += kOutRows) {
    if (first >= place.rows) break;
    ptx::named_barrier(1 + group, kGroupThreads);  // what was staged before has been read
#pragma unroll
    for (int i = 0; i < kOutRows / 8; i += 2) {
      const int at = first / 8 + i;
      if (at * 8 >= place.rows) break;
      const uint32_t matrices[4] = {value(at, 0), value(at, 1), value(at + 1, 0), value(at + 1, 1)};
      const int row = (i + lane / 16) * 8 + lane % 8, to = 2 * warp + lane / 8 % 2;
      ptx::store_matrices_transposed(ptx::shared_address(staged + swizzled<kChunks>(row, to)), matrices);
    }
    ptx::named_barrier(1 + group, kGroupThreads);
    if (column + chunk * 8 >= p.columns) continue;
    T* c = static_cast<T*>(p.c) + (place.first_position + first) * p.columns + column + chunk * 8;
    const int rows = min(place.rows - first, kOutRows);
    for (int row = thread / kChunks; row < rows; row += kGroupThreads / kChunks) {
      *reinterpret_cast<uint4*>(c + row * p.columns) =
          *reinterpret_cast<const uint4*>(staged + swizzled<kChunks>(row, chunk));
    }
  }
}

template <typename T, bool kGroups, Product kProduct>
__device__ __forceinline__ void consume(const GemmParams& p, char* memory, int group, unsigned tiles) {
  constexpr bool kGateUp = kProduct == Product::kGateUp;
  const uint32_t shared = ptx::shared_address(memory);
  char* staged = memory + kFirstOut + group * kOutBytes;
  const int steps = (static_cast<int>(p.inner) + kInner - 1) / kInner;
  Ring ring;
  for (unsigned index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Place place = place_of(p, index, kMaxRows, kTileColumns<kProduct>);
    if (place.expert < 0) break;
    const auto column_of = [&](int m) {  // the first of those of sums[m]
      return place.first_column + group * (kGateUp ? kOutColumns : kHalfRows) + (kGateUp ? 0 : m * kOutColumns);
    };
    // Of all experts' rows of weights, this thread's: rows lane / 4 and lane / 4 + 8 of the warp's 16 of each m64.
    const auto row_of = [&](int m, int half) {
      const int thread = threadIdx.x % kGroupThreads;
      const int row = thread / kWarpSize * 16 + thread % kWarpSize / 4 + 8 * half;
      const int column = min(column_of(m) + row, static_cast<int>(p.columns) - 1);
      return weight_row<kProduct, int>(place.expert, static_cast<int>(p.columns), column, kGateUp && m == 1,
                                       kGateUp && p.interleaved);
    };
    [[maybe_unused]] float scales[2][2];
    if constexpr (!kGroups) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          scales[m][half] = __ldg(static_cast<const float*>(p.quantisation.scales) + row_of(m, half));
        }
      }
    }
    float sums[2][kMaxRows / 2];  // those of rows beyond the tile's are neither set nor used
    static_assert(kMaxRows == 128);
    switch ((place.rows + 15) / 16) {
#define MOE_EXT_ROWS(n)                                        \
  case n / 16:                                                 \
    multiply<T, kGateUp, n>(sums, shared, group, steps, ring); \
    break;
      MOE_EXT_ROWS(16)
      MOE_EXT_ROWS(32)
      MOE_EXT_ROWS(48)
      MOE_EXT_ROWS(64)
      MOE_EXT_ROWS(80)
      MOE_EXT_ROWS(96)
      MOE_EXT_ROWS(112)
      MOE_EXT_ROWS(128)
#undef MOE_EXT_ROWS
    }
    float biases[2][2] = {};
    if (p.special) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) biases[m][half] = bias_at<T>(p.bias, row_of(m, half));
      }
    }
    // Copies: what is done to accumulators in place makes ptxas wait for every wgmma.
    const auto sums_of = [&](int m, int i, int half, float (&pair)[2]) {
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        const float sum = sums[m][4 * i + 2 * half + next];
        pair[next] = kGroups ? sum : sum * scales[m][half];
      }
    };
    if constexpr (kGateUp) {
      const auto store_h = [&](auto special) {
        store<T>(p, place, column_of(0), staged, group, [&](int i, int half) {
          float gate[2], up[2];
          sums_of(0, i, half, gate), sums_of(1, i, half, up);
          if constexpr (special.value) {
            Shaping shaping = p.shaping;
            shaping.capped = false;
#pragma unroll
            for (int next = 0; next < 2; ++next) {
              gate[next] += biases[0][half], up[next] += biases[1][half];
              shape(shaping, gate[next], up[next]);
            }
          }
          const float2 h = gated(p.activation, gate, up);
          return pack<T>(h.x, h.y);
        });
      };
      p.special ? store_h(std::true_type{}) : store_h(std::false_type{});
    } else {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        store<T>(p, place, column_of(m), staged, group, [&](int i, int half) {
          float y[2];
          sums_of(m, i, half, y);
          return pack<T>(y[0] + biases[m][half], y[1] + biases[m][half]);
        });
      }
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Compiled for sm_90a only; elsewhere it is empty, and fits_hopper() keeps it from being launched. kGroups: a scale is
// of a group of columns, not of a row.
template <typename T, WeightType kType, ScaleType kScales, bool kGroups, Product kProduct>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_packed_gemm_kernel([[maybe_unused]] GemmParams p, [[maybe_unused]] unsigned tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char memory[];
  const uint32_t shared = ptx::shared_address(memory);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(full(shared, stage), (kConverters + 1) * kGroupWarps);
      ptx::barrier_init(empty(shared, stage), kConsumers * kGroupWarps);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  // The same in all lanes, which the compiler has to know: wgmma's operands go through uniform registers.
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  if (group < kConsumers) {
    ptx::take_registers<kConsumerRegisters<kType>>();
    consume<T, kGroups, kProduct>(p, memory, group, tiles);
  } else if (group < kConsumers + kConverters) {
    ptx::give_registers<kConverterRegisters<kType>>();
    convert_all<T, kType, kScales, kGroups, kProduct>(p, memory, group - kConsumers, tiles);
  } else {
    ptx::give_registers<kProducerRegisters>();
    produce<kProduct>(p, shared, tiles);
  }
#endif
}

template <typename T, WeightType kType, ScaleType kScales, bool kGroups>
void launch_with(Product product, const GemmParams& p, int multiprocessors, cudaStream_t stream) {
  for_product(product, [&](auto which) {
    constexpr Product kProduct = which.value;
    constexpr auto kKernel = hopper_packed_gemm_kernel<T, kType, kScales, kGroups, kProduct>;
    constexpr int kColumns = kProduct == Product::kGateUp ? kHalfRows : kWeightRows;
    const unsigned tiles = grid_size(p.max_tiles * ((p.columns + kColumns - 1) / kColumns));
    allow_shared(kKernel, kSharedBytes);
    const unsigned blocks = std::min(tiles, static_cast<unsigned>(multiprocessors));
    launch_next<hopper_packed_gemm_kernel<T, kType, kScales, kGroups, kProduct>>(
        "hopper_packed_gemm_kernel", blocks, kThreads, kSharedBytes, stream, p, tiles);
  });
}

}  // namespace

void launch_hopper_packed_gemm(Product product, const GemmParams& p, DType dtype, int multiprocessors,
                               cudaStream_t stream) {
  using BFloat16 = __nv_bfloat16;
  const auto of_rows = [&](auto type, auto weights) {
    launch_with<decltype(type), weights.value, ScaleType::kFloat32, false>(product, p, multiprocessors, stream);
  };
  const auto of_groups = [&](auto weights, auto scales) {
    launch_with<BFloat16, weights.value, scales.value, true>(product, p, multiprocessors, stream);
  };
  constexpr std::integral_constant<ScaleType, ScaleType::kFloat32> kFloat32;
  constexpr std::integral_constant<ScaleType, ScaleType::kBFloat16> kBFloat16;
  constexpr std::integral_constant<ScaleType, ScaleType::kFloat16> kFloat16;
  constexpr std::integral_constant<ScaleType, ScaleType::kE8M0> kE8M0;
  const Quantisation& q = p.quantisation;
  for_weight_type(q.type, [&](auto weights) {
    constexpr WeightType kType = weights.value;
    if constexpr (kType == WeightType::kMxfp4) {
      of_groups(weights, kE8M0);
    } else if constexpr (kType == WeightType::kInt4) {
      q.scale_type == ScaleType::kFloat32    ? of_groups(weights, kFloat32)
      : q.scale_type == ScaleType::kBFloat16 ? of_groups(weights, kBFloat16)
                                             : of_groups(weights, kFloat16);
    } else {
      if constexpr (kType == WeightType::kFloat8) {
        if (q.row_shift > 0) return of_groups(weights, kFloat32);  // in blocks
      }
      for_16_bit_dtype(dtype, [&](auto type) { of_rows(type, weights); });
    }
  });
}

}  // namespace moe_ext::cuda
