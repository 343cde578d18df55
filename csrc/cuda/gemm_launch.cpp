#include "cuda/gemm_launch.h"

#include <cmath>

namespace moe_ext::cuda {
namespace {

// The x > 0 with act(x) = limit: no activation falls there.
float gate_limit_of(Activation activation, double limit) {
  const auto act = [&](double x) {
    switch (activation) {
      case Activation::kSilu:
        return x / (1.0 + std::exp(-x));
      case Activation::kGeluErf:
        return 0.5 * x * (1.0 + std::erf(x * std::sqrt(0.5)));
      case Activation::kGeluTanh:
        return 0.5 * x * (1.0 + std::tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)));
      case Activation::kRelu2:
        return x * x;
    }
    return x;
  };
  double low = 0.0, high = limit + 2.0;  // act(limit + 2) > limit
  for (int i = 0; i < 100; ++i) {
    const double middle = 0.5 * (low + high);
    (act(middle) < limit ? low : high) = middle;
  }
  return static_cast<float>(high);
}

// Whether gate and up are not what the products leave.
bool special_gate(const LayerParams& layer) {
  return layer.gate_up_bias != nullptr || !layer.formula.gated || !layer.formula.unlimited();
}

// Whether a layer's energies are summed from h as it is stored: no instance of gate_up's kernel does it.
bool energies_of_rows(const Choice& choice, const LayerParams& layer) {
  const bool grouped = choice.way == Choice::Way::kGrouped, hopper = grouped && is_hopper(choice.gate_up_shape);
  return !layer.formula.gated || (layer.formula.transposed && grouped) || (special_gate(layer) && hopper) ||
         (layer.format.quantised() && (!grouped || hopper));
}

GemmParams gemm_params(const PositionsParams& p, Product product) {
  const bool gate_up = product == Product::kGateUp;
  const Formula& formula = p.layer.formula;
  const TileList& list = gate_up ? p.gate_up : p.down;
  GemmParams g{};
  g.a = gate_up ? p.layer.x : p.rows.h;
  g.b = gate_up ? p.layer.gate_up : p.layer.down;
  g.c = gate_up ? p.rows.h : p.rows.y;
  g.slot_of = gate_up ? p.slot_of : nullptr;
  g.tiles = list.tiles;
  g.max_tiles = list.max_tiles;
  g.num_experts = p.layer.num_experts;
  g.top_k = p.top_k;
  g.columns = gate_up ? p.layer.intermediate : p.layer.hidden;
  g.inner = gate_up ? p.layer.hidden : p.layer.intermediate;
  g.transposed = formula.transposed;
  g.bias = gate_up ? p.layer.gate_up_bias : p.layer.down_bias;
  g.special = g.bias != nullptr;
  g.activation = kNoActivation;
  g.bias_dtype = p.layer.dtype;
  g.quantisation = quantisation_of(p.layer, product);
  if (gate_up) {
    g.activation = formula.activation;
    g.interleaved = formula.interleaved;
    g.shaping = shaping_of(formula);
    g.special = special_gate(p.layer);
    if (!energies_of_rows(p.choice, p.layer)) g.energies = p.energies;
  }
  return g;
}

// x such that 2^x is the power of two.
int exponent_of(int64_t power_of_two) {
  int exponent = 0;
  for (; power_of_two > 1; power_of_two /= 2) ++exponent;
  return exponent;
}

}  // namespace

