// sparse_conv2d and sparse_linear: blocks of weights, on images and on rows of channels.
#include "images.h"

namespace torch_ops {
namespace {

constexpr size_t INTEGERS = 13;

// A packed weight, as it is given.
struct Blocks {
  Tensor values, inputs, start, rows;

  explicit Blocks(Arguments& in)
      : values(in.tensor()), inputs(in.tensor()), start(in.tensor()), rows(in.tensor()) {}

  // False where its parts do not fit each other: the reference then says why.
  bool fill(Arguments& in, tdpass_sparse& call) {
    static const int32_t int32 = aoti_torch_dtype_int32();
    for (const Tensor* part : {&inputs, &start, &rows})
      if (part->dims != 1 || part->dtype != int32) return false;
    const int64_t width = values.dims == 2 ? values.sizes[1] : 0, panels = width ? rows.numel() / width : 0;
    const int64_t segments = panels ? (start.numel() - 1) / panels : 0;
    if (!panels || rows.numel() != panels * width || inputs.numel() != values.sizes[0] ||
        start.numel() != segments * panels + 1)
      return false;
    values = in.floats(values), inputs = in.contiguous(inputs), start = in.contiguous(start),
    rows = in.contiguous(rows);
    call.width = int32_t(width), call.panels = int32_t(panels), call.segments = int32_t(segments),
    call.blocks = int32_t(inputs.numel());
    call.start = static_cast<const int32_t*>(start.data);
    call.index = static_cast<const int32_t*>(inputs.data);
    call.rows = static_cast<const int32_t*>(rows.data);
    call.values = static_cast<const float*>(values.data);
    return true;
  }
};

constexpr int64_t THIN = 8;

bool has_shape(const Tensor& x, int64_t panels, int64_t inputs) {
  return x.dims == 3 && x.sizes[0] == panels && x.sizes[1] == inputs && x.sizes[2] == THIN;
}

// The thin product beside the blocks, where there is one; false for matrices that do not fit them.
bool add_thin(Arguments& in, const Tensor& v, const Tensor& u, const Tensor& rows, tdpass_sparse& call) {
  if (!v && !u) return true;
  if (!v || !u || u.dims != 3) return false;
  const int64_t rank = u.sizes[1], panels = (rows.numel() + THIN - 1) / THIN,
                inputs = tdpass::product({call.shape.in, call.shape.kernel[0], call.shape.kernel[1]});
  if (!tdpass::within(rank, 1, tdpass::MOST_CHANNELS) || !has_shape(v, (rank + THIN - 1) / THIN, inputs) ||
      !has_shape(u, panels, rank))
    return false;
  call.rank = int32_t(rank);
  call.v = static_cast<const float*>(in.floats(v).data);
  call.u = static_cast<const float*>(in.floats(u).data);
  return true;
}

Result run(const tdpass_sparse& call, const tdpass_image& from, const tdpass_image& into, Output& y) {
  const tdpass_pool threads = pool();
  if (y.view().numel() && tdpass_sparse_conv(&call, &from, &into, &threads)) return not_served();
  return Result(y.give());
}

}  // namespace

Result sparse_conv2d(Arguments& in) {
  Tensor x = in.tensor();
  Blocks blocks(in);
  Tensor bias = in.optional_tensor(), residual = in.optional_tensor();
  const std::vector<int64_t> integers = in.integers();
  tdpass_sparse call{};
  const std::string ending = in.text();
  Tensor v = in.optional_tensor(), u = in.optional_tensor();
  call.activation = activation_of(ending);

  const int32_t dtype = call.dtype = dtype_of(x);
  if (dtype < 0 || x.dims != 4 || integers.size() != INTEGERS || (residual && residual.dtype != x.dtype))
    return not_served();
  const tdpass_stage& t = call.shape;
  std::vector<int64_t> sizes(x.sizes, x.sizes + 4);
  if (!narrowed(integers, &call.shape) || !tdpass::is_stage(t, tdpass::MOST_REACH) || sizes[1] != t.in ||
      !convolved(sizes, t))
    return not_served();
  tdpass_image rest{};
  if (residual) {
    if (!expanded(residual, sizes, rest)) return not_served();
    call.residual = &rest;
  }
  Tensor shift = in.floats(bias);
  if (shift && (shift.dims != 1 || shift.numel() != t.out)) return not_served();
  call.bias = static_cast<const float*>(shift.data);
  if (!blocks.fill(in, call) || !add_thin(in, v, u, blocks.rows, call)) return not_served();
  Output y(sizes, strides_like(x, sizes), x.dtype);
  return run(call, image(x), image(y.view()), y);
}

Result sparse_linear(Arguments& in) {
  Tensor x = in.tensor();
  Blocks blocks(in);
  Tensor bias = in.optional_tensor(), residual = in.optional_tensor();
  const int64_t outputs = in.integer();
  tdpass_sparse call{};
  const std::string ending = in.text();
  Tensor v = in.optional_tensor(), u = in.optional_tensor();
  call.activation = activation_of(ending);

  call.dtype = dtype_of(x);
  if (call.dtype < 0 || x.dims < 1 || (residual && residual.dtype != x.dtype)) return not_served();
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.dims);
  if (!tdpass::within(sizes.back(), 1, tdpass::MOST_CHANNELS) ||
      !tdpass::within(outputs, 1, tdpass::MOST_CHANNELS))
    return not_served();
  call.shape = {int32_t(sizes.back()), int32_t(outputs), 1, {1, 1}, {1, 1}, {0, 0}, {0, 0}, {1, 1}};
  sizes.back() = outputs;
  if (residual && !same_shape(residual, sizes)) return not_served();
  Tensor shift = in.floats(bias), plain = in.contiguous(x), added = in.contiguous(residual);
  if (shift && (shift.dims != 1 || shift.numel() != outputs)) return not_served();
  call.bias = static_cast<const float*>(shift.data);
  tdpass_image rest{};
  if (added) call.residual = &(rest = positions(added));
  if (!blocks.fill(in, call) || !add_thin(in, v, u, blocks.rows, call)) return not_served();
  Output y(sizes, contiguous_strides(sizes), x.dtype);
  return run(call, positions(plain), positions(y.view()), y);
}

}  // namespace torch_ops
