// Fused chains as operators of ONNX Runtime, in the domain com.tdpass.
//
// ConvChain<stages>[Bias][Add][Relu|Silu|Gelu]: inputs x, one weight `[o, i / group, h, w]` (or `[o, i / group, w]`) per stage, a
// bias where the name says so, and a residual where it says Add; attributes group_<k>, strides_<k>, pads_<k> and dilations_<k> of
// stage k = 1 .., as those of Conv.  LinearChain<stages>...: weights `[i, o]`, x of any rank.  `lanes` is 0 for channels, 1 for
// pixels.  What a node computes is all in its name and attributes, so that a model can say it in standard operators as well.
#include <deque>
#include <exception>
#include <numeric>

#include "../cpu/checks.h"
#include "packed.h"
#include "session.h"

namespace tdpass_ort {
namespace {

constexpr int MOST_STAGES = 6, ACTIVATIONS = 4;
constexpr double GRAIN = 3e5;  // multiply-adds that a task should have: ten times what it takes to wake a thread

struct Op : ort::CustomOp {
  bool linear;
  int stages;
  bool bias, residual;
  int activation;
  std::string title;
  size_t count() const { return 1 + stages + bias + residual; }
};

[[noreturn]] void refuse(const Op& op, const std::string& what) { throw std::invalid_argument(op.title + ": " + what); }

class Chain {
 public:
  Chain(const Op& op, const ort::Api* api, const ort::KernelInfo* info) : op_(op), api_(api), layers_(op.stages) {
    const int64_t lanes = integer(api, info, "lanes", TDPASS_CHANNEL_LANES);
    if (lanes != TDPASS_CHANNEL_LANES && lanes != TDPASS_PIXEL_LANES) refuse(op, "lanes is 0 or 1, not " + std::to_string(lanes));
    lanes_ = int(lanes);
    for (int s = 0; s < op.stages; s++) {
      Layer& layer = layers_[s];
      const std::string k = "_" + std::to_string(s + 1);
      layer.group = integer(api, info, "group" + k, 1);
      layer.strides = integers(api, info, "strides" + k);
      layer.pads = integers(api, info, "pads" + k);
      layer.dilations = integers(api, info, "dilations" + k);
      int constant = 0;
      const ort::Value* value = nullptr;
      check(api->constant_input(info, s + 1, &constant, &value));
      if (constant && value) prepare(layer, read(api, value), layer.shape, layer.packed), layer.constant = true;
    }
  }

  void compute(ort::KernelContext* context) {
    Tensor x = input(context, 0), bias, residual;
    std::vector<tdpass_stage> stages(op_.stages);
    std::vector<Panels> fresh(op_.stages);
    std::vector<const void*> weights(op_.stages);
    for (int s = 0; s < op_.stages; s++) {
      const Layer& layer = layers_[s];
      stages[s] = layer.shape;
      if (!layer.constant) prepare(layer, input(context, s + 1), stages[s], fresh[s]);
      weights[s] = (layer.constant ? layer.packed : fresh[s]).get();
    }
    if (op_.bias) bias = input(context, op_.stages + 1);
    if (op_.residual) residual = input(context, op_.count() - 1);
    if (op_.bias && (bias.sizes.size() != 1 || bias.sizes[0] != stages.back().out)) refuse(op_, "the bias must have one number per output channel");
    tdpass_chain chain = {TDPASS_FLOAT32, lanes_, op_.activation, op_.stages, stages.data(), weights.data(), bias.data, nullptr};

    const Sizes sizes = output_sizes(x, stages);
    ort::Value* made = nullptr;
    check(api_->output(context, 0, sizes.data(), sizes.size(), &made));
    Tensor y = read(api_, made);
    tdpass_image from = view(x.data, x.sizes), to = view(y.data, sizes), added = to;
    if (op_.residual) {
      if (!spread(residual, sizes, added)) refuse(op_, "the residual is larger than the output of the chain");
      chain.residual = &added;
    }
    if (std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<>()) == 0) return;
    Pool pool(api_, context, threads_, worth(stages, to));
    if (tdpass_conv_chain(&chain, &from, &to, &pool.pool) != 0) refuse(op_, "the kernel does not serve these sizes");
  }

