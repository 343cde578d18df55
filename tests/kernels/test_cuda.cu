// The CUDA kernels below the operators: the sort against std::stable_sort, pairs against brute force, and index
// arithmetic beyond 2^31 and 2^32. For the latter an array is huge, but only the part that a kernel may touch exists:
// the kernel gets the address where the whole array would begin. Any other access is outside of every allocation, and a
// result computed at offset 0 must come out with the same bits.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "cuda/device/next_kernel.cuh"
#include "cuda/device/ptx_sm80.cuh"
#include "cuda/heuristics.h"
#include "cuda/launch.h"
#include "cuda/params.h"
#include "cuda/shapes.h"
#include "moe.h"
#include "setting.h"

using moe_ext::cuda::Choice;
using moe_ext::cuda::Device;
using moe_ext::cuda::GemmParams;
using moe_ext::cuda::kGemmShapes;
using moe_ext::cuda::kPlainRows;
using moe_ext::cuda::max_tiles;
using moe_ext::cuda::Product;
using moe_ext::cuda::Scratch;
using moe_ext::cuda::sort_blocks;
using moe_ext::cuda::Tile;
using setting::Random;

namespace {

void require_gpu() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) throw check::Skip("no CUDA device");
}

void ok(cudaError_t status) { moe_ext::cuda::check(status, "a CUDA call of the test"); }

// Device memory that goes with its owner.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t size) : size_(size) { ok(cudaMalloc(&data_, std::max<int64_t>(1, size) * sizeof(T))); }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(static_cast<int64_t>(values.size())) {
    ok(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  // Where an array would begin whose element `index` is the first of this one.
  T* as_part_from(int64_t index) const {
    return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(data_) - static_cast<uintptr_t>(index) * sizeof(T));
  }
  std::vector<T> host() const {
    std::vector<T> values(size_);
    ok(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  int64_t size_;
  T* data_ = nullptr;
};

using Bits = uint16_t;  // of a bfloat16

std::vector<Bits> random_bfloat16(Random& random, int64_t size, float bound) {
  const setting::Array values = random.array(moe_ext::DType::kBFloat16, size, bound);
  std::vector<Bits> bits(size);
  std::memcpy(bits.data(), values.data(), size * sizeof(Bits));
  return bits;
}

// What the operators get from torch's allocator.
class Scratchpad {
 public:
  ~Scratchpad() {
    for (void* pointer : pointers_) cudaFree(pointer);
  }
  Scratch scratch() {
    return {this, [](void* context, int64_t bytes) {
              void* pointer = nullptr;
              ok(cudaMalloc(&pointer, std::max<int64_t>(1, bytes)));
              static_cast<Scratchpad*>(context)->pointers_.push_back(pointer);
              return pointer;
            }};
  }

 private:
  std::vector<void*> pointers_;
};

class ForcedKernels {
 public:
  explicit ForcedKernels(const std::string& name) { setenv("MOE_EXT_CUDA_KERNELS", name.c_str(), 1); }
  ~ForcedKernels() { unsetenv("MOE_EXT_CUDA_KERNELS"); }
};

// Those that run here: MOE_EXT_CUDA_KERNELS can force each.
std::vector<std::string> all_kernels() {
  std::vector<std::string> kernels = {"small_batch", "tall", "flat", "narrow", "plain"};
  if (moe_ext::cuda::current_device().wgmma) kernels.insert(kernels.end(), {"hopper", "hopper_pairs"});
  return kernels;
}

// Multiprocessors and shared memory of an A100, an H100 (without and with wgmma), and an RTX 4090.
constexpr Device kA100{108, 164 * 1024, 163 * 1024, false};
constexpr Device kH100{132, 228 * 1024, 227 * 1024, false};
constexpr Device kH100Wgmma{132, 228 * 1024, 227 * 1024, true};
constexpr Device kRtx4090{128, 100 * 1024, 99 * 1024, false};

moe_ext::ExpertsParams shaped(int64_t tokens, int64_t hidden, int64_t intermediate, int64_t num_experts,
                              int64_t top_k) {
  moe_ext::ExpertsParams p{};
  p.tokens = tokens;
  p.hidden = hidden;
  p.intermediate = intermediate;
  p.num_experts = num_experts;
  p.top_k = top_k;
  p.dtype = moe_ext::DType::kBFloat16;
  return p;
}

}  // namespace

// ---- choices

TEST("two blocks of a small batch fit a multiprocessor of every device") {
  for (const Device& device : {kA100, kH100, kRtx4090}) {
    for (const int64_t tokens : {1, 4, 8, 9, 16}) {
      for (const int64_t num_experts : {8, 64, 256}) {
        const moe_ext::ExpertsParams p = shaped(tokens, 4096, 14336, num_experts, 8);
        CHECK(moe_ext::cuda::choose(p, device, "").way == Choice::Way::kSmallBatch, tokens, " tokens");
        const int64_t dynamic = moe_ext::cuda::small_batch_shared_bytes(tokens, tokens * 8, num_experts) +
                                moe_ext::cuda::small_batch_staged_bytes(p, device);
        constexpr int64_t kStatic = 16, kOfCuda = 1024, kGranularity = 128;
        const int64_t block = (dynamic + kStatic + kGranularity - 1) / kGranularity * kGranularity + kOfCuda;
        CHECK(2 * block <= device.shared_per_multiprocessor, block, " bytes a block, ", tokens, " tokens");
      }
    }
  }
}

TEST("a small batch whose lists do not fit into shared memory takes the kernels of large ones") {
  CHECK(moe_ext::cuda::choose(shaped(16, 64, 64, 700, 700), kRtx4090, "").way == Choice::Way::kGrouped, "sm_89");
  CHECK(moe_ext::cuda::choose(shaped(16, 64, 64, 700, 700), kH100, "").way == Choice::Way::kSmallBatch, "sm_90");
}

TEST("all experts take tiles of positions for few tokens, too, and parts of tokens that bound the memory") {
  CHECK(moe_ext::cuda::choose_sorted(shaped(1, 64, 64, 8, 8), kH100, "").way == Choice::Way::kGrouped, "1 token");
  moe_ext::LayerParams p{};
  p.num_experts = 8, p.hidden = 4096, p.intermediate = 14336;
  for (const int64_t tokens : {1, 300, 5000}) {
    p.tokens = tokens;
    const int64_t part = moe_ext::cuda::all_experts_part(p);
    CHECK(part >= std::min<int64_t>(tokens, 256) && part <= tokens, part, " of ", tokens, " tokens");
    CHECK(part * p.num_experts * (p.hidden + p.intermediate) * 4 <= int64_t{2} << 30, part, " tokens");
  }
}

TEST("the tile shape follows the rows of an expert and the blocks that a device runs at once") {
  const auto down_shape = [](const moe_ext::ExpertsParams& p, const Device& device) {
    return moe_ext::cuda::choose(p, device, "").down_shape;
  };
  CHECK(down_shape(shaped(8192, 4096, 14336, 8, 2), kH100) == moe_ext::cuda::kTall, "many rows, many columns");
  CHECK(down_shape(shaped(512, 4096, 14336, 8, 2), kA100) == moe_ext::cuda::kFlat,
        "two waves of tall, the second short");
  CHECK(down_shape(shaped(64, 1024, 3584, 8, 2), kH100) == moe_ext::cuda::kNarrow, "few columns");
}

