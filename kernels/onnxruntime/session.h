// What a kernel needs of ONNX Runtime: tensors, attributes, and the session's threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/tdpass.h"
#include "ort_abi.h"

namespace tdpass_ort {

using Sizes = std::vector<int64_t>;

// A failed call; it owns the status and gives it back to ONNX Runtime.
struct Failure {
  ort::Status* status;
};
inline void check(ort::Status* status) {
  if (status) throw Failure{status};
}

struct Tensor {
  void* data = nullptr;
  Sizes sizes;
  int type = 0;

  template <class T> T* as() const { return static_cast<T*>(data); }
  int64_t count() const {
    return std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies<>());
  }
};

inline Tensor read(const ort::Api* api, const ort::Value* value) {
  Tensor tensor;
  ort::ShapeInfo* info = nullptr;
  check(api->shape_info(value, &info));
  size_t axes = 0;
  ort::Status* status = api->element_type(info, &tensor.type);
  if (!status) status = api->axis_count(info, &axes);
  tensor.sizes.resize(axes);
  if (!status) status = api->sizes(info, tensor.sizes.data(), axes);
  api->release_shape_info(info);
  check(status);
  check(api->tensor_data(const_cast<ort::Value*>(value), &tensor.data));
  return tensor;
}

inline int64_t integer(
    const ort::Api* api, const ort::KernelInfo* info, const std::string& name, int64_t absent) {
  int64_t value = absent;
  ort::Status* status = api->attribute_integer(info, name.c_str(), &value);
  if (status) api->release_status(status);
  return status ? absent : value;
}

inline Sizes integers(const ort::Api* api, const ort::KernelInfo* info, const std::string& name) {
  size_t count = 0;
  ort::Status* status = api->attribute_integers(info, name.c_str(), nullptr, &count);
  if (status) api->release_status(status);
  Sizes values(count);
  if (count) check(api->attribute_integers(info, name.c_str(), values.data(), &count));
  return values;
}

// How many threads the session lends.  Its interface does not say, so it is learnt: of the first calls that
// could use more threads, which ones come to run the tasks; later ones ask again now and then, for the pool
// may have been busy.
class Threads {
 public:
  // Of `worth` tasks, how many to make; `asking` is set where the call is to be watched.
  int tasks(int worth, bool& asking) {
    worth = std::min(worth, CORES);
    unsigned call = worth > 1 ? calls_.fetch_add(1, std::memory_order_relaxed) : 1;
    asking = worth > 1 && (call < FIRST || call % AGAIN == 0);
    return asking ? worth : std::min(worth, known_.load(std::memory_order_relaxed));
  }
  void saw(int threads) {
    int known = known_.load(std::memory_order_relaxed);
    while (threads > known && !known_.compare_exchange_weak(known, threads, std::memory_order_relaxed)) {
    }
  }

 private:
  static constexpr unsigned FIRST = 32, AGAIN = 32;
  static inline const int CORES = std::max(1, std::min(64, int(std::thread::hardware_concurrency())));
  std::atomic<unsigned> calls_{0};
  std::atomic<int> known_{1};
};

// The session's threads for one call of a kernel, as the C interface of the kernels takes them.
class Pool {
 public:
  Pool(const ort::Api* api, const ort::KernelContext* context, Threads& threads, int worth)
      : api_(api), context_(context), threads_(threads) {
    pool = {this, threads.tasks(worth, asking_), run};
  }
  tdpass_pool pool;

 private:
  struct Work {
    void (*task)(void*, int32_t);
    void* argument;
    std::vector<std::thread::id> ran;  // which thread ran a task, where that is asked
  };

  static void step(void* argument, size_t index) {
    Work& work = *static_cast<Work*>(argument);
    if (!work.ran.empty()) work.ran[index] = std::this_thread::get_id();
    work.task(work.argument, int32_t(index));
  }

  static void run(void* context, int32_t tasks, void (*task)(void*, int32_t), void* argument) {
    Pool& self = *static_cast<Pool*>(context);
    Work work{task, argument, {}};
    if (self.asking_) work.ran.resize(tasks);
    check(self.api_->parallel_for(self.context_, step, tasks, tasks, &work));
    int threads = 0;
    for (size_t k = 0; k < work.ran.size(); k++)
      threads += std::find(work.ran.begin(), work.ran.begin() + k, work.ran[k]) == work.ran.begin() + k;
    self.threads_.saw(threads);
  }

  const ort::Api* api_;
  const ort::KernelContext* context_;
  Threads& threads_;
  bool asking_ = false;
};

}  // namespace tdpass_ort