 private:
  struct Layer {
    int64_t group = 1;
    Sizes strides, pads, dilations;
    bool constant = false;
    tdpass_stage shape{};
    Panels packed;
  };

  Tensor input(const ort::KernelContext* context, size_t index) const {
    const ort::Value* value = nullptr;
    check(api_->input(context, index, &value));
    return read(api_, value);
  }

  // The stage that a weight of these sizes is, and its panels.
  void prepare(const Layer& layer, const Tensor& weight, tdpass_stage& stage, Panels& packed) const {
    const Sizes& w = weight.sizes;
    const size_t axes = op_.linear ? 0 : w.size() - 2;
    if (op_.linear ? w.size() != 2 : w.size() != 3 && w.size() != 4) refuse(op_, "a weight has " + std::to_string(w.size()) + " axes");
    const int64_t group = layer.group;
    if (!tdpass::within(group, 1, tdpass::MOST_CHANNELS)) refuse(op_, "a group of " + std::to_string(group) + " is not served");
    stage = {narrow(w[op_.linear ? 0 : 1] * group), narrow(w[op_.linear ? 1 : 0]), narrow(group), {1, 1}, {1, 1}, {}, {}, {1, 1}};
    for (size_t a = 0; a < axes; a++) {
      const size_t axis = 2 - axes + a;
      stage.kernel[axis] = narrow(w[2 + a]);
      if (a < layer.strides.size()) stage.stride[axis] = narrow(layer.strides[a]);
      if (a < layer.dilations.size()) stage.dilation[axis] = narrow(layer.dilations[a]);
      if (a + axes < layer.pads.size()) stage.before[axis] = narrow(layer.pads[a]), stage.after[axis] = narrow(layer.pads[a + axes]);
    }
    if (!tdpass::is_stage(stage, tdpass::MAX_TAPS)) refuse(op_, "a stage of these groups, strides, pads or dilations is not served");
    packed = pack(stage, lanes_, weight.data, op_.linear);
  }

  // As 32 bits; what does not fit becomes a number that no stage may have.
  static int32_t narrow(int64_t value) { return tdpass::within(value, INT32_MIN, INT32_MAX) ? int32_t(value) : INT32_MIN; }

  Sizes output_sizes(const Tensor& x, const std::vector<tdpass_stage>& stages) const {
    Sizes sizes = x.sizes;
    const size_t axes = sizes.size(), channel = op_.linear ? axes - 1 : 1;
    if (op_.linear ? axes < 1 : axes != 3 && axes != 4) refuse(op_, "x has " + std::to_string(axes) + " axes");
    for (const tdpass_stage& t : stages) {
      if (sizes[channel] != t.in) refuse(op_, std::to_string(sizes[channel]) + " channels come to a stage that takes " + std::to_string(t.in));
      sizes[channel] = t.out;
      for (size_t a = 2; !op_.linear && a < axes; a++) {
        const size_t axis = a + 2 - axes;
        const int64_t room = sizes[a] + t.before[axis] + t.after[axis] - (t.kernel[axis] - 1) * t.dilation[axis] - 1;
        if (room < 0 || t.stride[axis] < 1) refuse(op_, "the input is smaller than the kernel");
        sizes[a] = room / t.stride[axis] + 1;
      }
    }
    return sizes;
  }

  // `[n, c, h, w]` as the kernels see it: a line is an image of height one, positions of a matrix are the pixels of a line.
  tdpass_image view(float* data, const Sizes& sizes) const {
    if (op_.linear) {
      const int64_t channels = sizes.back(), positions = std::accumulate(sizes.begin(), sizes.end() - 1, int64_t(1), std::multiplies<>());
      return {data, {1, channels, 1, positions}, {positions * channels, 1, positions * channels, channels}};
    }
    const int64_t h = sizes.size() == 4 ? sizes[2] : 1, w = sizes.back();
    return {data, {sizes[0], sizes[1], h, w}, {sizes[1] * h * w, h * w, w, 1}};
  }

