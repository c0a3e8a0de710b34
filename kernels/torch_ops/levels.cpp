// level_conv2d: a weight of levels on images.
#include "images.h"

namespace torch_ops {
namespace {

constexpr int64_t PANEL = 16, FEW = 16, MOST = 256;

// Whether codes and levels are packed for a convolution.
bool fits(const Tensor& codes, const Tensor& table, const tdpass_stage& t) {
  const int64_t rows = tdpass::product({t.in, t.kernel[0], t.kernel[1]});
  if (codes.dtype != aoti_torch_dtype_uint8() || codes.dims != 3 || table.dims != 1 ||
      !tdpass::within(table.numel(), 1, MOST))
    return false;
  const int64_t deep = table.numel() <= FEW ? (rows + 1) / 2 : rows;
  return codes.sizes[0] == (t.out + PANEL - 1) / PANEL && codes.sizes[1] == deep && codes.sizes[2] == PANEL;
}

}  // namespace

Result level_conv2d(Arguments& in) {
  Tensor x = in.tensor(), codes = in.tensor(), table = in.tensor();
  Tensor bias = in.optional_tensor(), residual = in.optional_tensor();
  const std::vector<int64_t> integers = in.integers();
  tdpass_levels call{};
  call.activation = activation_of(in.text());

  Stages stages;
  call.dtype = dtype_of(x);
  if (call.dtype < 0 || x.dims != 4 || !stages.read(integers) || stages.count != 1 ||
      (residual && residual.dtype != x.dtype))
    return not_served();
  call.shape = stages.stages[0];
  std::vector<int64_t> sizes(x.sizes, x.sizes + 4);
  if (sizes[1] != call.shape.in || !stages.convolved(sizes) || !fits(codes, table, call.shape))
    return not_served();
  tdpass_image rest{};
  if (residual) {
    if (!expanded(residual, sizes, rest)) return not_served();
    call.residual = &rest;
  }
  Tensor shift = in.floats(bias);
  if (shift && (shift.dims != 1 || shift.numel() != sizes[1])) return not_served();
  call.bias = static_cast<const float*>(shift.data);
  call.levels = int32_t(table.numel());
  call.codes = static_cast<const uint8_t*>(in.contiguous(codes).data);
  call.table = static_cast<const float*>(in.floats(table).data);
  Output y(sizes, strides_like(x, sizes), x.dtype);
  const tdpass_image from = image(x), into = image(y.view());
  const tdpass_pool threads = pool();
  return tdpass_level_conv(&call, &from, &into, &threads) ? not_served() : Result(y.give());
}

}  // namespace torch_ops