TEST("wgmma takes batches that are not small where the device and the sizes allow it") {
  const auto choice = [](const moe_ext::ExpertsParams& p, const Device& device, const char* forced = "") {
    return moe_ext::cuda::choose(p, device, forced);
  };
  const moe_ext::ExpertsParams large = shaped(4096, 4096, 14336, 8, 2);
  CHECK(choice(large, kH100Wgmma).gate_up_shape == moe_ext::cuda::kHopper, "gate_up");
  CHECK(choice(large, kH100Wgmma).down_shape == moe_ext::cuda::kHopper, "down");
  CHECK(choice(large, kH100Wgmma).down_rows == moe_ext::cuda::kHopperRows, "rows of the sort's tiles");
  const Choice pairs = choice(large, kH100Wgmma, "hopper_pairs");
  CHECK(pairs.down_shape == moe_ext::cuda::kHopperPairs, "two blocks a tile");
  CHECK(pairs.down_rows == 2 * moe_ext::cuda::kHopperRows, "rows of the sort's tiles");
  CHECK(choice(shaped(1024, 4096, 14336, 8, 2), kH100Wgmma).down_shape == moe_ext::cuda::kHopperPairs,
        "two tiles' rows");
  CHECK(choice(shaped(1024, 1024, 3584, 8, 2), kH100Wgmma).down_shape == moe_ext::cuda::kHopper, "small experts");
  CHECK(choice(shaped(2, 4096, 14336, 8, 2), kH100Wgmma).down_shape == moe_ext::cuda::kHopper, "few rows an expert");
  CHECK(choice(shaped(9, 4096, 14336, 8, 2), kH100Wgmma, "portable").way == Choice::Way::kSmallBatch, "portable");
  CHECK(choice(large, kH100).down_shape == moe_ext::cuda::kTall, "not built for 9.0a");
  CHECK(choice(shaped(1, 4096, 14336, 8, 2), kH100Wgmma).way == Choice::Way::kSmallBatch, "a token");
  CHECK(choice(shaped(8, 1024, 3584, 8, 2), kH100Wgmma).way == Choice::Way::kSmallBatch, "few weights to read");
  CHECK(choice(shaped(17, 64, 64, 8, 2), kH100Wgmma).way == Choice::Way::kGrouped, "no small batch");
  CHECK(choice(shaped(4096, 4100, 14336, 8, 2), kH100Wgmma).way == Choice::Way::kPlain, "H is no multiple of 8");
  // 2^21 tokens, 4 slots each: 2^23 rows of h, 2^31 pieces of 8 elements or more in them.
  CHECK(choice(shaped(1 << 21, 1024, 2048, 8, 4), kH100Wgmma).down_shape == moe_ext::cuda::kTall, "too many rows");
  CHECK(choice(shaped(4096, 1 << 20, 64, 4096, 2), kH100Wgmma).down_shape < moe_ext::cuda::kHopper, "2^32 weight rows");
}

TEST("wgmma takes biases, limits and transposed weights, but no caps and no experts without gate, and says so") {
  const auto choice = [](const moe_ext::ExpertsParams& p) { return moe_ext::cuda::choose(p, kH100Wgmma, ""); };
  const auto said = [](const moe_ext::ExpertsParams& p) { return moe_ext::cuda::describe(p, kH100Wgmma, ""); };
  const auto unmeasured = [&](const moe_ext::ExpertsParams& p) {
    return choice(p).down_shape == moe_ext::cuda::kHopper &&
           said(p).find("not measured, but of plain") != std::string::npos;
  };
  const moe_ext::ExpertsParams usual = shaped(4096, 2880, 2880, 32, 4);
  CHECK(said(usual).find("not measured") == std::string::npos, said(usual));
  moe_ext::ExpertsParams p = usual;
  p.down_bias = &p;  // any address
  CHECK(unmeasured(p), "a bias: ", said(p));
  p = usual, p.formula.limit = 7.0f, p.formula.alpha = 1.702f, p.formula.up_offset = 1.0f;
  CHECK(unmeasured(p), "limits: ", said(p));
  p.formula.transposed = p.formula.interleaved = true;
  CHECK(unmeasured(p), "as gpt-oss: ", said(p));
  p.tokens = 1;
  CHECK(unmeasured(p), "one token of gpt-oss, which small_batch does not know: ", said(p));
  p = usual, p.formula.gate_cap = 7.0f;
  CHECK(choice(p).down_shape < moe_ext::cuda::kHopper, "caps");
  p = usual, p.formula.gated = false;
  CHECK(choice(p).down_shape < moe_ext::cuda::kHopper, "no gate");
}

TEST("down's k is cut so that no part is empty and blocks have work") {
  for (const int64_t intermediate : {8, 256, 768, 1032, 2816, 3584, 4616, 14336}) {
    for (const int64_t hidden : {64, 1024, 4096}) {
      for (const int64_t blocks : {1, 216, 264, 10000}) {
        const moe_ext::ExpertsParams p = shaped(1, hidden, intermediate, 8, 2);
        const int64_t length = moe_ext::cuda::small_batch_split_length(p, blocks);
        const int64_t splits = (intermediate + length - 1) / length;
        CHECK(length > 0 && length % moe_ext::cuda::small_batch_round(p.format.type) == 0, length);
        CHECK((splits - 1) * length < intermediate, splits, " parts of ", length);
        CHECK(splits == 1 || splits * 2 * ((hidden + 63) / 64) <= blocks, splits, " parts for ", blocks, " blocks");
      }
    }
  }
}

TEST("the description of a choice names the kernels and the reason") {
  const auto describe = [](const moe_ext::ExpertsParams& p, const Device& device) {
    return moe_ext::cuda::describe(p, device, moe_ext::cuda::forced_kernels());
  };
  const auto says = [](const std::string& text, const char* part) { return text.find(part) != text.npos; };
  const moe_ext::ExpertsParams large = shaped(4096, 4096, 14336, 8, 2);
  CHECK(says(describe(large, kH100Wgmma), "gate_up hopper (wgmma), tiles of 192 x 256"), describe(large, kH100Wgmma));
  CHECK(says(describe(large, kH100Wgmma), "1024 rows an expert; no shape of mma.sync"), describe(large, kH100Wgmma));
  CHECK(says(describe(large, kA100), "at 1024 rows an expert"), describe(large, kA100));
  CHECK(says(describe(large, kA100), "mma.sync, tiles of 128 x 256"), describe(large, kA100));
  CHECK(says(describe(large, kA100), "no wgmma: it needs"), describe(large, kA100));
  CHECK(says(describe(shaped(8, 4096, 14336, 8, 2), kA100), "small_batch: at most 16 tokens"), "small");
  CHECK(says(describe(shaped(1, 4096, 14336, 8, 2), kH100Wgmma), "small_batch: at most 1 tokens"), "beside wgmma");
  CHECK(says(describe(shaped(8, 1024, 3584, 8, 2), kH100Wgmma), "at most 180 MB of weights"), "few weights");
  CHECK(says(describe(shaped(99, 4100, 14336, 8, 2), kA100), "plain, without tensor cores: H and I"), "plain");
  const ForcedKernels forced("portable");
  CHECK(says(describe(large, kH100Wgmma), "(MOE_EXT_CUDA_KERNELS=portable)"), describe(large, kH100Wgmma));
  CHECK(!says(describe(large, kH100Wgmma), "hopper"), describe(large, kH100Wgmma));
  const ForcedKernels small("small_batch");
  CHECK(describe(shaped(99, 64, 64, 8, 2), kA100) == "small_batch: asked for (MOE_EXT_CUDA_KERNELS=small_batch)", "99");
}