  // The residual in the shape of the output: an axis of size one is repeated.
  bool spread(const Tensor& residual, const Sizes& sizes, tdpass_image& added) const {
    added.data = residual.data;
    if (residual.sizes == sizes) return true;
    if (op_.linear || residual.sizes.size() != sizes.size()) return false;
    tdpass_image given = view(residual.data, residual.sizes);
    for (int a = 0; a < 4; a++) {
      if (given.size[a] != added.size[a] && given.size[a] != 1) return false;
      added.stride[a] = given.size[a] == added.size[a] ? given.stride[a] : 0;
    }
    return true;
  }

  static int worth(const std::vector<tdpass_stage>& stages, const tdpass_image& y) {
    double each = 0;
    for (const tdpass_stage& t : stages) each += double(t.out) * (t.in / t.groups) * t.kernel[0] * t.kernel[1];
    return int(std::min(64.0, std::max(1.0, each * double(y.size[0]) * y.size[2] * y.size[3] / GRAIN)));
  }

  const Op& op_;
  const ort::Api* api_;
  int lanes_;
  std::vector<Layer> layers_;
  Threads threads_;
};

const ort::Api* the_api = nullptr;

// Runs `body`; what it throws becomes a status.
template <class Body> ort::Status* guarded(const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::invalid_argument& error) {
    return the_api->create_status(ort::INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return the_api->create_status(ort::FAIL, error.what());
  }
}

const Op& self(const ort::CustomOp* op) { return *static_cast<const Op*>(op); }

Op make(bool linear, int stages, bool bias, bool residual, int activation) {
  static const char* const names[ACTIVATIONS] = {"", "Relu", "Silu", "Gelu"};
  Op op{};
  op.linear = linear, op.stages = stages, op.bias = bias, op.residual = residual, op.activation = activation;
  op.title = std::string(linear ? "LinearChain" : "ConvChain") + std::to_string(stages) + (bias ? "Bias" : "") + (residual ? "Add" : "") + names[activation];
  op.version = ort::OP_VERSION;
  op.name = [](const ort::CustomOp* op) { return self(op).title.c_str(); };
  op.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
  op.input_type = op.output_type = [](const ort::CustomOp*, size_t) { return ort::FLOAT; };
  op.inputs = [](const ort::CustomOp* op) { return self(op).count(); };
  op.outputs = [](const ort::CustomOp*) { return size_t(1); };
  op.input_characteristic = op.output_characteristic = [](const ort::CustomOp*, size_t) { return ort::REQUIRED; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return ort::DEFAULT_MEMORY; };
  for (auto& arity : op.variadic) arity = [](const ort::CustomOp*) { return 1; };
  op.create = [](const ort::CustomOp* op, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
    return guarded([&] { *kernel = new Chain(self(op), api, info); });
  };
  op.compute = [](void* kernel, ort::KernelContext* context) { return guarded([&] { static_cast<Chain*>(kernel)->compute(context); }); };
  op.destroy = [](void* kernel) { delete static_cast<Chain*>(kernel); };
  return op;
}

const std::deque<Op>& all_ops() {
  static const std::deque<Op> ops = [] {
    std::deque<Op> made;
    for (int linear = 0; linear < 2; linear++)
      for (int stages = 1; stages <= MOST_STAGES; stages++)
        for (int with = 0; with < 4; with++)
          for (int activation = 0; activation < ACTIVATIONS; activation++) made.push_back(make(linear, stages, with & 1, with & 2, activation));
    return made;
  }();
  return ops;
}

}  // namespace
}  // namespace tdpass_ort

// What ONNX Runtime looks for in a library of operators.
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  using namespace tdpass_ort;
  the_api = base->api(ort::API_VERSION);
  if (!the_api) return base->api(1)->create_status(ort::FAIL, "the operators of tdpass need ONNX Runtime 1.20 or newer");
  return guarded([&] {
    static ort::CustomOpDomain* const domain = [] {
      ort::CustomOpDomain* made = nullptr;
      check(the_api->create_domain("com.tdpass", &made));
      for (const Op& op : all_ops()) check(the_api->add_to_domain(made, &op));
      return made;
    }();
    check(the_api->add_domain(options, domain));
  });
}
