// tensor_chain: steps on rows of channels.
#include "operators.h"

namespace torch_ops {
namespace {

using tdpass::MAX_STEPS;
constexpr int INTEGERS = 10, PANEL = 8;
static_assert(sizeof(tdpass_step) == INTEGERS * sizeof(int32_t), "a step is its integers in a row");

tdpass_rows rows(const Tensor& x) {
  const int64_t channels = x.sizes[x.dims - 1];
  return {x.data, channels ? x.numel() / channels : 0, channels, channels};
}

bool packed_for(const Tensor& weight, const tdpass_step& step) {
  if (!tdpass::within(tdpass::product({step.o, step.r}), 1, tdpass::MOST_CHANNELS)) return false;
  const int64_t wanted[] = {
      step.batched ? step.a : 1, (int64_t(step.o) * step.r + PANEL - 1) / PANEL, step.k, PANEL};
  return weight.dims == 4 && std::equal(wanted, wanted + 4, weight.sizes);
}

}  // namespace

Result tensor_chain(Arguments& in) {
  Tensor x = in.tensor();
  std::vector<Tensor> given = in.tensors();
  Tensor bias = in.optional_tensor(), residual = in.optional_tensor();
  std::vector<int64_t> integers = in.integers();
  const tdpass_activation activation = activation_of(in.text());

  const size_t count = integers.size() / INTEGERS;
  const int32_t dtype = dtype_of(x);
  if (dtype < 0 || x.dims < 1 || count < 1 || count > MAX_STEPS || integers.size() % INTEGERS ||
      given.size() != count)
    return not_served();
  if (residual && residual.dtype != x.dtype) return not_served();
  tdpass_step steps[MAX_STEPS];
  const float* weights[MAX_STEPS];
  if (!narrowed(integers, steps)) return not_served();
  for (size_t s = 0; s < count; s++) {
    Tensor weight = in.floats(given[s]);
    if (!packed_for(weight, steps[s])) return not_served();
    weights[s] = static_cast<const float*>(weight.data);
  }
  const tdpass_step &first = steps[0], &last = steps[count - 1];
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.dims);
  if (sizes.back() < 1 || sizes.back() != tdpass::product({first.a, first.k, first.b})) return not_served();
  sizes.back() = tdpass::product({last.a, last.o, last.r, last.b});
  if (!tdpass::within(sizes.back(), 1, tdpass::MOST_CHANNELS)) return not_served();
  if (residual && std::vector<int64_t>(residual.sizes, residual.sizes + residual.dims) != sizes)
    return not_served();
  Tensor shift = in.floats(bias), plain = in.contiguous(x), rest = in.contiguous(residual);
  if (shift && (shift.dims != 1 || shift.numel() != sizes.back())) return not_served();
  tdpass_rows added{};
  if (rest) added = rows(rest);
  const tdpass_program call{dtype, int32_t(count), activation, steps, weights,
      static_cast<const float*>(shift.data), rest ? &added : nullptr};
  Output y(sizes, contiguous_strides(sizes), x.dtype);
  const tdpass_rows from = rows(plain), into = rows(y.view());
  const tdpass_pool threads = pool();
  return tdpass_tensor_chain(&call, &from, &into, &threads) ? not_served() : Result(y.give());
}

}  // namespace torch_ops