// ---- dependent launches

namespace {

// Every block adds what all blocks of the kernel before have written: a block that does not wait gets too little.
__global__ void sum_and_spread_kernel(const int* before, int* after) {
  moe_ext::cuda::ptx::wait_for_previous_kernel();
  moe_ext::cuda::ptx::let_next_kernel_start();
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += before[i];
  after[blockIdx.x] = sum % 1000003;
}

constexpr int kChain = 12, kChainBlocks = 300;

void launch_chain(int* const (&arrays)[2], cudaStream_t stream) {
  for (int i = 0; i < kChain; ++i) {
    moe_ext::cuda::launch_next<sum_and_spread_kernel>("sum_and_spread_kernel", kChainBlocks, 32, 0, stream,
                                                      static_cast<const int*>(arrays[i % 2]), arrays[(i + 1) % 2]);
  }
}

}  // namespace

TEST("a chain of dependent launches gives what each kernel after the other gives, in and out of a graph") {
  require_gpu();
  int sum = 1;
  for (int i = 0; i < kChain; ++i) sum = static_cast<int>(int64_t{sum} * kChainBlocks % 1000003);
  const std::vector<int> ones(kChainBlocks, 1), expected(kChainBlocks, sum);
  const DeviceArray<int> first(ones), second(ones);
  int* const arrays[2] = {first.data(), second.data()};
  cudaStream_t stream;
  ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));

  launch_chain(arrays, stream);
  ok(cudaStreamSynchronize(stream));
  CHECK(first.host() == expected, "out of a graph");

  cudaGraph_t graph;
  cudaGraphExec_t executable;
  ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  launch_chain(arrays, stream);
  ok(cudaStreamEndCapture(stream, &graph));
  ok(cudaGraphInstantiate(&executable, graph, 0));
  for (int replay = 0; replay < 3; ++replay) {
    ok(cudaMemcpy(first.data(), ones.data(), ones.size() * sizeof(int), cudaMemcpyHostToDevice));
    ok(cudaGraphLaunch(executable, stream));
    ok(cudaStreamSynchronize(stream));
    CHECK(first.host() == expected, "replay ", replay);
  }
  ok(cudaGraphExecDestroy(executable));
  ok(cudaGraphDestroy(graph));
  ok(cudaStreamDestroy(stream));
}

TEST("launches overlap where the code that runs was compiled for sm_90 or newer, and only there") {
  require_gpu();
  int device = 0, major = 0;
  ok(cudaGetDevice(&device));
  ok(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  cudaFuncAttributes attributes;
  ok(cudaFuncGetAttributes(&attributes, sum_and_spread_kernel));
  CHECK(moe_ext::cuda::can_overlap<sum_and_spread_kernel>() == (major >= 9 && attributes.ptxVersion >= 90), "sm_",
        major, "0, PTX ", attributes.ptxVersion);
}

// ---- sort

TEST("the sort equals std::stable_sort, and its tiles cover every expert's positions") {
  require_gpu();
  Random random(1);
  for (const int64_t slots : {1, 31, 1000, 4096, 4097, 9000}) {
    for (const int64_t num_experts : {1, 8, 130, 1500}) {
      std::vector<int> experts(slots);
      for (int& expert : experts) expert = static_cast<int>(random.below(num_experts + 1));  // E: no expert
      if (slots == 1000) std::fill(experts.begin(), experts.end(), static_cast<int>(num_experts - 1));
      if (slots == 31) std::fill(experts.begin(), experts.end(), static_cast<int>(num_experts));

      std::vector<int> order(slots);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return experts[a] < experts[b]; });
      std::vector<int> first(num_experts + 1, 0), position_of(slots, -1);
      for (const int expert : experts) {
        for (int64_t later = expert + 1; later <= num_experts; ++later) ++first[later];
      }
      order.resize(first[num_experts]);
      for (size_t position = 0; position < order.size(); ++position) position_of[order[position]] = position;

      const DeviceArray<int> device_experts(experts);
      const DeviceArray<int> slot_of(slots), device_position_of(slots), device_first(num_experts + 1);
      const DeviceArray<int> counts(sort_blocks(slots) * num_experts);
      const int64_t tall = max_tiles(slots, num_experts, 128), flat = max_tiles(slots, num_experts, 16);
      const DeviceArray<Tile> tall_tiles(tall), flat_tiles(flat);
      moe_ext::cuda::launch_sort({device_experts.data(),
                                  false,
                                  slots,
                                  num_experts,
                                  slot_of.data(),
                                  device_position_of.data(),
                                  device_first.data(),
                                  counts.data(),
                                  {tall_tiles.data(), 128, tall},
                                  {flat_tiles.data(), 16, flat}},
                                 nullptr);
      const std::string where = std::to_string(slots) + " slots, " + std::to_string(num_experts) + " experts";
      const std::vector<int> got = slot_of.host();
      CHECK(std::equal(order.begin(), order.end(), got.begin()), "slot_of, ", where);
      CHECK(device_position_of.host() == position_of, "position_of, ", where);
      CHECK(device_first.host() == first, "first, ", where);
      for (const int64_t rows : {128, 16}) {
        const std::vector<Tile> tiles = (rows == 128 ? tall_tiles : flat_tiles).host();
        size_t at = 0;
        for (int64_t expert = 0; expert < num_experts; ++expert) {
          const int count = first[expert + 1] - first[expert];
          const int first_tile = static_cast<int>(at);
          for (int64_t tile = 0; tile < (count + rows - 1) / rows; ++tile, ++at) {
            CHECK(at < tiles.size(), "tiles, ", where);
            const Tile& t = tiles[at];
            CHECK(t.expert == expert && t.first_tile == first_tile && t.first == first[expert] && t.count == count,
                  "tile ", at, ", ", where);
          }
        }
        for (; at < tiles.size(); ++at) CHECK(tiles[at].expert == -1, "tile ", at, ", ", where);
      }
    }
  }
}

// ---- offsets beyond 32 bits

TEST("weights of an expert beyond 2^32 elements are read where they lie") {
  require_gpu();
  constexpr int64_t kExperts = 8192, kHidden = 512, kIntermediate = 544, kTokens = 3;
  constexpr int64_t kGateUp = 2 * kIntermediate * kHidden, kDown = kHidden * kIntermediate;
  static_assert((kExperts - 1) * kGateUp > int64_t{1} << 32 && (kExperts - 1) * kDown > int64_t{1} << 31);
  Random random(2);
  const DeviceArray<Bits> x(random_bfloat16(random, kTokens * kHidden, 1.0f));
  const DeviceArray<Bits> gate_up(random_bfloat16(random, kGateUp, 0.05f));
  const DeviceArray<Bits> down(random_bfloat16(random, kDown, 0.05f));
  const DeviceArray<float> weights({0.5f, 0.25f, 1.0f});

  const auto run = [&](const std::string& kernels, int64_t num_experts) {
    const ForcedKernels forced(kernels);
    const DeviceArray<int64_t> experts(std::vector<int64_t>(kTokens, num_experts - 1));
    const DeviceArray<Bits> out(kTokens * kHidden);
    moe_ext::ExpertsParams p{};
    p.x = x.data();
    p.gate_up = gate_up.as_part_from((num_experts - 1) * kGateUp);
    p.down = down.as_part_from((num_experts - 1) * kDown);
    p.experts = experts.data();
    p.weights = weights.data();
    p.out = out.data();
    p.tokens = kTokens;
    p.num_experts = num_experts;
    p.top_k = 1;
    p.hidden = kHidden;
    p.intermediate = kIntermediate;
    p.dtype = moe_ext::DType::kBFloat16;
    p.experts_are_int64 = true;
    Scratchpad memory;
    moe_ext::cuda::experts(p, memory.scratch(), nullptr);
    return out.host();
  };
  for (const std::string& kernels : all_kernels()) {
    const std::vector<Bits> near = run(kernels, 1);
    CHECK(std::count(near.begin(), near.end(), Bits{0}) < kHidden / 8, kernels, ": the result is zero");
    CHECK(run(kernels, kExperts) == near, kernels);
  }
}

