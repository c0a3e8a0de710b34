// low_rank_lstm and low_rank_gru: a sequence through a cell.
#include <algorithm>
#include <cstring>
#include <memory>

#include "operators.h"

namespace torch_ops {
namespace {

constexpr int64_t PANEL = 16;

bool has_shape(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return x.dims == int64_t(sizes.size()) && std::equal(sizes.begin(), sizes.end(), x.sizes);
}

// A contiguous copy, which the kernel goes on from.
std::unique_ptr<Output> copied(const Tensor& state) {
  const std::vector<int64_t> sizes(state.sizes, state.sizes + state.dims);
  auto made = std::make_unique<Output>(sizes, contiguous_strides(sizes), state.dtype);
  if (state.numel()) std::memcpy(made->view().data, state.data, size_t(state.numel()) * sizeof(float));
  return made;
}

// What a kernel takes of a sequence, but for the factors; `y` in the order of steps that `reverse` asks for.
tdpass_cell cell_of(int32_t gates, int64_t rank, const Tensor& pre, const Tensor& bias, const Output& h,
    const Output* c, const Output& y, bool reverse) {
  const Tensor out = y.view();
  const int64_t steps = out.sizes[0], batch = out.sizes[1], hidden = out.sizes[2], step = batch * hidden;
  const int64_t back = reverse ? steps - 1 : 0, sign = reverse ? -1 : 1;
  return {gates, int32_t(steps), int32_t(batch), int32_t(hidden), int32_t(rank), TDPASS_FLOAT32,
      static_cast<const float*>(pre.data) + back * pre.strides[0], sign * pre.strides[0], pre.strides[1],
      nullptr, nullptr, static_cast<const float*>(bias.data), static_cast<float*>(h.view().data),
      c ? static_cast<float*>(c->view().data) : nullptr, static_cast<float*>(out.data) + back * step,
      sign * step, hidden};
}

Result run(Arguments& in, const int32_t gates) {
  Tensor pre = in.tensor(), v = in.tensor(), u = in.tensor(), bias = in.optional_tensor(), h0 = in.tensor(),
         c0;
  if (gates == 4) c0 = in.tensor();
  const bool reverse = in.boolean();

  for (const Tensor* each : {&pre, &h0, &c0})
    if (*each && dtype_of(*each) != TDPASS_FLOAT32) return not_served();
  if (pre.dims != 3 || h0.dims != 2 || v.dims != 3 || u.dims != 4) return not_served();
  const int64_t steps = pre.sizes[0], batch = pre.sizes[1], hidden = h0.sizes[1], rank = u.sizes[1];
  const int64_t groups = (hidden + PANEL - 1) / PANEL, panels = (rank + PANEL - 1) / PANEL;
  bool right = pre.sizes[2] == gates * hidden && has_shape(h0, {batch, hidden}) &&
      (!c0 || has_shape(c0, {batch, hidden}));
  right =
      right && has_shape(u, {groups, rank, gates, PANEL}) && panels && has_shape(v, {panels, hidden, PANEL});
  right = right && std::max({steps, batch, hidden, rank}) <= tdpass::MOST_CHANNELS;
  if (!right || (bias && !has_shape(bias, {gates * hidden}))) return not_served();

  if (pre.strides[2] != 1) pre = in.contiguous(pre);
  static const int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  const bool half = v.dtype == bfloat16 && u.dtype == bfloat16;
  Tensor left = half ? in.halves(v) : in.floats(v), both = half ? in.halves(u) : in.floats(u),
         shift = in.floats(bias), hidden_state = in.contiguous(h0), cell_state = in.contiguous(c0);
  const std::vector<int64_t> sizes = {steps, batch, hidden};
  Output y(sizes, contiguous_strides(sizes), pre.dtype);
  std::unique_ptr<Output> h = copied(hidden_state), c = c0 ? copied(cell_state) : nullptr;
  if (steps && batch && hidden) {
    tdpass_cell cell = cell_of(gates, rank, pre, shift, *h, c.get(), y, reverse);
    cell.dtype = half ? TDPASS_BFLOAT16 : TDPASS_FLOAT32, cell.v = left.data, cell.u = both.data;
    const tdpass_pool threads = pool();
    if (tdpass_recurrent(&cell, &threads)) return not_served();
  }
  return c ? Result(y.give(), h->give(), c->give()) : Result(y.give(), h->give());
}

// A factor of a cell in whole numbers.
struct Factor {
  Tensor weight, scale, total;
  explicit Factor(Arguments& in) : weight(in.tensor()), scale(in.tensor()), total(in.tensor()) {}

