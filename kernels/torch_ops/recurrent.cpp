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

Result run(Arguments& in, const int32_t gates) {
  Tensor pre = in.tensor(), v = in.tensor(), u = in.tensor(), bias = in.optional_tensor(), h0 = in.tensor(), c0;
  if (gates == 4) c0 = in.tensor();
  const bool reverse = in.boolean();

  for (const Tensor* each : {&pre, &h0, &c0})
    if (*each && dtype_of(*each) != TDPASS_FLOAT32) return not_served();
  if (pre.dims != 3 || h0.dims != 2 || v.dims != 3 || u.dims != 4) return not_served();
  const int64_t steps = pre.sizes[0], batch = pre.sizes[1], hidden = h0.sizes[1], rank = u.sizes[1];
  const int64_t groups = (hidden + PANEL - 1) / PANEL, panels = (rank + PANEL - 1) / PANEL;
  bool right = pre.sizes[2] == gates * hidden && has_shape(h0, {batch, hidden}) && (!c0 || has_shape(c0, {batch, hidden}));
  right = right && has_shape(u, {groups, rank, gates, PANEL}) && panels && has_shape(v, {panels, hidden, PANEL});
  right = right && std::max({steps, batch, hidden, rank}) <= tdpass::MOST_CHANNELS;
  if (!right || (bias && !has_shape(bias, {gates * hidden}))) return not_served();

  if (pre.strides[2] != 1) pre = in.contiguous(pre);
  Tensor left = in.floats(v), both = in.floats(u), shift = in.floats(bias), hidden_state = in.contiguous(h0), cell_state = in.contiguous(c0);
  const std::vector<int64_t> sizes = {steps, batch, hidden};
  Output y(sizes, contiguous_strides(sizes), pre.dtype);
  std::unique_ptr<Output> h = copied(hidden_state), c = c0 ? copied(cell_state) : nullptr;
  if (steps && batch && hidden) {
    const int64_t back = reverse ? steps - 1 : 0, sign = reverse ? -1 : 1, step = batch * hidden;
    const tdpass_cell cell{gates, int32_t(steps), int32_t(batch), int32_t(hidden), int32_t(rank),
                           static_cast<const float*>(pre.data) + back * pre.strides[0], sign * pre.strides[0], pre.strides[1],
                           static_cast<const float*>(left.data), static_cast<const float*>(both.data), static_cast<const float*>(shift.data),
                           static_cast<float*>(h->view().data), c ? static_cast<float*>(c->view().data) : nullptr,
                           static_cast<float*>(y.view().data) + back * step, sign * step, hidden};
    const tdpass_pool threads = pool();
    if (tdpass_recurrent(&cell, &threads)) return not_served();
  }
  return c ? Result(y.give(), h->give(), c->give()) : Result(y.give(), h->give());
}

}  // namespace

Result low_rank_lstm(Arguments& in) { return run(in, 4); }
Result low_rank_gru(Arguments& in) { return run(in, 3); }

}  // namespace torch_ops
