// ConvChain<stages>[Bias][Add][Relu|Silu|Gelu|Clamp]: inputs x, one weight `[o, i / group, h, w]` (or `[o, i
// / group, w]`) per stage, a bias where the name says so, a residual where it says Add, and the
// bounds, constants, where it says Clamp; attributes
// group_<k>, strides_<k>, pads_<k> and dilations_<k> of stage k = 1 .., as those of Conv.
// LinearChain<stages>...: weights `[i, o]`, x of any rank.  `lanes` is 0 for channels, 1 for pixels.
// Bfloat16ConvChain..., Bfloat16LinearChain...: the same with weights of bfloat16, to which what stages read
// is rounded where the machine multiplies pairs of such, unless lanes are pixels.
#include "chain_shape.h"

namespace tdpass_ort {
namespace {

struct FloatChain : ChainOperator {
  bool half;
};

bool multiplies_pairs() {
  const std::string isa = tdpass_isa();
  return isa == "amx" || isa == "avx512bf16" || isa == "amxemulated";
}

class Chain : public ChainNode {
 public:
  Chain(const FloatChain& op, const ort::Api* api, const ort::KernelInfo* info)
      : ChainNode(op, api, info), half_(op.half), layers_(op.stages) {
    const int64_t lanes = integer(api, info, "lanes", TDPASS_CHANNEL_LANES);
    if (lanes != TDPASS_CHANNEL_LANES && lanes != TDPASS_PIXEL_LANES)
      refuse(op, "lanes is 0 or 1, not " + std::to_string(lanes));
    lanes_ =
        half_ && lanes == TDPASS_CHANNEL_LANES && multiplies_pairs() ? int(TDPASS_PAIR_LANES) : int(lanes);
    for (int s = 0; s < op.stages; s++) {
      Tensor weight;
      layers_[s].constant = constant(info, s + 1, weight);
      if (layers_[s].constant) prepare(s, weight, layers_[s].shape, layers_[s].packed);
    }
    activation_ = activation(info, op.ending, 1 + op.stages + op.bias + op.residual);
  }

  void compute(ort::KernelContext* context) {
    const int count = chain_.stages;
    const Tensor x = input(context, 0);
    std::vector<tdpass_stage> stages(count);
    std::vector<Panels> fresh(count);
    std::vector<const void*> weights(count);
    for (int s = 0; s < count; s++) {
      const Layer& layer = layers_[s];
      stages[s] = layer.shape;
      if (!layer.constant) prepare(s, input(context, s + 1), stages[s], fresh[s]);
      weights[s] = (layer.constant ? layer.packed : fresh[s]).get();
    }
    Tensor bias;
    if (chain_.bias) check_bias(bias = input(context, count + 1), stages);
    tdpass_chain chain = {
        TDPASS_FLOAT32, lanes_, count, activation_, stages.data(), weights.data(), bias.as<float>(), nullptr};

    const Sizes sizes = output_sizes(x, stages);
    const Tensor y = output(context, 0, sizes);
    tdpass_image from = view(x.data, x.sizes), to = view(y.data, sizes), added;
    if (chain_.residual) chain.residual = &(added = spread(input(context, 1 + count + chain_.bias), sizes));
    if (y.count() == 0) return;
    Pool pool(api_, context, threads_, worth(stages, to));
    if (tdpass_conv_chain(&chain, &from, &to, &pool.pool) != 0)
      refuse(op_, "the kernel does not serve these sizes");
  }

 private:
  struct Layer {
    bool constant = false;
    tdpass_stage shape{};
    Panels packed;
  };

  // The stage that a weight is, and its panels.
  void prepare(int s, const Tensor& weight, tdpass_stage& stage, Panels& packed) const {
    stage = stage_of(s, weight.sizes);
    if (!half_) packed = pack<float>(stage, lanes_, weight.as<float>(), chain_.linear, as_it_is);
    else if (lanes_ == TDPASS_PAIR_LANES && !is_depthwise(stage))
      packed = pack<uint16_t>(stage, lanes_, weight.as<uint16_t>(), chain_.linear, as_it_is);
    else packed = pack<float>(stage, lanes_, weight.as<uint16_t>(), chain_.linear, widened);
  }

  bool half_;
  int lanes_;
  std::vector<Layer> layers_;
  tdpass_activation activation_;
};

FloatChain make(bool half, bool linear, int stages, bool bias, bool residual, const Ending& ending) {
  FloatChain op{};
  op.half = half, op.linear = linear, op.stages = stages, op.bias = bias, op.residual = residual,
  op.ending = ending;
  op.title = std::string(half ? "Bfloat16" : "") + (linear ? "LinearChain" : "ConvChain") +
      std::to_string(stages) + (bias ? "Bias" : "") + (residual ? "Add" : "") + ending.name;
  op.reads.assign(1 + stages + bias + residual + ending.bounds, ort::FLOAT);
  if (half) std::fill_n(op.reads.begin() + 1, stages, ort::BFLOAT16);
  op.makes = {ort::FLOAT};
  serve<Chain>(op);
  return op;
}

}  // namespace

void add_float_chains(Operators& all) {
  static const std::deque<FloatChain> ops = [] {
    std::deque<FloatChain> made;
    for (int half = 0; half < 2; half++)
      for (int linear = 0; linear < 2; linear++)
        for (int stages = FEWEST_STAGES; stages <= MOST_STAGES; stages++)
          for (int with = 0; with < 4; with++)
            for (const Ending& ending : ENDINGS)
              made.push_back(make(half, linear, stages, with & 1, with & 2, ending));
    return made;
  }();
  list(all, ops);
}

}  // namespace tdpass_ort
