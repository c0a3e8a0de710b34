// Int8ConvChain<stages>[Add][Relu|Silu|Gelu|Clamp][Bytes], Int8LinearChain...: chains of layers in whole
// numbers.
//
// Inputs: x, of bytes; for every stage the scale and zero point of what it reads, its weight of int8 and the
// scales of that, one per output channel; a bias; a residual where the name says Add; the bounds where
// it says Clamp; and where it says Bytes, the scale and zero point of the output, which is of bytes then,
// else of float32.  Weights and attributes as those of ConvChain and LinearChain; all but x and the residual
// are constants.
//
// DynamicInt8LinearChain<stages>[Add][Relu|Silu|Gelu|Clamp]: the same of float32 x, without scales and zero
// points of what stages read: every row is put on a grid of its own.
//
// DynamicInt8ConvChain<stages>[Add][Relu|Silu|Gelu|Clamp]: convolutions that put all of what they read on one
// grid, as DynamicQuantizeLinear does; scales and bias may be `[o]` or with axes of one behind that.
#include <cmath>

#include "chain_shape.h"

namespace tdpass_ort {
namespace {

struct Int8ChainOperator : ChainOperator {
  bool bytes, dynamic;

  // Inputs of a stage: scale and zero point of what it reads where these are given, weight, scales of the
  // weight.
  size_t each() const { return dynamic ? 2 : 4; }
  size_t behind() const { return 1 + each() * stages; }
};

class Int8Chain : public ChainNode {
 public:
  Int8Chain(const Int8ChainOperator& op, const ort::Api* api, const ort::KernelInfo* info)
      : ChainNode(op, api, info), int8_(op), stages_(op.stages), factors_(op.stages), grids_(op.stages + 2) {
    for (int s = 0; s < op.stages; s++) {
      const size_t at = 1 + op.each() * s, end = at + op.each();
      if (!op.dynamic) grids_[s] = grid(info, at);
      factors_[s] = factor(s, required(info, end - 2), required(info, end - 1));
      weights_.push_back(factors_[s].packed.get());
      scales_.push_back(factors_[s].scale.data());
      totals_.push_back(factors_[s].total.data());
    }
    const Tensor bias = required(info, op.behind());
    if (op.dynamic && bias.count() != stages_.back().out) refuse(op, "the bias has one number per channel");
    if (!op.dynamic) check_bias(bias, stages_);
    bias_.assign(bias.as<float>(), bias.as<float>() + bias.count());
    activation_ = activation(info, op.ending, op.behind() + 1 + op.residual);
    if (op.bytes) grids_[op.stages] = grid(info, op.reads.size() - 2);
  }

  void compute(ort::KernelContext* context) {
    const Tensor x = input(context, 0);
    const Sizes sizes = output_sizes(x, stages_);
    const Tensor y = output(context, 0, sizes);
    const tdpass_image from = view(x.data, x.sizes), to = view(y.data, sizes);
    tdpass_image added;
    const int32_t dtype = int8_.dynamic ? TDPASS_FLOAT32 : TDPASS_UINT8;
    tdpass_int8_chain call = {{dtype, TDPASS_QUAD_LANES, chain_.stages, activation_, stages_.data(),
                                  weights_.data(), bias_.data(), nullptr},
        scales_.data(), totals_.data(), grids_.data()};
    if (chain_.residual) call.chain.residual = &(added = spread(input(context, int8_.behind() + 1), sizes));
    if (y.count() == 0) return;
    Pool pool(api_, context, threads_, worth(stages_, to));
    run(call, from, to, pool);
  }

 protected:
  void run(const tdpass_int8_chain& call, const tdpass_image& from, const tdpass_image& to,
      const Pool& pool) const {
    if (tdpass_conv_chain_int8(&call, &from, &to, &pool.pool) != 0)
      refuse(op_, "the kernel does not serve these sizes");
  }

  struct Factor {
    Panels packed;
    std::vector<float> scale;
    std::vector<int32_t> total;
  };

  tdpass_grid grid(const ort::KernelInfo* info, size_t at) const {
    const Tensor scale = required(info, at), zero = required(info, at + 1);
    if (scale.count() != 1 || zero.count() != 1) refuse(op_, "activations have one scale and one zero point");
    return {*scale.as<float>(), *zero.as<uint8_t>()};
  }

  Factor factor(int s, const Tensor& weight, const Tensor& scale) {
    const tdpass_stage stage = stages_[s] = stage_of(s, weight.sizes);
    if (scale.count() != stage.out) refuse(op_, "a weight has one scale per output channel");
    Factor made;
    made.packed = pack<int8_t>(stage, TDPASS_QUAD_LANES, weight.as<int8_t>(), chain_.linear, as_it_is);
    made.scale.assign(scale.as<float>(), scale.as<float>() + stage.out);
    made.total.resize(stage.out);
    const int64_t each = weight.count() / stage.out;
    for (int64_t k = 0; k < weight.count(); k++)
      made.total[chain_.linear ? k % stage.out : k / each] += weight.as<int8_t>()[k];
    return made;
  }

  const Int8ChainOperator& int8_;
  tdpass_activation activation_;
  std::vector<tdpass_stage> stages_;
  std::vector<Factor> factors_;
  std::vector<tdpass_grid> grids_;
  std::vector<const void*> weights_;
  std::vector<const float*> scales_;
  std::vector<const int32_t*> totals_;
  std::vector<float> bias_;
};

// Convolutions one by one: the grid of what one reads is known when all of that is there.
class DynamicConvChain : public Int8Chain {
 public:
  using Int8Chain::Int8Chain;