TEST("rows of x, h and y beyond 2^31 elements are read and written where they lie") {
  require_gpu();
  constexpr int64_t kRows = 70, kHidden = 136, kIntermediate = 200;  // two tiles of every shape but tall
  constexpr int64_t kFarToken = 2'000'000'000, kFarPosition = 2'100'000'000;
  static_assert(kFarToken * kHidden > int64_t{1} << 32 && kFarPosition * kIntermediate > int64_t{1} << 32);
  Random random(3);
  const DeviceArray<Bits> x(random_bfloat16(random, kRows * kHidden, 1.0f));
  const DeviceArray<Bits> gate_up(random_bfloat16(random, 2 * kIntermediate * kHidden, 0.05f));
  const DeviceArray<Bits> down(random_bfloat16(random, kHidden * kIntermediate, 0.05f));

  // h as 32-bit words holds both the bfloat16 of gemm_mma.cu and the float32 of gemm_plain.cu.
  const auto run = [&](const std::string& kernels, int64_t first_token, int64_t first_position) {
    const bool plain = kernels == "plain", hopper = kernels.rfind("hopper", 0) == 0;
    const std::vector<std::string> all = all_kernels();
    const int place = static_cast<int>(std::find(all.begin(), all.end(), kernels) - all.begin());
    const int shape = kernels == "hopper" ? moe_ext::cuda::kHopper : hopper ? moe_ext::cuda::kHopperPairs : place - 1;
    const int rows = plain    ? kPlainRows[1]
                     : hopper ? moe_ext::cuda::hopper_blocks(shape) * moe_ext::cuda::kHopperRows
                              : kGemmShapes[shape].rows;
    std::vector<int> slots(kRows);
    std::iota(slots.begin(), slots.end(), static_cast<int>(first_token));
    const DeviceArray<int> slot_of(slots);
    std::vector<Tile> list((kRows + rows - 1) / rows, {0, 0, static_cast<int>(first_position), kRows});
    const DeviceArray<Tile> tiles(list);
    const int words = plain ? 2 : 1;  // 16-bit words of an element of h and y
    const DeviceArray<Bits> h(kRows * kIntermediate * words), y(kRows * kHidden * words);
    GemmParams first{};
    first.a = x.as_part_from(first_token * kHidden);
    first.b = gate_up.data();
    first.c = h.as_part_from(first_position * kIntermediate * words);
    first.slot_of = slot_of.as_part_from(first_position);
    first.tiles = tiles.data();
    first.max_tiles = static_cast<int64_t>(list.size());
    first.num_experts = first.top_k = 1;
    first.columns = kIntermediate;
    first.inner = kHidden;
    GemmParams second = first;
    second.a = first.c;
    second.b = down.data();
    second.c = y.as_part_from(first_position * kHidden * words);
    second.slot_of = nullptr;
    second.activation = moe_ext::cuda::kNoActivation;
    second.columns = kHidden;
    second.inner = kIntermediate;
    for (const Product product : {Product::kGateUp, Product::kDown}) {
      const GemmParams& p = product == Product::kGateUp ? first : second;
      if (plain) {
        moe_ext::cuda::launch_plain_gemm(product, rows, p, moe_ext::DType::kBFloat16, nullptr);
      } else if (hopper) {
        moe_ext::cuda::launch_hopper_gemm(product, shape, p, moe_ext::DType::kBFloat16, 132, nullptr);
      } else {
        moe_ext::cuda::launch_grouped_gemm(product, shape, p, moe_ext::DType::kBFloat16, nullptr);
      }
    }
    return y.host();
  };
  for (const std::string& kernels : all_kernels()) {
    if (kernels == "small_batch") continue;  // has no positions
    const std::vector<Bits> near = run(kernels, 0, 0);
    CHECK(std::count(near.begin(), near.end(), Bits{0}) < kHidden, kernels, ": the result is zero");
    const int64_t nearer =
        kernels.rfind("hopper", 0) == 0 ? 20 : 1;  // heuristics.h: it counts pieces of 8 elements in 31 bits
    static_assert(kFarToken / 20 * kHidden > int64_t{1} << 32 && kFarPosition / 20 * kIntermediate > int64_t{1} << 32);
    CHECK(run(kernels, kFarToken / nearer, kFarPosition / nearer) == near, kernels);
  }
}

TEST("combine reads rows of y beyond 2^31 elements where they lie") {
  require_gpu();
  constexpr int64_t kHidden = 1096, kTokens = 5, kSlots = 2 * kTokens, kFarPosition = 4'000'000;
  static_assert(kFarPosition * kHidden > int64_t{1} << 32);
  Random random(4);
  const DeviceArray<Bits> y(random_bfloat16(random, kSlots * kHidden, 1.0f));
  const DeviceArray<float> weights(std::vector<float>(kSlots, 0.5f));
  const auto run = [&](int64_t first_position, std::vector<float>* norms) {
    std::vector<int> positions(kSlots);
    std::iota(positions.begin(), positions.end(), static_cast<int>(first_position));
    const DeviceArray<int> position_of(positions);
    const DeviceArray<Bits> out(kTokens * kHidden);
    moe_ext::cuda::CombineParams p{};
    p.y = y.as_part_from(first_position * kHidden);
    p.position_of = position_of.data();
    p.weights = weights.data();
    p.out = out.data();
    p.tokens = kTokens, p.top_k = 2, p.hidden = kHidden;
    p.y_dtype = p.dtype = moe_ext::DType::kBFloat16;
    p.weights_dtype = moe_ext::DType::kFloat32;
    moe_ext::cuda::split_combine(&p);
    const DeviceArray<float> squares(kSlots * p.parts);
    p.squares = squares.data();
    moe_ext::cuda::launch_combine(p, nullptr);
    *norms = squares.host();
    return out.host();
  };
  std::vector<float> near_norms, far_norms;
  const std::vector<Bits> near = run(0, &near_norms);
  CHECK(run(kFarPosition, &far_norms) == near, "out");
  CHECK(near_norms == far_norms, "squares");
  CHECK(*std::min_element(near_norms.begin(), near_norms.end()) > 0, "squares are zero");
}

