// The geometry of a node that is a chain of layers: its stages, the sizes it makes, and images of what it
// reads.
#pragma once
#include "../cpu/checks.h"
#include "operator.h"
#include "packed.h"

namespace tdpass_ort {

constexpr int FEWEST_STAGES = 2, MOST_STAGES = tdpass::MAX_STAGES;

struct ChainOperator : Operator {
  bool linear;
  int stages;
  bool bias, residual;
  Ending ending;
};

class ChainNode : public Node {
 public:
  ChainNode(const ChainOperator& op, const ort::Api* api, const ort::KernelInfo* info)
      : Node(op, api), chain_(op), said_(op.stages) {
    for (int s = 0; s < op.stages; s++) {
      const std::string k = "_" + std::to_string(s + 1);
      said_[s] = {integer(api, info, "group" + k, 1), integers(api, info, "strides" + k),
          integers(api, info, "pads" + k), integers(api, info, "dilations" + k)};
    }
  }

 protected:
  // The stage that a weight of these sizes is.
  tdpass_stage stage_of(int s, const Sizes& w) const {
    const size_t axes = chain_.linear ? 0 : w.size() - 2;
    if (chain_.linear ? w.size() != 2 : w.size() != 3 && w.size() != 4)
      refuse(op_, "a weight has " + std::to_string(w.size()) + " axes");
    const Said& said = said_[s];
    if (!tdpass::within(said.group, 1, tdpass::MOST_CHANNELS))
      refuse(op_, "a group of " + std::to_string(said.group) + " is not served");
    tdpass_stage stage = {narrow(w[chain_.linear ? 0 : 1] * said.group), narrow(w[chain_.linear ? 1 : 0]),
        narrow(said.group), {1, 1}, {1, 1}, {}, {}, {1, 1}};
    for (size_t a = 0; a < axes; a++) {
      const size_t axis = 2 - axes + a;
      stage.kernel[axis] = narrow(w[2 + a]);
      if (a < said.strides.size()) stage.stride[axis] = narrow(said.strides[a]);
      if (a < said.dilations.size()) stage.dilation[axis] = narrow(said.dilations[a]);
      if (a + axes < said.pads.size())
        stage.before[axis] = narrow(said.pads[a]), stage.after[axis] = narrow(said.pads[a + axes]);
    }
    if (!tdpass::is_stage(stage, tdpass::MAX_TAPS))
      refuse(op_, "a stage of these groups, strides, pads or dilations is not served");
    return stage;
  }

  Sizes output_sizes(const Tensor& x, const std::vector<tdpass_stage>& stages) const {
    Sizes sizes = x.sizes;
    const size_t axes = sizes.size(), channel = chain_.linear ? axes - 1 : 1;
    if (chain_.linear ? axes < 1 : axes != 3 && axes != 4)
      refuse(op_, "x has " + std::to_string(axes) + " axes");
    for (const tdpass_stage& t : stages) {
      if (sizes[channel] != t.in)
        refuse(op_,
            std::to_string(sizes[channel]) + " channels come to a stage that takes " + std::to_string(t.in));
      sizes[channel] = t.out;
      for (size_t a = 2; !chain_.linear && a < axes; a++) {
        const size_t axis = a + 2 - axes;
        const int64_t room =
            sizes[a] + t.before[axis] + t.after[axis] - (t.kernel[axis] - 1) * t.dilation[axis] - 1;
        if (room < 0 || t.stride[axis] < 1) refuse(op_, "the input is smaller than the kernel");
        sizes[a] = room / t.stride[axis] + 1;
      }
    }
    return sizes;
  }

  // `[n, c, h, w]` as the kernels see it: a line is an image of height one, positions of a matrix are the
  // pixels of a line.
  tdpass_image view(void* data, const Sizes& sizes) const {
    if (chain_.linear) {
      const int64_t channels = sizes.back(),
                    positions =
                        std::accumulate(sizes.begin(), sizes.end() - 1, int64_t(1), std::multiplies<>());
      return {data, {1, channels, 1, positions}, {positions * channels, 1, positions * channels, channels}};
    }
    const int64_t h = sizes.size() == 4 ? sizes[2] : 1, w = sizes.back();
    return {data, {sizes[0], sizes[1], h, w}, {sizes[1] * h * w, h * w, w, 1}};
  }

  // The residual in the shape of the output: an axis of size one is repeated.
  tdpass_image spread(const Tensor& residual, const Sizes& sizes) const {
    tdpass_image added = view(residual.data, sizes);
    if (residual.sizes == sizes) return added;
    const bool fits = !chain_.linear && residual.sizes.size() == sizes.size();
    const tdpass_image given = fits ? view(residual.data, residual.sizes) : tdpass_image{};
    for (int a = 0; a < 4; a++) {
      if (!fits || (given.size[a] != added.size[a] && given.size[a] != 1))
        refuse(op_, "the residual is larger than the output of the chain");
      added.stride[a] = given.size[a] == added.size[a] ? given.stride[a] : 0;
    }
    return added;
  }

  void check_bias(const Tensor& bias, const std::vector<tdpass_stage>& stages) const {
    if (bias.sizes.size() != 1 || bias.sizes[0] != stages.back().out)
      refuse(op_, "the bias must have one number per output channel");
  }

  static int worth(const std::vector<tdpass_stage>& stages, const tdpass_image& y) {
    double each = 0;
    for (const tdpass_stage& t : stages)
      each += double(t.out) * (t.in / t.groups) * t.kernel[0] * t.kernel[1];
    return tasks_worth(each * double(y.size[0]) * y.size[2] * y.size[3]);
  }

  const ChainOperator& chain_;

 private:
  struct Said {
    int64_t group;
    Sizes strides, pads, dilations;
  };

  // As 32 bits; what does not fit becomes a number that no stage may have.
  static int32_t narrow(int64_t value) {
    return tdpass::within(value, INT32_MIN, INT32_MAX) ? int32_t(value) : INT32_MIN;
  }

  std::vector<Said> said_;
};

}  // namespace tdpass_ort
