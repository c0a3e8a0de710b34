// conv_chain and linear_chain: the same kernel, on images and on rows of channels.
#include <cstring>

#include "operators.h"

namespace torch_ops {
namespace {

constexpr int INTEGERS = 13, MAX_STAGES = 6, PANEL[] = {16, 8};
static_assert(sizeof(tdpass_stage) == INTEGERS * sizeof(int32_t), "a stage is its integers in a row");

struct Chain {
  int32_t count = 0;
  tdpass_stage stages[MAX_STAGES];
  const float* weights[MAX_STAGES];

  // False where it is too long for the kernel.
  bool read(const std::vector<int64_t>& integers) {
    if (integers.empty() || integers.size() % INTEGERS || integers.size() > INTEGERS * MAX_STAGES) return false;
    count = int32_t(integers.size()) / INTEGERS;
    std::vector<int32_t> narrow(integers.begin(), integers.end());
    std::memcpy(stages, narrow.data(), narrow.size() * sizeof(int32_t));
    for (int s = 0; s < count; s++)
      if (stages[s].in < 1 || stages[s].out < 1 || stages[s].groups < 1 || stages[s].stride[0] < 1 || stages[s].stride[1] < 1) return false;
    return true;
  }

  // Throws unless the weights are packed for these stages and lanes.
  void take(Arguments& in, const std::vector<Tensor>& given, int32_t lanes) {
    if (int32_t(given.size()) != count)
      throw std::runtime_error("a chain of " + std::to_string(count) + " stages has " + std::to_string(given.size()) + " weights");
    for (int s = 0; s < count; s++) {
      const tdpass_stage& t = stages[s];
      Tensor weight = in.floats(given[s]);
      const int64_t taps = int64_t(t.kernel[0]) * t.kernel[1], depth = t.in / t.groups, width = PANEL[lanes];
      const bool depthwise = lanes == TDPASS_CHANNEL_LANES && depth == 1 && t.out == t.in && t.in > 1;
      const int64_t panels = ((depthwise ? t.out : t.out / t.groups) + width - 1) / width;
      std::vector<int64_t> wanted = {t.groups, panels, lanes == TDPASS_CHANNEL_LANES ? taps : depth, lanes == TDPASS_CHANNEL_LANES ? depth : taps, width};
      if (depthwise) wanted = {panels, taps, width};
      if (wanted != std::vector<int64_t>(weight.sizes, weight.sizes + weight.dims)) {
        std::string shape;
        for (int64_t size : wanted) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
        throw std::runtime_error("stage " + std::to_string(s) + " of a chain takes weights packed as [" + shape + "]");
      }
      weights[s] = static_cast<const float*>(weight.data);
    }
  }
};

bool channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (x.sizes[d] == 1) continue;
    if (x.strides[d] != expected) return false;
    expected *= x.sizes[d];
  }
  return !x.contiguous();
}

tdpass_image image(const Tensor& x) {
  tdpass_image view{x.data, {}, {}};
  std::copy(x.sizes, x.sizes + 4, view.size);
  std::copy(x.strides, x.strides + 4, view.stride);
  return view;
}

// `x[..., c]`, which has no gaps, as `[1, c, 1, positions]`.
tdpass_image positions(const Tensor& x) {
  const int64_t channels = x.sizes[x.dims - 1], count = channels ? x.numel() / channels : 0;
  return {x.data, {1, channels, 1, count}, {0, 1, 0, channels}};
}

// Strides that show `given` in the shape `sizes`; false where it cannot be.
bool expanded(const Tensor& given, const std::vector<int64_t>& sizes, int64_t* strides) {
  const int64_t missing = int64_t(sizes.size()) - given.dims;
  if (missing < 0) return false;
  for (int64_t d = 0; d < int64_t(sizes.size()); d++) {
    const bool there = d >= missing;
    if (there && given.sizes[d - missing] != sizes[d] && given.sizes[d - missing] != 1) return false;
    strides[d] = there && given.sizes[d - missing] != 1 ? given.strides[d - missing] : 0;
  }
  return true;
}