TEST("projections equal double-precision brute force, by every kernel, in more parts than one") {
  require_gpu();
  constexpr int64_t kExperts = 3;
  for (const auto& [dtype, tokens, hidden, intermediate] :
       std::vector<std::tuple<moe_ext::DType, int64_t, int64_t, int64_t>>{{moe_ext::DType::kBFloat16, 5, 64, 40},
                                                                          {moe_ext::DType::kFloat16, 70, 72, 48},
                                                                          {moe_ext::DType::kFloat32, 2050, 19, 5},
                                                                          {moe_ext::DType::kBFloat16, 1, 7, 3}}) {
    Random random(static_cast<uint32_t>(tokens));
    const setting::Array x = random.array(dtype, tokens * hidden, 1.0f);
    const setting::Array gate_up = random.array(dtype, kExperts * 2 * intermediate * hidden, 0.3f);
    const setting::Array down = random.array(dtype, kExperts * hidden * intermediate, 0.5f);
    for (const moe_ext::DType g_dtype : {moe_ext::DType::kFloat32, dtype}) {
      const setting::Array g = random.array(g_dtype, tokens * hidden, 1.0f);
      const DeviceArray<char> on_device[] = {DeviceArray<char>(x.bytes()), DeviceArray<char>(gate_up.bytes()),
                                             DeviceArray<char>(down.bytes()), DeviceArray<char>(g.bytes())};
      for (const std::string& kernels : all_kernels()) {
        if (kernels == "small_batch") continue;  // has no positions
        const bool any = dtype == moe_ext::DType::kFloat32 || hidden % 8 != 0 || intermediate % 8 != 0;
        if (any && kernels != "plain") continue;  // the tensor cores take none of these
        const ForcedKernels forced(kernels);
        const DeviceArray<double> out(tokens * kExperts);
        moe_ext::ProjectionParams p{};
        p.x = on_device[0].data(), p.gate_up = on_device[1].data(), p.down = on_device[2].data();
        p.tokens = tokens, p.num_experts = kExperts, p.hidden = hidden, p.intermediate = intermediate;
        p.dtype = dtype, p.formula.activation = moe_ext::Activation::kSilu;
        p.g = on_device[3].data(), p.g_dtype = g_dtype, p.out = out.data();
        Scratchpad scratchpad;
        moe_ext::cuda::projection(p, scratchpad.scratch(), nullptr);
        const std::vector<double> got = out.host();
        for (int64_t t = 0; t < tokens; t += tokens > 100 ? 683 : 1) {
          for (int64_t e = 0; e < kExperts; ++e) {
            double expected = 0.0, size = 0.0;
            std::vector<double> h(intermediate);
            for (int64_t i = 0; i < intermediate; ++i) {
              double gate = 0.0, up = 0.0;
              for (int64_t k = 0; k < hidden; ++k) {
                gate += double(gate_up[(2 * e * intermediate + i) * hidden + k]) * x[t * hidden + k];
                up += double(gate_up[((2 * e + 1) * intermediate + i) * hidden + k]) * x[t * hidden + k];
              }
              h[i] = gate / (1.0 + std::exp(-gate)) * up;
            }
            for (int64_t k = 0; k < hidden; ++k) {
              for (int64_t i = 0; i < intermediate; ++i) {
                const double addend = double(down[(e * hidden + k) * intermediate + i]) * h[i] * g[t * hidden + k];
                expected += addend;
                size += std::abs(addend);
              }
            }
            // h and y may be rounded to the dtype; products lose some float32 roundings of their addends' sizes.
            const double bound = size * (2 * setting::rounding(dtype) + 64 * 0x1p-24) + 1e-6;
            CHECK(std::abs(got[t * kExperts + e] - expected) <= bound, kernels, ": ", got[t * kExperts + e], " is not ",
                  expected, " at token ", t, ", expert ", e);
          }
        }
      }
    }
  }
}

// ---- observation

TEST("products of pairs equal brute force in float64, with a sorted list and without, beyond a block's columns") {
  require_gpu();
  constexpr int64_t kTokens = 37, kTopK = 3, kParts = 2, kSlots = kTokens * kTopK;
  for (const int64_t num_experts : {4, 130, 300}) {
    for (const bool masked : {false, true}) {
      Random random(5);
      std::vector<int> experts(kSlots);
      std::vector<float> weights(kSlots), squares(kSlots * kParts);
      std::vector<int64_t> wide(kSlots);
      for (int64_t slot = 0; slot < kSlots; ++slot) {  // E marks an empty slot, whose square is anything
        experts[slot] = static_cast<int>((slot * 7 + slot / kTopK) % (num_experts + 1));
        wide[slot] = experts[slot];
        weights[slot] = random.between(0.1f, 1.0f);
        for (int64_t part = 0; part < kParts; ++part) squares[slot * kParts + part] = random.between(0.0f, 9.0f);
      }
      const auto counted = [&](int64_t slot) { return !masked || slot / kTopK % 3 != 1; };
      std::vector<double> wanted(num_experts * num_experts, 0.5);
      const auto share = [&](int64_t slot) {
        return double{weights[slot]} * std::sqrt(double{squares[slot * kParts]} + double{squares[slot * kParts + 1]});
      };
      for (int64_t one = 0; one < kSlots; ++one) {
        for (int64_t other = one / kTopK * kTopK; other < (one / kTopK + 1) * kTopK; ++other) {
          if (!counted(one) || experts[one] == num_experts || experts[other] == num_experts) continue;
          wanted[experts[one] * num_experts + experts[other]] += share(one) * share(other);
        }
      }
      std::vector<int> order(kSlots), first(num_experts + 1);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return experts[a] < experts[b]; });
      for (int64_t expert = 0; expert <= num_experts; ++expert) {
        first[expert] =
            static_cast<int>(std::count_if(experts.begin(), experts.end(), [&](int other) { return other < expert; }));
      }
      std::vector<char> mask(kSlots);
      for (int64_t token = 0; token < kTokens; ++token) mask[token] = counted(token * kTopK);

      const DeviceArray<int64_t> device_wide(wide);
      const DeviceArray<int> device_experts(experts), slot_of(order), device_first(first);
      const DeviceArray<float> device_weights(weights), device_squares(squares);
      const DeviceArray<char> device_mask(mask);
      const DeviceArray<double> shares(kSlots);
      std::vector<std::vector<double>> results;
      for (const bool sorted : {true, false}) {
        const DeviceArray<double> pairs(std::vector<double>(num_experts * num_experts, 0.5));
        moe_ext::cuda::PairsParams p{};
        p.slots.squares = device_squares.data();
        p.slots.parts = kParts;
        p.slots.experts = sorted ? static_cast<const void*>(device_experts.data()) : device_wide.data();
        p.slots.experts_are_int64 = !sorted;
        p.slots.slot_of = sorted ? slot_of.data() : nullptr;
        p.slots.first = sorted ? device_first.data() : nullptr;
        p.slots.weights = device_weights.data();
        p.slots.weights_dtype = moe_ext::DType::kFloat32;
        p.slots.counted = masked ? reinterpret_cast<const bool*>(device_mask.data()) : nullptr;
        p.slots.slots = kSlots, p.slots.top_k = kTopK, p.slots.num_experts = num_experts;
        p.shares = shares.data();
        p.pairs = pairs.data();
        moe_ext::cuda::launch_pairs(p, nullptr);
        results.push_back(pairs.host());
      }
      CHECK(results[0] == results[1], num_experts, " experts: the ways differ");
      for (int64_t i = 0; i < num_experts * num_experts; ++i) {
        CHECK(std::fabs(results[0][i] - wanted[i]) <= 1e-12 * wanted[i], num_experts, " experts: pairs[", i, "] is ",
              results[0][i], ", expected ", wanted[i]);
        CHECK(results[0][i] == results[0][i % num_experts * num_experts + i / num_experts], "pairs are not symmetric");
      }
    }
  }
}

