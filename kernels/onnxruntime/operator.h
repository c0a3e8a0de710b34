// An operator of com.tdpass: its name, the types of what it reads and makes, and the kernel that serves a
// node.
#pragma once
#include <deque>
#include <exception>
#include <limits>

#include "session.h"

namespace tdpass_ort {

inline const ort::Api* the_api = nullptr;

struct Operator : ort::CustomOp {
  std::string title;
  std::vector<ort::ElementType> reads, makes;
};

[[noreturn]] inline void refuse(const Operator& op, const std::string& what) {
  throw std::invalid_argument(op.title + ": " + what);
}

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

// Fills in what ONNX Runtime asks of an operator whose nodes `Kernel` serves; `Op` is an Operator, with what
// else is in its name.  All inputs behind the first are said to be one list of any types, and kernels see to
// the types: a session makes the schemas of all operators, and most of that time would go into inputs.
template <class Kernel, class Op> void serve(Op& op) {
  op.version = ort::OP_VERSION;
  op.name = [](const ort::CustomOp* op) { return static_cast<const Op*>(op)->title.c_str(); };
  op.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
  op.input_type = [](const ort::CustomOp* op, size_t index) {
    return index ? ort::ANY : static_cast<const Op*>(op)->reads[0];
  };
  op.output_type = [](const ort::CustomOp* op, size_t index) {
    return static_cast<const Op*>(op)->makes[index];
  };
  op.inputs = [](const ort::CustomOp*) { return size_t(2); };
  op.outputs = [](const ort::CustomOp* op) { return static_cast<const Op*>(op)->makes.size(); };
  op.input_characteristic = [](const ort::CustomOp*, size_t index) {
    return index ? ort::VARIADIC : ort::REQUIRED;
  };
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return ort::REQUIRED; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return ort::DEFAULT_MEMORY; };
  op.least_inputs = [](const ort::CustomOp* op) { return int(static_cast<const Op*>(op)->reads.size()) - 1; };
  op.inputs_alike = [](const ort::CustomOp*) { return 0; };
  op.least_outputs = op.outputs_alike = [](const ort::CustomOp*) { return 1; };
  op.create = [](const ort::CustomOp* op, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
    return guarded([&] { *kernel = new Kernel(*static_cast<const Op*>(op), api, info); });
  };
  op.compute = [](void* kernel, ort::KernelContext* context) {
    return guarded([&] { static_cast<Kernel*>(kernel)->compute(context); });
  };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
}

// What an operator ends with, as the end of its name says; a clamp with two inputs `low` and `high`.
struct Ending {
  const char* name;
  tdpass_activation activation;
  int bounds;
};
inline const Ending ENDINGS[] = {
    {"", {TDPASS_IDENTITY, 0, 0}, 0},
    {"Relu", {TDPASS_CLAMP, 0, std::numeric_limits<float>::infinity()}, 0},
    {"Silu", {TDPASS_SILU, 0, 0}, 0},
    {"Gelu", {TDPASS_GELU, 0, 0}, 0},
    {"Clamp", {TDPASS_CLAMP, 0, 0}, 2},
};

// What a node reads and makes, for its kernel.
class Node {
 public:
  Node(const Operator& op, const ort::Api* api) : op_(op), api_(api) {}

  Tensor input(const ort::KernelContext* context, size_t index) const {
    const ort::Value* value = nullptr;
    check(api_->input(context, index, &value));
    return typed(index, read(api_, value));
  }

  Tensor output(ort::KernelContext* context, size_t index, const Sizes& sizes) const {
    ort::Value* value = nullptr;
    check(api_->output(context, index, sizes.data(), sizes.size(), &value));
    return read(api_, value);
  }

  // False where the input is no constant.
  bool constant(const ort::KernelInfo* info, size_t index, Tensor& tensor) const {
    int is_constant = 0;
    const ort::Value* value = nullptr;
    check(api_->constant_input(info, index, &is_constant, &value));
    if (!is_constant || !value) return false;
    tensor = typed(index, read(api_, value));
    return true;
  }

  Tensor required(const ort::KernelInfo* info, size_t index) const {
    Tensor tensor;
    if (!constant(info, index, tensor))
      refuse(op_, "input " + std::to_string(index) + " has to be a constant");
    return tensor;
  }

  // What a node ends with whose first bound is that input.
  tdpass_activation activation(const ort::KernelInfo* info, const Ending& ending, size_t at) const {
    tdpass_activation made = ending.activation;
    float* const bounds[] = {&made.low, &made.high};
    for (int k = 0; k < ending.bounds; k++) {
      const Tensor bound = required(info, at + k);
      if (bound.count() != 1) refuse(op_, "a bound of a clamp is one number");
      *bounds[k] = *bound.as<float>();
    }
    return made;
  }

 private:
  const Tensor& typed(size_t index, const Tensor& tensor) const {
    if (tensor.type != op_.reads[index])
      refuse(op_,
          "input " + std::to_string(index) + " is of type " + std::to_string(tensor.type) + ", not " +
              std::to_string(op_.reads[index]));
    return tensor;
  }

 protected:
  static constexpr double GRAIN =
      3e5;  // multiply-adds that a task should have: ten times what it takes to wake a thread

  static int tasks_worth(double products) { return int(std::min(64.0, std::max(1.0, products / GRAIN))); }

  const Operator& op_;
  const ort::Api* api_;
  Threads threads_;
};

using Operators = std::vector<const ort::CustomOp*>;

// The operators of each source; what they list lives as long as the library.
void add_float_chains(Operators& all);
void add_int8_chains(Operators& all);
void add_weight_only(Operators& all);
void add_sparse(Operators& all);
void add_recurrent(Operators& all);

template <class Op> void list(Operators& all, const std::deque<Op>& ops) {
  for (const Op& op : ops) all.push_back(&op);
}

}  // namespace tdpass_ort