  void compute(ort::KernelContext* context) {
    const Tensor x = input(context, 0);
    const Sizes sizes = output_sizes(x, stages_);
    const Tensor y = output(context, 0, sizes);
    const tdpass_image to = view(y.data, sizes);
    tdpass_image from = view(x.data, x.sizes), added;
    if (chain_.residual) added = spread(input(context, int8_.behind() + 1), sizes);
    if (y.count() == 0) return;
    Pool pool(api_, context, threads_, worth(stages_, to));
    std::vector<float> held[2];
    for (int s = 0; s < chain_.stages; s++) {
      const tdpass_grid grids[] = {grid_of(from), {}, {}};
      if (!std::isfinite(grids[0].scale)) {
        std::fill_n(static_cast<float*>(y.data), y.count(), std::numeric_limits<float>::quiet_NaN());
        return;
      }
      const bool last = s + 1 == chain_.stages;
      const tdpass_image made = last ? to : between(from, stages_[s], held[s & 1]);
      run({{TDPASS_FLOAT32, TDPASS_QUAD_LANES, 1, last ? activation_ : tdpass_activation{}, &stages_[s],
               &weights_[s], last ? bias_.data() : nullptr, last && chain_.residual ? &added : nullptr},
              &scales_[s], &totals_[s], grids},
          from, made, pool);
      from = made;
    }
  }

 private:
  // The grid that holds zero and all numbers of an image that lies together; its scale is none where one of
  // them is none.
  static tdpass_grid grid_of(const tdpass_image& image) {
    constexpr int TOGETHER = 16;
    const float* const from = static_cast<const float*>(image.data);
    const int64_t count = image.size[0] * image.size[1] * image.size[2] * image.size[3],
                  whole = count / TOGETHER * TOGETHER;
    float low[TOGETHER] = {}, high[TOGETHER] = {}, wrong[TOGETHER] = {};
    const auto see = [&](int64_t k, int lane) {
      const float v = from[k];
      low[lane] = v < low[lane] ? v : low[lane];
      high[lane] = v > high[lane] ? v : high[lane];
      wrong[lane] += v * 0;
    };
    for (int64_t k = 0; k < whole; k += TOGETHER)
      for (int lane = 0; lane < TOGETHER; lane++) see(k + lane, lane);
    for (int64_t k = whole; k < count; k++) see(k, int(k - whole));
    const float least = *std::min_element(low, low + TOGETHER),
                most = *std::max_element(high, high + TOGETHER);
    const float none = std::accumulate(wrong, wrong + TOGETHER, 0.0f);
    const float scale = most > least ? (most - least) / 255 : 1;
    const float zero = std::isfinite(scale) ? std::nearbyint(-least / scale) : 0;
    return {scale + none, int32_t(std::min(std::max(zero, 0.0f), 255.0f))};
  }

  // What a stage makes of an image, with its channels innermost.
  static tdpass_image between(const tdpass_image& from, const tdpass_stage& t, std::vector<float>& held) {
    int64_t size[2];
    for (int a = 0; a < 2; a++)
      size[a] = (from.size[2 + a] + t.before[a] + t.after[a] - (t.kernel[a] - 1) * t.dilation[a] - 1) /
              t.stride[a] +
          1;
    held.resize(from.size[0] * t.out * size[0] * size[1]);
    return {held.data(), {from.size[0], t.out, size[0], size[1]},
        {t.out * size[0] * size[1], 1, t.out * size[1], t.out}};
  }
};

Int8ChainOperator make(
    bool linear, int stages, bool residual, const Ending& ending, bool bytes, bool dynamic = false) {
  Int8ChainOperator op{};
  op.dynamic = dynamic;
  op.linear = linear, op.stages = stages, op.bias = true, op.residual = residual, op.ending = ending,
  op.bytes = bytes;
  op.title = std::string(dynamic ? "Dynamic" : "") + (linear ? "Int8LinearChain" : "Int8ConvChain") +
      std::to_string(stages) + (residual ? "Add" : "") + ending.name + (bytes ? "Bytes" : "");
  op.reads = {dynamic ? ort::FLOAT : ort::UINT8};
  for (int s = 0; s < stages; s++) {
    if (!dynamic) op.reads.insert(op.reads.end(), {ort::FLOAT, ort::UINT8});
    op.reads.insert(op.reads.end(), {ort::INT8, ort::FLOAT});
  }
  op.reads.insert(op.reads.end(), 1 + residual + ending.bounds, ort::FLOAT);
  if (bytes) op.reads.insert(op.reads.end(), {ort::FLOAT, ort::UINT8});
  op.makes = {bytes ? ort::UINT8 : ort::FLOAT};
  if (dynamic && !linear) serve<DynamicConvChain>(op);
  else serve<Int8Chain>(op);
  return op;
}

}  // namespace

void add_int8_chains(Operators& all) {
  static const std::deque<Int8ChainOperator> ops = [] {
    std::deque<Int8ChainOperator> made;
    for (int linear = 0; linear < 2; linear++)
      for (int stages = FEWEST_STAGES; stages <= MOST_STAGES; stages++)
        for (int with = 0; with < 4; with++)
          for (const Ending& ending : ENDINGS)
            made.push_back(make(linear, stages, with & 1, ending, with & 2));
    for (int linear = 0; linear < 2; linear++)
      for (int stages = FEWEST_STAGES; stages <= MOST_STAGES; stages++)
        for (int residual = 0; residual < 2; residual++)
          for (const Ending& ending : ENDINGS)
            made.push_back(make(linear, stages, residual, ending, false, true));
    return made;
  }();
  list(all, ops);
}

}  // namespace tdpass_ort