TEST("every way of the experts adds up pairs beside moments: an expert with itself is its g^2 ||f||^2") {
  require_gpu();
  constexpr int64_t kExperts = 5, kTopK = 2, kTokens = 13, kHidden = 64, kIntermediate = 48;
  Random random(6);
  const DeviceArray<Bits> x(random_bfloat16(random, kTokens * kHidden, 1.0f));
  const DeviceArray<Bits> gate_up(random_bfloat16(random, kExperts * 2 * kIntermediate * kHidden, 0.2f));
  const DeviceArray<Bits> down(random_bfloat16(random, kExperts * kHidden * kIntermediate, 0.2f));
  std::vector<int64_t> chosen(kTokens * kTopK);
  std::vector<float> gates(kTokens * kTopK);
  for (int64_t slot = 0; slot < kTokens * kTopK; ++slot) {
    chosen[slot] = (slot / kTopK + slot % kTopK * 2) % (kExperts + 1);  // the last marks an empty slot
    gates[slot] = random.between(0.1f, 1.0f);
  }
  const DeviceArray<int64_t> experts(chosen);
  const DeviceArray<float> weights(gates);
  for (const std::string& kernels : all_kernels()) {
    const ForcedKernels forced(kernels);
    const DeviceArray<Bits> out(kTokens * kHidden), alone(kTokens * kHidden);
    const DeviceArray<double> moments(std::vector<double>(kExperts * 9)), before(std::vector<double>(kExperts * 9));
    const DeviceArray<double> pairs(std::vector<double>(kExperts * kExperts));
    moe_ext::ExpertsParams p = shaped(kTokens, kHidden, kIntermediate, kExperts, kTopK);
    p.x = x.data();
    p.gate_up = gate_up.data();
    p.down = down.data();
    p.experts = experts.data();
    p.experts_are_int64 = true;
    p.weights = weights.data();
    p.weights_dtype = moe_ext::DType::kFloat32;
    p.formula.activation = moe_ext::Activation::kSilu;
    for (const bool with_pairs : {false, true}) {
      Scratchpad memory;
      p.out = (with_pairs ? out : alone).data();
      p.moments = (with_pairs ? moments : before).data();
      p.pairs = with_pairs ? pairs.data() : nullptr;
      moe_ext::cuda::experts(p, memory.scratch(), nullptr);
    }
    CHECK(out.host() == alone.host() && moments.host() == before.host(), kernels, ": pairs change the rest");
    const std::vector<double> sums = moments.host(), products = pairs.host();
    double off_diagonal = 0.0;
    for (int64_t i = 0; i < kExperts; ++i) {
      const double wanted = sums[i * 9 + 8];
      CHECK(wanted > 0.0 && std::fabs(products[i * kExperts + i] - wanted) <= 1e-12 * wanted, kernels, ": expert ", i,
            " is ", products[i * kExperts + i], ", expected ", wanted);
      for (int64_t j = 0; j < kExperts; ++j) off_diagonal += i == j ? 0.0 : products[i * kExperts + j];
    }
    CHECK(off_diagonal > 0.0, kernels, ": no pair was added");
  }
}

// ---- quantised weights

namespace {

using moe_ext::DType;
using moe_ext::ScaleType;
using moe_ext::WeightFormat;
using moe_ext::WeightType;

double sign_of(unsigned code, unsigned bit) { return (code & bit) != 0 ? -1.0 : 1.0; }

// What a stored value means, by the definition of its format.
double value_of(WeightType type, unsigned code) {
  switch (type) {
    case WeightType::kInt8:
      return static_cast<int8_t>(code);
    case WeightType::kInt4:
      return code;
    case WeightType::kFloat8: {  // e4m3fn
      const int exponent = static_cast<int>(code >> 3 & 15), mantissa = static_cast<int>(code & 7);
      const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
      return sign_of(code, 0x80) * magnitude;
    }
    default: {  // e2m1
      constexpr double kMagnitudes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
      return sign_of(code, 8) * kMagnitudes[code & 7];
    }
  }
}

// The weights of one product of all experts: as they are given and packed, and what they mean.
struct QuantisedWeights {
  std::vector<uint8_t> given, zeros;
  std::vector<char> scales;
  std::vector<double> values;  // (E, rows, columns)
};

QuantisedWeights quantised(Random& random, const WeightFormat& f, bool with_zeros, int64_t experts, int64_t rows,
                           int64_t columns) {
  const bool four_bits = moe_ext::has_four_bits(f.type);
  const int64_t row_bytes = four_bits ? (columns + 1) / 2 : columns, count = f.scale_count(rows, columns);
  QuantisedWeights w;
  w.given.resize(experts * rows * row_bytes);
  for (uint8_t& byte : w.given) {
    byte = static_cast<uint8_t>(random.bits());
    if (f.type == WeightType::kFloat8 && (byte & 0x7f) == 0x7f) byte ^= 1;  // not NaN
  }
  // So that weights are about as large whatever the format is.
  const double of_values = f.type == WeightType::kInt8 ? 100 : f.type == WeightType::kFloat8 ? 100 : 5;
  std::vector<double> numbers(experts * count);
  const DType dtype = f.scales == ScaleType::kFloat32    ? DType::kFloat32
                      : f.scales == ScaleType::kBFloat16 ? DType::kBFloat16
                                                         : DType::kFloat16;
  setting::Array scales(dtype, experts * count);
  for (int64_t i = 0; i < experts * count; ++i) {
    if (f.scales == ScaleType::kE8M0) {
      w.scales.push_back(static_cast<char>(120 + random.below(4)));
      numbers[i] = std::ldexp(1.0, static_cast<uint8_t>(w.scales.back()) - 127);
    } else {
      scales.set(i, static_cast<float>(random.between(0.02f, 0.2f) / of_values));
      numbers[i] = scales[i];
    }
  }
  if (f.scales != ScaleType::kE8M0) w.scales = scales.bytes();
  if (with_zeros) {
    for (int64_t i = 0; i < experts * count; ++i) w.zeros.push_back(static_cast<uint8_t>(random.below(16)));
  }
  for (int64_t row = 0; row < experts * rows; ++row) {
    const int64_t of_expert = f.row_blocks ? row % rows / WeightFormat::kRowBlock : row % rows;
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t group = f.group_size == 0 ? 0 : column / f.group_size;
      const int64_t at = row / rows * count + of_expert * f.groups(columns) + group;
      const unsigned byte = w.given[row * row_bytes + (four_bits ? column / 2 : column)];
      const unsigned code = four_bits ? byte >> column % 2 * 4 & 15 : byte;
      const double zero = f.type == WeightType::kInt4 ? (with_zeros ? w.zeros[at] : 8) : 0;
      w.values.push_back((value_of(f.type, code) - zero) * numbers[at]);
    }
  }
  return w;
}

