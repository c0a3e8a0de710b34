// weight_only_linear: matrices of few bits on rows of channels.
#include "operators.h"

namespace torch_ops {
namespace {

constexpr int64_t PANEL = 16, NIBBLES = 8;

tdpass_rows rows(const Tensor& x) {
  const int64_t channels = x.sizes[x.dims - 1];
  return {x.data, channels ? x.numel() / channels : 0, channels, channels};
}

bool has_shape(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return x.dims == int64_t(sizes.size()) && std::equal(sizes.begin(), sizes.end(), x.sizes);
}

// False for codes and scales that are not packed for a matrix of these sizes.
bool read(Arguments& in, const Tensor& codes, const Tensor& scales, int64_t outputs, int64_t inputs,
    tdpass_matrix& m) {
  const int32_t kinds[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_int8(),
      aoti_torch_dtype_int32(), aoti_torch_dtype_uint8()};
  const int32_t kind = int32_t(std::find(std::begin(kinds), std::end(kinds), codes.dtype) - kinds);
  const bool zeros = scales.dims == 4;
  if (kind > TDPASS_FLOAT8 || !(zeros || scales.dims == 3) || scales.dtype != kinds[TDPASS_FLOATS])
    return false;
  if (!tdpass::within(outputs, 1, tdpass::MOST_CHANNELS) || !tdpass::within(inputs, 1, tdpass::MOST_CHANNELS))
    return false;
  const int64_t panels = (outputs + PANEL - 1) / PANEL,
                depth = kind == TDPASS_NIBBLES ? (inputs + NIBBLES - 1) / NIBBLES : inputs,
                groups = scales.sizes[zeros ? 2 : 1];
  const bool fits =
      zeros ? has_shape(scales, {2, panels, groups, PANEL}) : has_shape(scales, {panels, groups, PANEL});
  if (!has_shape(codes, {panels, depth, PANEL}) || !fits || groups > tdpass::MOST_CHANNELS) return false;
  const float* spread = static_cast<const float*>(in.contiguous(scales).data);
  m = {in.contiguous(codes).data, spread, kind, int32_t(groups), int32_t(inputs), int32_t(outputs),
      zeros ? spread + panels * groups * PANEL : nullptr};
  return true;
}

}  // namespace

Result weight_only_linear(Arguments& in) {
  Tensor x = in.tensor();
  const std::vector<Tensor> codes = in.tensors(), scales = in.tensors();
  Tensor bias = in.optional_tensor(), residual = in.optional_tensor();
  const std::vector<int64_t> widths = in.integers();
  const tdpass_activation activation = activation_of(in.text());
  const int32_t dtype = dtype_of(x);

  if (dtype < 0 || x.dims < 1 || (widths.size() != 2 && widths.size() != 3) ||
      codes.size() != 2 * widths.size() - 3 || scales.size() != codes.size())
    return not_served();
  if ((residual && residual.dtype != x.dtype) || x.sizes[x.dims - 1] != widths[0]) return not_served();
  tdpass_matrix matrices[3];
  const int64_t rank = widths.size() > 2 ? widths[2] : 0,
                shapes[3][2] = {{widths[1], widths[0]}, {rank, widths[0]}, {widths[1], rank}};
  for (size_t k = 0; k < codes.size(); k++)
    if (!read(in, codes[k], scales[k], shapes[k][0], shapes[k][1], matrices[k]) || (k && matrices[k].zeros))
      return not_served();
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.dims);
  sizes.back() = widths[1];
  if (residual && std::vector<int64_t>(residual.sizes, residual.sizes + residual.dims) != sizes)
    return not_served();
  Tensor shift = in.floats(bias), plain = in.contiguous(x), rest = in.contiguous(residual);
  if (shift && (shift.dims != 1 || shift.numel() != widths[1])) return not_served();
  tdpass_rows added{};
  if (rest) added = rows(rest);
  const tdpass_weight_only call{dtype, int32_t(codes.size()), activation, matrices,
      static_cast<const float*>(shift.data), rest ? &added : nullptr};
  Output y(sizes, contiguous_strides(sizes), x.dtype);
  const tdpass_rows from = rows(plain), into = rows(y.view());
  const tdpass_pool threads = pool();
  return tdpass_weight_only_linear(&call, &from, &into, &threads) ? not_served() : Result(y.give());
}

}  // namespace torch_ops
