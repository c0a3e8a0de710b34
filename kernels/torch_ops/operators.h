// What an operator is, and how it becomes one of torch's: see the table in ops.cpp.
#pragma once
#include <cstdint>

#include "../cpu/checks.h"
#include "arguments.h"

namespace torch_ops {

// The outputs; none for arguments that the kernel does not serve: the reference then answers.
struct Result {
  static constexpr int MOST = 3;
  int count = 0;
  AtenTensorHandle tensors[MOST] = {};

  Result() = default;
  template <class... Handles>
  explicit Result(Handles... handles) : count(sizeof...(handles)), tensors{handles...} {}
};
inline Result not_served() { return Result(); }

// Releases a tensor unless it is given away.
class Output {
 public:
  Output(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
    static const int32_t cpu = aoti_torch_device_type_cpu();
    check(aoti_torch_empty_strided(
              int64_t(sizes.size()), sizes.data(), strides.data(), dtype, cpu, 0, &handle_),
        "allocate the output");
  }
  Output(const Output&) = delete;
  ~Output() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  Tensor view() const { return Tensor(handle_); }
  AtenTensorHandle give() {
    AtenTensorHandle given = handle_;
    handle_ = nullptr;
    return given;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

int32_t dtype_of(int32_t type);  // tdpass_dtype of torch's floating-point type, or -1
inline int32_t dtype_of(const Tensor& x) { return dtype_of(x.dtype); }
tdpass_activation activation_of(const std::string& text);  // throws for an unknown name
int32_t lanes_of(const std::string& name);                 // tdpass_lanes; throws for an unknown name
tdpass_pool pool();                                        // torch's own threads
std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes);

// Copies integers into a struct of 32-bit ones; false where one does not fit.
template <class Struct> bool narrowed(const std::vector<int64_t>& integers, Struct* to) {
  int32_t* at = reinterpret_cast<int32_t*>(to);
  for (int64_t value : integers) {
    if (value < INT32_MIN || value > INT32_MAX) return false;
    *at++ = int32_t(value);
  }
  return true;
}

Result conv_chain(Arguments& in);
Result conv_chain_int8(Arguments& in);
Result linear_chain(Arguments& in);
Result linear_chain_int8(Arguments& in);
Result tensor_chain(Arguments& in);
Result sparse_conv2d(Arguments& in);
Result sparse_linear(Arguments& in);
Result level_conv2d(Arguments& in);
Result weight_only_linear(Arguments& in);
Result low_rank_lstm(Arguments& in);
Result low_rank_gru(Arguments& in);
Result low_rank_lstm_int8(Arguments& in);
Result low_rank_gru_int8(Arguments& in);

}  // namespace torch_ops