// The same on the device.
struct DeviceWeights {
  explicit DeviceWeights(const QuantisedWeights& w, WeightType type, int64_t rows, int64_t columns)
      : scales(w.scales), zeros(w.zeros), packed(rows * moe_ext::cuda::row_bytes_of(type, columns)) {
    const DeviceArray<uint8_t> given(w.given), back(static_cast<int64_t>(w.given.size()));
    const moe_ext::PackingParams p{type, rows, columns};
    moe_ext::cuda::pack_weights(p, given.data(), packed.data(), nullptr);
    moe_ext::cuda::unpack_weights(p, packed.data(), back.data(), nullptr);
    CHECK(back.host() == w.given, "unpacked weights are not those that were packed");
  }
  const uint8_t* zeros_or_null(bool present) const { return present ? zeros.data() : nullptr; }

  DeviceArray<char> scales;
  DeviceArray<uint8_t> zeros, packed;
};

struct Kind {
  WeightFormat format;
  bool zeros;
};

const Kind kKinds[] = {
    {{WeightType::kInt8, 0, false, ScaleType::kFloat32}, false},
    {{WeightType::kInt4, 32, false, ScaleType::kBFloat16}, false},
    {{WeightType::kInt4, 64, false, ScaleType::kFloat16}, true},
    {{WeightType::kInt4, 128, false, ScaleType::kFloat32}, true},
    {{WeightType::kFloat8, 0, false, ScaleType::kFloat32}, false},
    {{WeightType::kFloat8, 128, true, ScaleType::kFloat32}, false},
    {{WeightType::kMxfp4, 32, false, ScaleType::kE8M0}, false},
};

struct LayerCase {
  int64_t tokens, hidden, intermediate;
  DType dtype;
  moe_ext::Formula formula;
  bool biases;
};

moe_ext::Formula interleaved_and_limited() {  // gpt-oss
  moe_ext::Formula f;
  f.interleaved = true;
  f.limit = 0.4f, f.alpha = 1.702f, f.up_offset = 1.0f;
  return f;
}

moe_ext::Formula without_gate() {
  moe_ext::Formula f;
  f.gated = false;
  f.activation = moe_ext::Activation::kRelu2;
  return f;
}

// The layer of a case by every kernel that takes it, against float64.
void check_quantised_layer(const LayerCase& c, const Kind& kind) {
  constexpr int64_t kExperts = 3, kTopK = 2;
  const int64_t hidden = c.hidden, intermediate = c.intermediate, rows = c.formula.rows(intermediate);
  Random random(static_cast<uint32_t>(c.tokens + hidden));
  const QuantisedWeights gate_up = quantised(random, kind.format, kind.zeros, kExperts, rows, hidden);
  const QuantisedWeights down = quantised(random, kind.format, kind.zeros, kExperts, hidden, intermediate);
  const setting::Array x = random.array(c.dtype, c.tokens * hidden, 0.3f);
  const setting::Array gate_up_bias = random.array(c.dtype, kExperts * rows, c.biases ? 0.5f : 0.0f);
  const setting::Array down_bias = random.array(c.dtype, kExperts * hidden, c.biases ? 0.5f : 0.0f);
  std::vector<int64_t> experts(c.tokens * kTopK);
  std::vector<float> weights(c.tokens * kTopK);
  for (int64_t slot = 0; slot < c.tokens * kTopK; ++slot) {
    experts[slot] = (slot / kTopK + slot % kTopK * 2) % (kExperts + 1);  // the last marks an empty slot
    if (c.tokens % 2 == 0) experts[slot] = slot % kTopK;                 // all tokens have the same experts
    weights[slot] = random.between(0.1f, 1.0f);
  }

  // ---- float64: out, the sizes of its addends and of what their roundings add up to, and the energies of channels
  std::vector<double> expected(c.tokens * hidden), size(c.tokens * hidden), rounded(c.tokens * hidden);
  std::vector<double> energies(kExperts * intermediate);
  const auto row_of = [&](int64_t expert, int64_t channel, bool up) {
    if (!c.formula.gated) return expert * rows + channel;
    return expert * rows + (c.formula.interleaved ? 2 * channel + up : channel + (up ? intermediate : 0));
  };
  for (int64_t slot = 0; slot < c.tokens * kTopK; ++slot) {
    const int64_t token = slot / kTopK, e = experts[slot];
    if (e == kExperts) continue;
    std::vector<double> h(intermediate);
    for (int64_t i = 0; i < intermediate; ++i) {
      double of_gate_and_up[2] = {};
      for (int up = 0; up < (c.formula.gated ? 2 : 1); ++up) {
        const int64_t row = row_of(e, i, up == 1);
        double sum = gate_up_bias[row];
        for (int64_t k = 0; k < hidden; ++k) sum += gate_up.values[row * hidden + k] * x[token * hidden + k];
        of_gate_and_up[up] = sum;
      }
      const double limit = c.formula.limit, gate = std::min(of_gate_and_up[0], limit);
      const double up = std::min(std::max(of_gate_and_up[1], -limit), limit);
      h[i] = c.formula.gated ? gate / (1.0 + std::exp(-c.formula.alpha * gate)) * (up + c.formula.up_offset)
                             : std::max(0.0, of_gate_and_up[0]) * std::max(0.0, of_gate_and_up[0]);
      energies[e * intermediate + i] += double(weights[slot]) * weights[slot] * h[i] * h[i];
    }
    for (int64_t k = 0; k < hidden; ++k) {
      double sum = down_bias[e * hidden + k], sizes = std::abs(sum), squares = 0.0;
      for (int64_t i = 0; i < intermediate; ++i) {
        const double addend = down.values[(e * hidden + k) * intermediate + i] * h[i];
        sum += addend, sizes += std::abs(addend), squares += addend * addend;
      }
      expected[token * hidden + k] += weights[slot] * sum;
      size[token * hidden + k] += weights[slot] * sizes;
      rounded[token * hidden + k] += weights[slot] * (2 * std::abs(sum) + 2 * std::sqrt(squares));
    }
  }

  // ---- every kernel
  const DeviceWeights first(gate_up, kind.format.type, kExperts * rows, hidden);
  const DeviceWeights second(down, kind.format.type, kExperts * hidden, intermediate);
  const DeviceArray<char> on_device[] = {DeviceArray<char>(x.bytes()), DeviceArray<char>(gate_up_bias.bytes()),
                                         DeviceArray<char>(down_bias.bytes())};
  const DeviceArray<int64_t> device_experts(experts);
  const DeviceArray<float> device_weights(weights);
  const bool any = c.dtype == DType::kFloat32 || hidden % 8 != 0 || intermediate % 8 != 0;
  const bool wgmma = moe_ext::cuda::current_device().wgmma && c.formula.gated &&
                     (c.dtype == DType::kBFloat16 || kind.format.group_size == 0);
  for (const std::string kernels : {"small_batch", "flat", "narrow", "hopper", "plain"}) {
    if (any && kernels != "plain") continue;
    if (kernels == "hopper" && !wgmma) continue;
    if (kernels == "small_batch" && (!c.formula.gated || c.tokens > 20)) continue;
    const ForcedKernels forced(kernels);
    const int64_t bytes = c.tokens * hidden * element_size(c.dtype);
    const DeviceArray<char> out(bytes), alone(bytes);
    const DeviceArray<double> moments(std::vector<double>(kExperts * 9)),
        channels(std::vector<double>(kExperts * intermediate));
    moe_ext::ExpertsParams p = shaped(c.tokens, hidden, intermediate, kExperts, kTopK);
    p.dtype = c.dtype, p.formula = c.formula, p.format = kind.format;
    p.x = on_device[0].data(), p.gate_up = first.packed.data(), p.down = second.packed.data();
    p.gate_up_scales = first.scales.data(), p.down_scales = second.scales.data();
    p.gate_up_zeros = first.zeros_or_null(kind.zeros), p.down_zeros = second.zeros_or_null(kind.zeros);
    if (c.biases) p.gate_up_bias = on_device[1].data(), p.down_bias = on_device[2].data();
    p.experts = device_experts.data(), p.experts_are_int64 = true;
    p.weights = device_weights.data(), p.weights_dtype = DType::kFloat32;
    for (const bool observed : {false, true}) {
      Scratchpad memory;
      p.out = (observed ? out : alone).data();
      if (observed) p.moments = moments.data(), p.channels = channels.data();
      moe_ext::cuda::experts(p, memory.scratch(), nullptr);
    }
    const std::string where = kernels + ", " + moe_ext::cuda::weights_named(kind.format.type) + " in groups of " +
                              std::to_string(kind.format.group_size) + ", " + setting::name_of(c.dtype) +
                              ", T = " + std::to_string(c.tokens) + ", H = " + std::to_string(hidden);
    const std::vector<char> bits = out.host();
    CHECK(bits == alone.host(), where, ": observing changes the result");
    setting::Array got(c.dtype, c.tokens * hidden);
    std::memcpy(got.data(), bits.data(), bits.size());
    for (int64_t i = 0; i < c.tokens * hidden; ++i) {
      // Every element of h (of random signs), y and the result may be rounded to the dtype, and wgmma's weights.
      const int roundings = kernels == "hopper" && kind.format.group_size != 0 ? 3 : 1;
      const double bound = rounded[i] * roundings * setting::rounding(c.dtype) + size[i] * 64 * 0x1p-24 + 1e-6;
      CHECK(std::abs(got[i] - expected[i]) <= bound, where, ": ", got[i], " is not ", expected[i], " at ", i);
    }
    const std::vector<double> sums = channels.host();
    for (int64_t i = 0; i < kExperts * intermediate; ++i) {
      const double bound = energies[i] * 4 * setting::rounding(c.dtype) + 1e-4;
      CHECK(std::abs(sums[i] - energies[i]) <= bound, where, ": channel ", i, " has ", sums[i], ", not ", energies[i]);
    }
    CHECK(moments.host()[0] > 0, where, ": no moments");
  }
}

}  // namespace

