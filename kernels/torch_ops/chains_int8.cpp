// conv_chain_int8 and linear_chain_int8: the same kernel, on images and on rows of channels.
#include "images.h"

namespace torch_ops {
namespace {

using tdpass::MAX_STAGES;
constexpr int64_t PANEL = 16, TOGETHER = 4;

// What a call of either operator has in common; read in the order of the schema.
struct Int8Chain : Stages {
  Tensor x;
  std::vector<Tensor> given, scales, totals;
  Tensor bias, residual;
  std::vector<double> grid;

  tdpass_int8_chain call{};
  const void* weights[MAX_STAGES];
  const float* scale[MAX_STAGES];
  const int32_t* total[MAX_STAGES];
  tdpass_grid grids[MAX_STAGES + 2];
  int32_t output = 0;  // the type of y

  explicit Int8Chain(Arguments& in)
      : x(in.tensor()),
        given(in.tensors()),
        scales(in.tensors()),
        totals(in.tensors()),
        bias(in.optional_tensor()),
        residual(in.optional_tensor()),
        grid(in.numbers()) {}

  // False for what the kernel does not serve: the reference then does, or says why not.
  bool fill(Arguments& in, const std::vector<int64_t>& integers, const std::string& activation) {
    static const int32_t bytes = aoti_torch_dtype_uint8(), float32 = aoti_torch_dtype_float32();
    const bool coded = x.dtype == bytes;
    const int32_t floats = coded ? float32 : x.dtype, dtype = dtype_of(floats);
    if (dtype < 0 || !read(integers) || !take_factors(in) || !take_grids()) return false;
    output = grids[count].scale > 0 ? bytes : floats;
    if (residual && residual.dtype != (grids[count + 1].scale > 0 ? bytes : floats)) return false;
    bias = in.floats(bias);
    if (bias && (bias.dims != 1 || bias.numel() != stages[count - 1].out)) return false;
    call.chain = {coded ? int32_t(TDPASS_UINT8) : dtype, TDPASS_QUAD_LANES, count, activation_of(activation),
        stages, weights, static_cast<const float*>(bias.data), nullptr};
    call.scales = scale, call.totals = total, call.grids = grids;
    return true;
  }

 private:
  bool take_grids() {
    if (grid.size() != size_t(2 * (count + 2))) return false;
    for (int s = 0; s < count + 2; s++) {
      const double zero = grid[2 * s + 1];
      if (!(zero >= 0 && zero <= 255) || zero != int32_t(zero) || !(grid[2 * s] >= 0 && grid[2 * s] <= 1e30))
        return false;
      grids[s] = {float(grid[2 * s]), int32_t(zero)};
    }
    return true;
  }

  bool take_factors(Arguments& in) {
    static const int32_t int8 = aoti_torch_dtype_int8(), int32 = aoti_torch_dtype_int32(),
                         float32 = aoti_torch_dtype_float32();
    if (given.size() != size_t(count) || scales.size() != given.size() || totals.size() != given.size())
      return false;
    for (int s = 0; s < count; s++) {
      const tdpass_stage& t = stages[s];
      const int64_t taps = int64_t(t.kernel[0]) * t.kernel[1], depth = t.in / t.groups;
      const bool depthwise = depth == 1 && t.out == t.in && t.in > 1;
      const int64_t panels = ((depthwise ? t.out : t.out / t.groups) + PANEL - 1) / PANEL;
      std::vector<int64_t> wanted = {
          t.groups, panels, taps, (depth + TOGETHER - 1) / TOGETHER, PANEL, TOGETHER};
      if (depthwise) wanted = {panels, taps, PANEL};
      const std::vector<int64_t> row = {t.out};
      if (given[s].dtype != int8 || scales[s].dtype != float32 || totals[s].dtype != int32) return false;
      if (!same_shape(given[s], wanted) || !same_shape(scales[s], row) || !same_shape(totals[s], row))
        return false;
      weights[s] = in.contiguous(given[s]).data;
      scale[s] = static_cast<const float*>(in.contiguous(scales[s]).data);
      total[s] = static_cast<const int32_t*>(in.contiguous(totals[s]).data);
    }
    return true;
  }
};

Result run(const tdpass_int8_chain& call, const tdpass_image& from, const tdpass_image& into, Output& y) {
  const tdpass_pool threads = pool();
  return tdpass_conv_chain_int8(&call, &from, &into, &threads) ? not_served() : Result(y.give());
}

}  // namespace

Result conv_chain_int8(Arguments& in) {
  Int8Chain chain(in);
  const std::vector<int64_t> integers = in.integers();
  const std::string activation = in.text();
  if (chain.x.dims != 4 || !chain.fill(in, integers, activation)) return not_served();
  std::vector<int64_t> sizes(chain.x.sizes, chain.x.sizes + 4);
  if (!chain.convolved(sizes)) return not_served();
  tdpass_image rest{};
  if (chain.residual) {
    if (!expanded(chain.residual, sizes, rest)) return not_served();
    chain.call.chain.residual = &rest;
  }
  Output y(sizes, strides_like(chain.x, sizes), chain.output);
  return run(chain.call, image(chain.x), image(y.view()), y);
}

Result linear_chain_int8(Arguments& in) {
  Int8Chain chain(in);
  const std::vector<int64_t> widths = in.integers();
  const std::string activation = in.text();
  if (chain.x.dims < 1 || !chain.fill(in, integers_of(widths), activation)) return not_served();
  std::vector<int64_t> sizes(chain.x.sizes, chain.x.sizes + chain.x.dims);
  sizes.back() = widths.back();
  if (chain.residual && !same_shape(chain.residual, sizes)) return not_served();
  const Tensor plain = in.contiguous(chain.x), added = in.contiguous(chain.residual);
  tdpass_image rest{};
  if (added) chain.call.chain.residual = &(rest = positions(added));
  Output y(sizes, contiguous_strides(sizes), chain.output);
  return run(chain.call, positions(plain), positions(y.view()), y);
}

}  // namespace torch_ops
