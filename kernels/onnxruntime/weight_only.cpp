// WeightOnlyLinear<4|8>[Zeros][LowRank][Bias][Add][Relu|Silu|Gelu|Clamp]: a linear layer whose matrix has few
// bits, on x of any rank.
//
// Inputs: x; codes and their scales; where the name says so, what codes are counted from; with LowRank the
// factors v `[r, i]` and u `[o, r]` of float16 of a product that is added; a bias `[o]`, a residual and
// the bounds of a clamp where it says so.  Codes and zero points of 4 bits as MatMulNBits has them, `[o,
// groups, i / groups / 2]` and
// `[o, ceil(groups / 2)]`; of 8 bits, int8, `[o groups, i / groups]` and
// `[o groups]`; scales `[o groups]`.  Attributes K, inputs, and N, outputs.  All but x and the residual are
// constants.
#include "../cpu/checks.h"
#include "operator.h"
#include "packed.h"

namespace tdpass_ort {
namespace {

constexpr int64_t PANEL = 16, NIBBLES = 8;

struct LayerOperator : Operator {
  int bits;
  bool zeros, low_rank, bias, residual;
  Ending ending;
};

class WeightOnly : public Node {
 public:
  WeightOnly(const LayerOperator& op, const ort::Api* api, const ort::KernelInfo* info)
      : Node(op, api), layer_(op) {
    inputs_ = integer(api, info, "K", 0), outputs_ = integer(api, info, "N", 0);
    if (!tdpass::within(inputs_, 1, tdpass::MOST_CHANNELS) ||
        !tdpass::within(outputs_, 1, tdpass::MOST_CHANNELS))
      refuse(op, "that many inputs or outputs are not served");
    const Tensor zero_points = op.zeros ? required(info, 3) : Tensor();
    quantized(required(info, 1), required(info, 2), op.zeros ? &zero_points : nullptr);
    const size_t next = op.zeros ? 4 : 3;
    if (op.low_rank) {
      const Tensor v = required(info, next), u = required(info, next + 1);
      const int64_t rank = v.sizes.empty() ? 0 : v.sizes[0];
      thin(v, rank, inputs_), thin(u, outputs_, rank);
    }
    residual_ = (op.low_rank ? next + 2 : next) + op.bias;
    activation_ = activation(info, op.ending, residual_ + op.residual);
    if (!op.bias) return;
    const Tensor bias = required(info, op.low_rank ? next + 2 : next);
    if (bias.count() != outputs_) refuse(op, "the bias must have one number per output");
    bias_.assign(bias.as<float>(), bias.as<float>() + outputs_);
  }

  void compute(ort::KernelContext* context) {
    const Tensor x = input(context, 0);
    if (x.sizes.empty() || x.sizes.back() != inputs_)
      refuse(op_, "x has not " + std::to_string(inputs_) + " channels");
    Sizes sizes = x.sizes;
    sizes.back() = outputs_;
    const Tensor y = output(context, 0, sizes);
    const int64_t count = x.count() / inputs_;
    const tdpass_rows from = {x.data, count, inputs_, inputs_}, to = {y.data, count, outputs_, outputs_};
    tdpass_rows added = to;
    if (layer_.residual) {
      const Tensor residual = input(context, residual_);
      if (residual.sizes != sizes) refuse(op_, "the residual is not of the size of the output");
      added.data = residual.data;
    }
    const tdpass_weight_only call = {TDPASS_FLOAT32, int32_t(matrices_.size()), activation_, matrices_.data(),
        layer_.bias ? bias_.data() : nullptr, layer_.residual ? &added : nullptr};
    if (count == 0) return;
    Pool pool(api_, context, threads_, tasks_worth(double(inputs_) * outputs_ * count));
    if (tdpass_weight_only_linear(&call, &from, &to, &pool.pool) != 0)
      refuse(op_, "the kernel does not serve these sizes");
  }

 private:
  void quantized(const Tensor& codes, const Tensor& scales, const Tensor* zero_points) {
    const int64_t groups = scales.count() / outputs_, held = layer_.bits == 4 ? inputs_ / 2 : inputs_;
    const bool even = layer_.bits == 8 || inputs_ % NIBBLES == 0;
    if (groups < 1 || groups * outputs_ != scales.count() || codes.count() != outputs_ * held || !even)
      refuse(op_, "codes and scales are not of one matrix");
    Panels spread =
               spread_out(groups, [&](int64_t o, int64_t g) { return scales.as<float>()[o * groups + g]; }),
           from;
    if (zero_points) {
      const int64_t beside = layer_.bits == 4 ? (groups + 1) / 2 : groups;  // bytes of an output
      if (zero_points->count() != outputs_ * beside)
        refuse(op_, "the zero points are not those of the scales");
      from = spread_out(groups, [&](int64_t o, int64_t g) {
        if (layer_.bits == 8) return float(zero_points->as<int8_t>()[o * beside + g]);
        return float(zero_points->as<uint8_t>()[o * beside + g / 2] >> 4 * (g % 2) & 15) - 8;
      });
    }
    Panels packed = layer_.bits == 4 ? words(codes.as<uint8_t>())
                                     : pack<int8_t>(product_of(inputs_, outputs_), TDPASS_CHANNEL_LANES,
                                           codes.as<int8_t>(), false, as_it_is);
    keep({packed.get(), static_cast<float*>(spread.get()), layer_.bits == 4 ? TDPASS_NIBBLES : TDPASS_BYTES,
        int32_t(groups), int32_t(inputs_), int32_t(outputs_), static_cast<float*>(from.get())});
    owned_.push_back(std::move(packed)), owned_.push_back(std::move(spread)),
        owned_.push_back(std::move(from));
  }