TEST(
    "quantised weights take the small batches' kernel and tiles of mma.sync or wgmma, interleaved or not, and say so") {
  for (const Kind& kind : kKinds) {
    const auto layer = [&](int64_t tokens, const moe_ext::Formula& formula) {
      moe_ext::ExpertsParams p = shaped(tokens, 2880, 2880, 32, 4);
      p.format = kind.format, p.formula = formula;
      return p;
    };
    for (const Device& device : {kA100, kH100Wgmma, kRtx4090}) {
      for (const int64_t tokens : {1, 8, 16}) {
        const moe_ext::ExpertsParams p = layer(tokens, interleaved_and_limited());
        const bool small = tokens == 1 || !device.wgmma || moe_ext::cuda::weight_bits(kind.format.type) == 4;
        CHECK((moe_ext::cuda::choose(p, device, "").way == Choice::Way::kSmallBatch) == small, tokens, " tokens");
        const int64_t staged = moe_ext::cuda::small_batch_staged_bytes(p, device);
        CHECK(staged >= moe_ext::cuda::small_batch_staged_minimum(kind.format.type), staged);
        const int64_t dynamic =
            moe_ext::cuda::small_batch_shared_bytes(tokens, tokens * 4, 32, kind.format.type) + staged;
        CHECK(2 * ((dynamic + 16 + 127) / 128 * 128 + 1024) <= device.shared_per_multiprocessor, dynamic, " bytes");
      }
      for (const bool interleaved : {false, true}) {
        const moe_ext::Formula formula = interleaved ? interleaved_and_limited() : moe_ext::Formula{};
        const Choice choice = moe_ext::cuda::choose(layer(4096, formula), device, "");
        const int expected = device.wgmma ? moe_ext::cuda::kHopper : moe_ext::cuda::kFlat;
        CHECK(choice.way == Choice::Way::kGrouped && choice.gate_up_shape == expected, "4096 tokens");
        CHECK(!device.wgmma || choice.down_rows == moe_ext::cuda::kHopperPackedRows, "rows of the sort's tiles");
      }
      moe_ext::Formula capped;
      capped.gate_cap = 7.0f;
      CHECK(moe_ext::cuda::choose(layer(4096, capped), device, "").gate_up_shape == moe_ext::cuda::kFlat, "caps");
      CHECK(moe_ext::cuda::choose(layer(20, without_gate()), device, "").way == Choice::Way::kGrouped, "no gate");
    }
    const std::string name = moe_ext::cuda::weights_named(kind.format.type);
    const std::string text = moe_ext::cuda::describe(layer(4096, {}), kH100Wgmma, "");
    CHECK(text.find(name + ", gate_up hopper (wgmma), tiles of 128 x 256") == 0, text);
    CHECK(text.find("no wgmma") == text.npos, text);
    moe_ext::ExpertsParams of_float16 = layer(4096, {});
    of_float16.dtype = DType::kFloat16;
    const bool grouped = kind.format.group_size != 0;  // whose scales multiply weights, in bfloat16
    const std::string other = moe_ext::cuda::describe(of_float16, kH100Wgmma, "");
    CHECK((other.find("no wgmma: with float16 its kernels take no scales of groups") != other.npos) == grouped, other);
    const auto refused = [&](const moe_ext::ExpertsParams& p, const char* forced) {
      try {
        moe_ext::cuda::choose(p, kH100Wgmma, forced);
      } catch (const std::exception&) {
        return true;
      }
      return false;
    };
    CHECK(refused(layer(4096, {}), "tall"), "tall");
    CHECK(!refused(layer(4096, {}), "hopper") && refused(layer(4096, without_gate()), "hopper"), "hopper");
    CHECK(refused(of_float16, "hopper") == grouped, "hopper, float16");
  }
}

TEST("quantised weights of every format give what float64 gives on their values, by every kernel") {
  require_gpu();
  for (const Kind& kind : kKinds) {
    const DType one = kind.zeros ? DType::kFloat16 : DType::kBFloat16;
    const DType other = kind.zeros ? DType::kBFloat16 : DType::kFloat16;
    check_quantised_layer({5, 136, 72, other, {}, false}, kind);  // parts of a line, of a group and of a tile
    check_quantised_layer({66, 72, 136, one, {}, false}, kind);   // two tiles of an expert
    check_quantised_layer({12, 72, 200, one, interleaved_and_limited(), true}, kind);  // more than 8 of an expert
    check_quantised_layer({9, 200, 40, other, without_gate(), true}, kind);
    check_quantised_layer({3, 1160, 8, DType::kBFloat16, {}, false}, kind);  // rounds of k, and of scales
    check_quantised_layer({2, 8, 2120, DType::kFloat16, {}, false}, kind);   // and parts of down's k
    check_quantised_layer({5, 37, 21, DType::kBFloat16, interleaved_and_limited(), true}, kind);
    check_quantised_layer({19, 133, 37, DType::kFloat32, {}, false}, kind);
    check_quantised_layer({3, 9, 5, DType::kFloat16, without_gate(), true}, kind);
  }
}