bool same_shape(const Tensor& x, const std::vector<int64_t>& sizes) { return std::vector<int64_t>(x.sizes, x.sizes + x.dims) == sizes; }

}  // namespace

Result conv_chain(Arguments& in) {
  Tensor x = in.tensor();
  std::vector<Tensor> weights = in.tensors();
  Tensor bias = in.optional_tensor(), residual = in.optional_tensor();
  std::vector<int64_t> integers = in.integers();
  const std::string activation = in.text(), lanes = in.text();

  Chain chain;
  const int32_t dtype = dtype_of(x);
  if (dtype < 0 || x.dims != 4 || !chain.read(integers) || (residual && residual.dtype != x.dtype)) return not_served();
  tdpass_chain call{dtype, lanes_of(lanes), activation_of(activation), chain.count, chain.stages, chain.weights, nullptr, nullptr};
  chain.take(in, weights, call.lanes);
  std::vector<int64_t> sizes(x.sizes, x.sizes + 4);
  sizes[1] = chain.stages[chain.count - 1].out;
  for (int s = 0; s < chain.count; s++) {
    const tdpass_stage& t = chain.stages[s];
    for (int a = 0; a < 2; a++) {
      const int64_t room = sizes[2 + a] + t.before[a] + t.after[a] - int64_t(t.kernel[a] - 1) * t.dilation[a] - 1;
      if (room < 0) return not_served();
      sizes[2 + a] = room / t.stride[a] + 1;
    }
  }
  std::vector<int64_t> strides = contiguous_strides(sizes);
  if (channels_last(x)) strides = {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]};
  tdpass_image rest{};
  if (residual) {
    rest.data = residual.data;
    std::copy(sizes.begin(), sizes.end(), rest.size);
    if (!expanded(residual, sizes, rest.stride)) return not_served();
    call.residual = &rest;
  }
  Tensor shift = in.floats(bias);
  if (shift && shift.numel() != sizes[1]) return not_served();
  call.bias = static_cast<const float*>(shift.data);
  Output y(sizes, strides, x.dtype);
  const tdpass_image from = image(x), into = image(y.view());
  const tdpass_pool threads = pool();
  return tdpass_conv_chain(&call, &from, &into, &threads) ? not_served() : Result(y.give());
}

Result linear_chain(Arguments& in) {
  Tensor x = in.tensor();
  std::vector<Tensor> weights = in.tensors();
  Tensor bias = in.optional_tensor(), residual = in.optional_tensor();
  std::vector<int64_t> widths = in.integers(), integers;
  const std::string activation = in.text();

  Chain chain;
  for (size_t s = 0; s + 1 < widths.size(); s++) integers.insert(integers.end(), {widths[s], widths[s + 1], 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1});
  const int32_t dtype = dtype_of(x);
  if (dtype < 0 || x.dims < 1 || !chain.read(integers) || (residual && residual.dtype != x.dtype)) return not_served();
  tdpass_chain call{dtype, TDPASS_CHANNEL_LANES, activation_of(activation), chain.count, chain.stages, chain.weights, nullptr, nullptr};
  chain.take(in, weights, TDPASS_CHANNEL_LANES);
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.dims);
  sizes.back() = widths.back();
  if (residual && !same_shape(residual, sizes)) return not_served();
  Tensor shift = in.floats(bias), plain = in.contiguous(x), rest = in.contiguous(residual);
  if (shift && shift.numel() != sizes.back()) return not_served();
  call.bias = static_cast<const float*>(shift.data);
  tdpass_image rows{};
  if (rest) call.residual = &(rows = positions(rest));
  Output y(sizes, contiguous_strides(sizes), x.dtype);
  const tdpass_image from = positions(plain), into = positions(y.view());
  const tdpass_pool threads = pool();
  return tdpass_conv_chain(&call, &from, &into, &threads) ? not_served() : Result(y.give());
}

}  // namespace torch_ops