Quantisation quantisation_of(const LayerParams& layer, Product product) {
  constexpr int kNever = 31;  // a shift that makes 0 of every column
  const WeightFormat& format = layer.format;
  const bool gate_up = product == Product::kGateUp;
  const int64_t rows = gate_up ? layer.formula.rows(layer.intermediate) : layer.hidden;
  const int64_t columns = gate_up ? layer.hidden : layer.intermediate;
  Quantisation q{};
  q.type = format.type;
  if (!format.quantised()) return q;
  q.scale_type = format.scales;
  q.scales = gate_up ? layer.gate_up_scales : layer.down_scales;
  q.zeros = gate_up ? layer.gate_up_zeros : layer.down_zeros;
  q.row_bytes = row_bytes_of(format.type, columns);
  q.groups = static_cast<int>(format.groups(columns));
  q.group_shift = format.group_size == 0 ? kNever : exponent_of(format.group_size);
  q.row_shift = format.row_blocks ? exponent_of(WeightFormat::kRowBlock) : 0;
  q.scale_rows =
      static_cast<int>(format.row_blocks ? (rows + WeightFormat::kRowBlock - 1) / WeightFormat::kRowBlock : rows);
  return q;
}

Shaping shaping_of(const Formula& f) {
  Shaping s{};
  s.gate_limit = f.limit_after ? gate_limit_of(f.activation, f.limit) : f.limit;
  s.up_limit = f.limit;
  s.scale = f.alpha;
  s.inverse_scale = 1.0f / f.alpha;
  s.offset = f.up_offset;
  s.gate_cap = f.gate_cap;
  s.up_cap = f.up_cap;
  s.capped = f.capped();
  return s;
}

Energies allocate_energies(const Choice& choice, const ExpertsParams& p, int64_t max_tiles, const Scratch& scratch) {
  const int64_t slots = p.tokens * p.top_k;
  const int shape = choice.gate_up_shape;
  Energies energies{};
  energies.parts = 1;
  energies.weights = allocate<float>(scratch, slots);
  if (choice.way == Choice::Way::kGrouped && !energies_of_rows(choice, p)) {
    energies.parts = is_hopper(shape) ? hopper_blocks(shape) : kGemmShapes[shape].warps_m;
    if (is_hopper(shape)) {
      energies.fragments = allocate<uint4>(scratch, max_tiles * energy_fragments(choice.gate_up_rows));
    }
  }
  energies.sums = allocate<float>(scratch, max_tiles * energies.parts * p.intermediate);
  return energies;
}

PositionRows allocate_rows(const Choice& choice, const LayerParams& layer, int64_t positions, const Scratch& scratch) {
  const DType dtype = choice.row_dtype(layer.dtype);
  void* h = scratch.allocate(scratch.context, positions * layer.intermediate * element_size(dtype));
  void* y = scratch.allocate(scratch.context, positions * layer.hidden * element_size(dtype));
  return {h, y, dtype};
}

void launch_gemms(const PositionsParams& p, const Device& device, cudaStream_t stream) {
  const Choice& choice = p.choice;
  const auto launch = [&](Product which, int shape, int rows) {
    const GemmParams g = gemm_params(p, which);
    const Product product = p.layer.formula.gated ? which : Product::kDown;
    if (choice.way == Choice::Way::kPlain) {
      launch_plain_gemm(product, rows, g, p.layer.dtype, stream);
    } else if (p.layer.format.quantised() && shape == kHopper) {
      launch_hopper_packed_gemm(product, g, p.layer.dtype, device.multiprocessors, stream);
    } else if (p.layer.format.quantised()) {
      launch_packed_gemm(product, shape, g, p.layer.dtype, stream);
    } else if (is_hopper(shape)) {
      launch_hopper_gemm(product, shape, g, p.layer.dtype, device.multiprocessors, stream);
    } else {
      launch_grouped_gemm(product, shape, g, p.layer.dtype, stream);
    }
  };
  launch(Product::kGateUp, choice.gate_up_shape, choice.gate_up_rows);
  if (p.energies.sums != nullptr && energies_of_rows(choice, p.layer)) {
    launch_energy_rows({p.rows.h, p.rows.dtype, p.gate_up, p.energies, p.layer.intermediate}, stream);
  }
  launch(Product::kDown, choice.down_shape, choice.down_rows);
}

}  // namespace moe_ext::cuda
