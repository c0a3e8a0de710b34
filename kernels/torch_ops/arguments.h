// What an operator is called with, over torch's stable C interface: lent, not copied, and released when the
// call is over.
//
// Like torch's own unboxing (torch::stable::detail::to), but without a reference count per tensor and without
// its loss of every string.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace torch_ops {

inline void check(AOTITorchError status, const char* what) {
  if (status) throw std::runtime_error(std::string("torch could not ") + what);
}

// A tensor that somebody else keeps; false where there is none.
struct Tensor {
  AtenTensorHandle handle = nullptr;
  void* data = nullptr;
  int64_t dims = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;

  Tensor() = default;
  explicit Tensor(AtenTensorHandle tensor) : handle(tensor) {
    check(aoti_torch_get_data_ptr(handle, &data), "read a tensor");
    check(aoti_torch_get_dim(handle, &dims), "read a tensor");
    check(aoti_torch_get_sizes(handle, &sizes), "read a tensor");
    check(aoti_torch_get_strides(handle, &strides), "read a tensor");
    check(aoti_torch_get_dtype(handle, &dtype), "read a tensor");
  }
  explicit operator bool() const { return handle; }

  bool contiguous() const {
    bool answer;
    check(aoti_torch_is_contiguous(handle, &answer), "read a tensor");
    return answer;
  }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t d = 0; d < dims; d++) count *= sizes[d];
    return count;
  }
};

// The arguments of one call; every one is read once, in the order of the schema, before anything may fail.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : stack_(stack) {}
  Arguments(const Arguments&) = delete;

  Tensor tensor() { return Tensor(own(AtenTensorHandle(next()))); }

  Tensor optional_tensor() {
    auto* boxed = reinterpret_cast<StableIValue*>(next());
    if (!boxed) return {};
    auto handle = AtenTensorHandle(*boxed);
    boxes_.push_back(boxed);
    return Tensor(own(handle));
  }

  std::vector<Tensor> tensors() {
    std::vector<Tensor> found;
    for (StableIValue item : list()) found.emplace_back(own(AtenTensorHandle(item)));
    return found;
  }

  std::vector<int64_t> integers() {
    std::vector<int64_t> found;
    for (StableIValue item : list()) found.push_back(int64_t(item));
    return found;
  }

  std::vector<double> numbers() {
    std::vector<double> found;
    for (StableIValue item : list()) found.push_back(torch::stable::detail::to<double>(item));
    return found;
  }

  int64_t integer() { return int64_t(next()); }
  bool boolean() { return torch::stable::detail::to<bool>(next()); }

  std::string text() {
    auto handle = StringHandle(next());
    strings_.push_back(handle);
    size_t length;
    const char* data;
    check(torch_string_length(handle, &length), "read a string");
    check(torch_string_c_str(handle, &data), "read a string");
    return std::string(data, length);
  }

  // The tensor as contiguous float32 or bfloat16: itself, or a copy that lives as long as the call.
  Tensor floats(const Tensor& given) {
    return as(given, aoti_torch_dtype_float32(), torch::headeronly::ScalarType::Float);
  }
  Tensor halves(const Tensor& given) {
    return as(given, aoti_torch_dtype_bfloat16(), torch::headeronly::ScalarType::BFloat16);
  }

  // The tensor without gaps: itself, or a copy that lives as long as the call.
  Tensor contiguous(const Tensor& given) {
    return !given || given.contiguous() ? given : keep(torch::stable::contiguous(shared(given)));
  }

  // Gives the arguments, untouched, to another operator of the same schema, which answers in their place.
  void hand_over(const std::string& name) {
    kept_.clear();
    handles_.clear(), lists_.clear(), strings_.clear(), boxes_.clear();
    check_call(torch_call_dispatcher(name.c_str(), "", stack_, TORCH_ABI_VERSION), name);
  }

  ~Arguments() {
    for (auto handle : handles_) aoti_torch_delete_tensor_object(handle);
    for (auto list : lists_) torch_delete_list(list);
    for (auto string : strings_) torch_delete_string(string);
    for (auto* box : boxes_) delete box;  // as torch's own headers do
  }

 private:
  StableIValue next() { return stack_[at_++]; }

  AtenTensorHandle own(AtenTensorHandle handle) {
    handles_.push_back(handle);
    return handle;
  }

  std::vector<StableIValue> list() {
    auto handle = StableListHandle(next());
    lists_.push_back(handle);
    size_t size;
    check(torch_list_size(handle, &size), "read a list");
    std::vector<StableIValue> items(size);
    for (size_t k = 0; k < size; k++) check(torch_list_get_item(handle, k, &items[k]), "read a list");
    return items;
  }

  Tensor as(const Tensor& given, int32_t dtype, torch::headeronly::ScalarType type) {
    if (!given || (given.dtype == dtype && given.contiguous())) return given;
    torch::stable::Tensor made =
        given.dtype == dtype ? shared(given) : torch::stable::to(shared(given), type);
    return keep(torch::stable::contiguous(made));
  }

  static torch::stable::Tensor shared(const Tensor& given) {
    AtenTensorHandle handle;
    check(aoti_torch_new_tensor_handle(given.handle, &handle), "share a tensor");
    return torch::stable::Tensor(handle);
  }

  Tensor keep(torch::stable::Tensor made) {
    kept_.push_back(made);
    return Tensor(made.get());
  }

  static void check_call(AOTITorchError status, const std::string& name);

  StableIValue* stack_;
  int at_ = 0;
  std::vector<AtenTensorHandle> handles_;
  std::vector<StableListHandle> lists_;
  std::vector<StringHandle> strings_;
  std::vector<StableIValue*> boxes_;
  std::vector<torch::stable::Tensor> kept_;
};

}  // namespace torch_ops
