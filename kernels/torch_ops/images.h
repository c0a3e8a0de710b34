// Tensors as the images of the C interface.
#pragma once
#include <algorithm>

#include "operators.h"

namespace torch_ops {

// Whether channels lie innermost and nothing else fits the tensor.
inline bool channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (x.sizes[d] == 1) continue;
    if (x.strides[d] != expected) return false;
    expected *= x.sizes[d];
  }
  return !x.contiguous();
}

// Strides of an output of these sizes: it lies as the input does.
inline std::vector<int64_t> strides_like(const Tensor& x, const std::vector<int64_t>& sizes) {
  if (!channels_last(x)) return contiguous_strides(sizes);
  return {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]};
}

inline tdpass_image image(const Tensor& x) {
  tdpass_image view{x.data, {}, {}};
  std::copy(x.sizes, x.sizes + 4, view.size);
  std::copy(x.strides, x.strides + 4, view.stride);
  return view;
}

// `x[..., c]`, which has no gaps, as `[1, c, 1, positions]`.
inline tdpass_image positions(const Tensor& x) {
  const int64_t channels = x.sizes[x.dims - 1], count = channels ? x.numel() / channels : 0;
  return {x.data, {1, channels, 1, count}, {0, 1, 0, channels}};
}

// The tensor in the shape `sizes` of an image; false where it cannot be shown so.
inline bool expanded(const Tensor& given, const std::vector<int64_t>& sizes, tdpass_image& view) {
  const int64_t missing = int64_t(sizes.size()) - given.dims;
  if (missing < 0) return false;
  view.data = given.data;
  for (int64_t d = 0; d < int64_t(sizes.size()); d++) {
    const bool there = d >= missing;
    if (there && given.sizes[d - missing] != sizes[d] && given.sizes[d - missing] != 1) return false;
    view.size[d] = sizes[d];
    view.stride[d] = there && given.sizes[d - missing] != 1 ? given.strides[d - missing] : 0;
  }
  return true;
}

inline bool same_shape(const Tensor& x, const std::vector<int64_t>& sizes) {
  return std::vector<int64_t>(x.sizes, x.sizes + x.dims) == sizes;
}

// Sizes `[n, c, h, w]` to those behind a convolution; false where its kernel does not fit in.
inline bool convolved(std::vector<int64_t>& sizes, const tdpass_stage& t) {
  int64_t behind[2] = {sizes[2], sizes[3]};
  if (!tdpass::convolve(t, behind)) return false;
  sizes = {sizes[0], t.out, behind[0], behind[1]};
  return true;
}

// The stages of a chain.
struct Stages {
  static constexpr int INTEGERS = 13;
  int32_t count = 0;
  tdpass_stage stages[tdpass::MAX_STAGES];

  // False where there are too many for the kernel, or one that it does not serve.
  bool read(const std::vector<int64_t>& integers) {
    if (integers.empty() || integers.size() % INTEGERS ||
        integers.size() > size_t(INTEGERS * tdpass::MAX_STAGES))
      return false;
    count = int32_t(integers.size()) / INTEGERS;
    return narrowed(integers, stages) && std::all_of(stages, stages + count, [](const tdpass_stage& t) {
      return tdpass::is_stage(t, tdpass::MAX_TAPS);
    });
  }
  bool convolved(std::vector<int64_t>& sizes) const {
    return std::all_of(
        stages, stages + count, [&](const tdpass_stage& t) { return torch_ops::convolved(sizes, t); });
  }
};
static_assert(sizeof(tdpass_stage) == Stages::INTEGERS * sizeof(int32_t), "a stage is its integers in a row");

// The integers of layers of these widths.
inline std::vector<int64_t> integers_of(const std::vector<int64_t>& widths) {
  std::vector<int64_t> integers;
  for (size_t s = 0; s + 1 < widths.size(); s++)
    integers.insert(integers.end(), {widths[s], widths[s + 1], 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1});
  return integers;
}

}  // namespace torch_ops