  bool packed(std::initializer_list<int64_t> shape, int64_t outputs) const {
    const bool types = weight.dtype == aoti_torch_dtype_int8() && scale.dtype == aoti_torch_dtype_float32() &&
        total.dtype == aoti_torch_dtype_int32();
    return types && has_shape(weight, shape) && has_shape(scale, {outputs}) && has_shape(total, {outputs});
  }
  void settle(Arguments& in) {
    weight = in.contiguous(weight), scale = in.contiguous(scale), total = in.contiguous(total);
  }
};

Result run_int8(Arguments& in, const int32_t gates) {
  Tensor pre = in.tensor();
  Factor v(in), u(in);
  Tensor bias = in.optional_tensor(), h0 = in.tensor(), c0;
  if (gates == 4) c0 = in.tensor();
  const bool reverse = in.boolean();

  for (const Tensor* each : {&pre, &h0, &c0})
    if (*each && dtype_of(*each) != TDPASS_FLOAT32) return not_served();
  if (pre.dims != 3 || h0.dims != 2 || v.scale.dims != 1) return not_served();
  const int64_t steps = pre.sizes[0], batch = pre.sizes[1], hidden = h0.sizes[1], rank = v.scale.sizes[0],
                wide = gates * hidden;
  bool right = pre.sizes[2] == wide && has_shape(h0, {batch, hidden}) &&
      (!c0 || has_shape(c0, {batch, hidden})) && rank && hidden;
  right = right && v.packed({1, (rank + PANEL - 1) / PANEL, 1, (hidden + 3) / 4, PANEL, 4}, rank) &&
      u.packed({(hidden + PANEL - 1) / PANEL, (rank + 3) / 4, gates, PANEL, 4}, wide);
  if (!right || std::max({steps, batch, hidden, rank}) > tdpass::MOST_CHANNELS ||
      (bias && !has_shape(bias, {wide})))
    return not_served();

  if (pre.strides[2] != 1) pre = in.contiguous(pre);
  v.settle(in), u.settle(in);
  Tensor shift = in.floats(bias), hidden_state = in.contiguous(h0), cell_state = in.contiguous(c0);
  const std::vector<int64_t> sizes = {steps, batch, hidden};
  Output y(sizes, contiguous_strides(sizes), pre.dtype);
  std::unique_ptr<Output> h = copied(hidden_state), c = c0 ? copied(cell_state) : nullptr;
  if (steps && batch) {
    const tdpass_int8_cell cell{cell_of(gates, rank, pre, shift, *h, c.get(), y, reverse),
        static_cast<const int8_t*>(v.weight.data), static_cast<const int8_t*>(u.weight.data),
        static_cast<const float*>(v.scale.data), static_cast<const float*>(u.scale.data),
        static_cast<const int32_t*>(v.total.data), static_cast<const int32_t*>(u.total.data)};
    const tdpass_pool threads = pool();
    if (tdpass_recurrent_int8(&cell, &threads)) return not_served();
  }
  return c ? Result(y.give(), h->give(), c->give()) : Result(y.give(), h->give());
}

}  // namespace

Result low_rank_lstm_int8(Arguments& in) { return run_int8(in, 4); }
Result low_rank_gru_int8(Arguments& in) { return run_int8(in, 3); }
Result low_rank_lstm(Arguments& in) { return run(in, 4); }
Result low_rank_gru(Arguments& in) { return run(in, 3); }

}  // namespace torch_ops