  // What `number` gives for each output and group, `[ceil(o / 16)][groups][16]`.
  template <class Number> Panels spread_out(int64_t groups, const Number& number) const {
    Panels made = zeros(size_t((outputs_ + PANEL - 1) / PANEL * groups * PANEL) * sizeof(float));
    for (int64_t o = 0; o < outputs_; o++)
      for (int64_t g = 0; g < groups; g++)
        static_cast<float*>(made.get())[(o / PANEL * groups + g) * PANEL + o % PANEL] = number(o, g);
    return made;
  }

  // Distances from -8, the first of two in the low half of a byte, as words of eight in two's complement.
  Panels words(const uint8_t* codes) const {
    const int64_t deep = inputs_ / NIBBLES;
    Panels packed = zeros(size_t((outputs_ + PANEL - 1) / PANEL * deep * PANEL) * sizeof(uint32_t));
    for (int64_t o = 0; o < outputs_; o++)
      for (int64_t k = 0; k < deep; k++) {
        uint32_t word = 0;
        for (int j = 0; j < 4; j++) word |= uint32_t(codes[(o * deep + k) * 4 + j]) << 8 * j;
        static_cast<uint32_t*>(packed.get())[(o / PANEL * deep + k) * PANEL + o % PANEL] = word ^ 0x88888888u;
      }
    return packed;
  }

  void thin(const Tensor& factor, int64_t outputs, int64_t inputs) {
    const bool fits = factor.sizes == Sizes{outputs, inputs} &&
        tdpass::within(outputs, 1, tdpass::MOST_CHANNELS) && tdpass::within(inputs, 1, tdpass::MOST_CHANNELS);
    if (!fits) refuse(op_, "the factors are not of one product");
    Panels packed = pack<float>(
        product_of(inputs, outputs), TDPASS_CHANNEL_LANES, factor.as<uint16_t>(), false, widened16);
    keep({packed.get(), nullptr, TDPASS_FLOATS, 0, int32_t(inputs), int32_t(outputs), nullptr});
    owned_.push_back(std::move(packed));
  }

  void keep(const tdpass_matrix& matrix) { matrices_.push_back(matrix); }

  const LayerOperator& layer_;
  int64_t inputs_, outputs_;
  size_t residual_;  // which input that is
  tdpass_activation activation_;
  std::vector<tdpass_matrix> matrices_;
  std::vector<Panels> owned_;
  std::vector<float> bias_;
};

LayerOperator make(int bits, bool zeros, bool low_rank, bool bias, bool residual, const Ending& ending) {
  LayerOperator op{};
  op.bits = bits, op.zeros = zeros, op.low_rank = low_rank, op.bias = bias, op.residual = residual,
  op.ending = ending;
  op.title = "WeightOnlyLinear" + std::to_string(bits) + (zeros ? "Zeros" : "") +
      (low_rank ? "LowRank" : "") + (bias ? "Bias" : "") + (residual ? "Add" : "") + ending.name;
  op.reads = {ort::FLOAT, bits == 4 ? ort::UINT8 : ort::INT8, ort::FLOAT};
  if (zeros) op.reads.push_back(op.reads[1]);
  if (low_rank) op.reads.insert(op.reads.end(), 2, ort::FLOAT16);
  op.reads.insert(op.reads.end(), bias + residual + ending.bounds, ort::FLOAT);
  op.makes = {ort::FLOAT};
  serve<WeightOnly>(op);
  return op;
}

}  // namespace

void add_weight_only(Operators& all) {
  static const std::deque<LayerOperator> ops = [] {
    std::deque<LayerOperator> made;
    for (int bits : {4, 8})
      for (int with = 0; with < 16; with++)
        for (const Ending& ending : ENDINGS)
          made.push_back(make(bits, with & 8, with & 1, with & 2, with & 4, ending));
    return made;
  }();
  list(all, ops);
}

}  // namespace tdpass_ort
