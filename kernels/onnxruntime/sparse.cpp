// SparseConv[Bias][Add][Relu|Silu|Gelu|Clamp]: a convolution of one group whose weight `[o, i, h, w]` (or
// `[o, i, w]`) is mostly zeros.  SparseLinear...: a product with a matrix `[o, i]`, x of any rank.
//
// Inputs: x, the weight, a bias where the name says so, a residual where it says Add, and the bounds,
// constants, where it says Clamp; attributes strides_1, pads_1 and dilations_1 as those of Conv.  What keeps
// its zeros out of a model's file is decoded before: a weight that ONNX Runtime folds is packed once.
#include "blocks.h"
#include "chain_shape.h"

namespace tdpass_ort {
namespace {

class Sparse : public ChainNode {
 public:
  Sparse(const ChainOperator& op, const ort::Api* api, const ort::KernelInfo* info)
      : ChainNode(op, api, info) {
    Tensor weight;
    constant_ = constant(info, 1, weight);
    if (constant_) prepare(weight, layer_);
    activation_ = activation(info, op.ending, 2 + op.bias + op.residual);
  }

  void compute(ort::KernelContext* context) {
    const Tensor x = input(context, 0);
    Layer fresh;
    if (!constant_) prepare(input(context, 1), fresh);
    const Layer& layer = constant_ ? layer_ : fresh;
    Tensor bias;
    if (chain_.bias) check_bias(bias = input(context, 2), {layer.stage});
    const Blocks& blocks = layer.blocks;
    tdpass_sparse call = {};
    call.dtype = TDPASS_FLOAT32, call.activation = activation_, call.shape = layer.stage;
    call.width = blocks.width, call.panels = blocks.panels(), call.segments = blocks.segments,
    call.blocks = int32_t(blocks.index.size());
    call.start = blocks.start.data(), call.index = blocks.index.data(), call.rows = blocks.rows.data();
    call.values = blocks.values.data(), call.bias = bias.as<float>();

    const Sizes sizes = output_sizes(x, {layer.stage});
    const Tensor y = output(context, 0, sizes);
    tdpass_image from = view(x.data, x.sizes), to = view(y.data, sizes), added;
    if (chain_.residual) call.residual = &(added = spread(input(context, 2 + chain_.bias), sizes));
    if (y.count() == 0) return;
    const double products = double(blocks.values.size()) * to.size[0] * to.size[2] * to.size[3];
    Pool pool(api_, context, threads_, tasks_worth(products));
    if (tdpass_sparse_conv(&call, &from, &to, &pool.pool) != 0)
      refuse(op_, "the kernel does not serve these sizes");
  }

 private:
  struct Layer {
    tdpass_stage stage{};
    Blocks blocks;
  };

  void prepare(const Tensor& weight, Layer& layer) const {
    Sizes sizes = weight.sizes;
    if (chain_.linear) std::reverse(sizes.begin(), sizes.end());
    layer.stage = stage_of(0, sizes);
    if (layer.stage.groups != 1) refuse(op_, "convolutions of several groups are not served");
    layer.blocks = fastest_blocks(weight.as<float>(), layer.stage);
  }

  bool constant_;
  Layer layer_;
  tdpass_activation activation_;
};

ChainOperator make(bool linear, bool bias, bool residual, const Ending& ending) {
  ChainOperator op{};
  op.linear = linear, op.stages = 1, op.bias = bias, op.residual = residual, op.ending = ending;
  op.title = std::string(linear ? "SparseLinear" : "SparseConv") + (bias ? "Bias" : "") +
      (residual ? "Add" : "") + ending.name;
  op.reads.assign(2 + bias + residual + ending.bounds, ort::FLOAT);
  op.makes = {ort::FLOAT};
  serve<Sparse>(op);
  return op;
}

}  // namespace

void add_sparse(Operators& all) {
  static const std::deque<ChainOperator> ops = [] {
    std::deque<ChainOperator> made;
    for (int with = 0; with < 8; with++)
      for (const Ending& ending : ENDINGS) made.push_back(make(with & 4, with & 1, with & 2, ending));
    return made;
  }();
  list(all, ops);
}

}  // namespace tdpass_ort
