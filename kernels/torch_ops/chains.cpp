// conv_chain and linear_chain: the same kernel, on images and on rows of channels.
#include "images.h"

namespace torch_ops {
namespace {

using tdpass::MAX_STAGES;
constexpr int PANEL[] = {16, 8, 16}, PAIR_AXES = 6;

struct Chain : Stages {
  const void* weights[MAX_STAGES];

  // Throws unless the weights are packed for these stages and lanes.
  void take(Arguments& in, const std::vector<Tensor>& given, int32_t lanes) {
    if (int32_t(given.size()) != count)
      throw std::runtime_error(
          "a chain of " + std::to_string(count) + " stages has " + std::to_string(given.size()) + " weights");
    for (int s = 0; s < count; s++) {
      const tdpass_stage& t = stages[s];
      const int64_t taps = int64_t(t.kernel[0]) * t.kernel[1], depth = t.in / t.groups, width = PANEL[lanes];
      const bool depthwise = lanes != TDPASS_PIXEL_LANES && depth == 1 && t.out == t.in && t.in > 1,
                 pairs = lanes == TDPASS_PAIR_LANES && !depthwise;
      const int64_t panels = ((depthwise ? t.out : t.out / t.groups) + width - 1) / width;
      std::vector<int64_t> wanted = {t.groups, panels, taps, depth, width};
      if (lanes == TDPASS_PIXEL_LANES) wanted = {t.groups, panels, depth, taps, width};
      if (depthwise) wanted = {panels, taps, width};
      if (pairs) wanted = {t.groups, panels, taps, (depth + 1) / 2, width, 2};
      const Tensor weight = pairs ? in.halves(given[s]) : in.floats(given[s]);
      if (wanted != std::vector<int64_t>(weight.sizes, weight.sizes + weight.dims)) {
        std::string shape;
        for (int64_t size : wanted) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
        throw std::runtime_error(
            "stage " + std::to_string(s) + " of a chain takes weights packed as [" + shape + "]");
      }
      weights[s] = weight.data;
    }
  }
};

}  // namespace

Result conv_chain(Arguments& in) {
  Tensor x = in.tensor();
  std::vector<Tensor> weights = in.tensors();
  Tensor bias = in.optional_tensor(), residual = in.optional_tensor();
  std::vector<int64_t> integers = in.integers();
  const std::string activation = in.text(), lanes = in.text();

  Chain chain;
  const int32_t dtype = dtype_of(x);
  if (dtype < 0 || x.dims != 4 || !chain.read(integers) || (residual && residual.dtype != x.dtype))
    return not_served();
  tdpass_chain call{dtype, lanes_of(lanes), chain.count, activation_of(activation), chain.stages,
      chain.weights, nullptr, nullptr};
  chain.take(in, weights, call.lanes);
  std::vector<int64_t> sizes(x.sizes, x.sizes + 4);
  if (!chain.convolved(sizes)) return not_served();
  tdpass_image rest{};
  if (residual) {
    if (!expanded(residual, sizes, rest)) return not_served();
    call.residual = &rest;
  }
  Tensor shift = in.floats(bias);
  if (shift && (shift.dims != 1 || shift.numel() != sizes[1])) return not_served();
  call.bias = static_cast<const float*>(shift.data);
  Output y(sizes, strides_like(x, sizes), x.dtype);
  const tdpass_image from = image(x), into = image(y.view());
  const tdpass_pool threads = pool();
  return tdpass_conv_chain(&call, &from, &into, &threads) ? not_served() : Result(y.give());
}

Result linear_chain(Arguments& in) {
  Tensor x = in.tensor();
  std::vector<Tensor> weights = in.tensors();
  Tensor bias = in.optional_tensor(), residual = in.optional_tensor();
  const std::vector<int64_t> widths = in.integers(), integers = integers_of(widths);
  const std::string activation = in.text();

  Chain chain;
  const int32_t dtype = dtype_of(x);
  if (dtype < 0 || x.dims < 1 || !chain.read(integers) || (residual && residual.dtype != x.dtype))
    return not_served();
  const int32_t lanes =
      !weights.empty() && weights[0].dims == PAIR_AXES ? TDPASS_PAIR_LANES : TDPASS_CHANNEL_LANES;
  tdpass_chain call{
      dtype, lanes, chain.count, activation_of(activation), chain.stages, chain.weights, nullptr, nullptr};
  chain.take(in, weights, lanes);
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.dims);
  sizes.back() = widths.back();
  if (residual && !same_shape(residual, sizes)) return not_served();
  Tensor shift = in.floats(bias), plain = in.contiguous(x), rest = in.contiguous(residual);
  if (shift && (shift.dims != 1 || shift.numel() != sizes.back())) return not_served();
  call.bias = static_cast<const float*>(shift.data);
  tdpass_image rows{};
  if (rest) call.residual = &(rows = positions(rest));
  Output y(sizes, contiguous_strides(sizes), x.dtype);
  const tdpass_image from = positions(plain), into = positions(y.view());
  const tdpass_pool threads = pool();
  return tdpass_conv_chain(&call, &from, &into, &threads) ? not_served() : Result(y.give());
}

}  // namespace torch_ops
