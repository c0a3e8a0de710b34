// Working memory that a thread keeps between calls, and a pool-independent way to run tasks.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

#include "tdpass.h"

namespace tdpass {

// A growing block, aligned to a cache line; contents are undefined after `reserve`.
class Scratch {
 public:
  float* reserve(size_t floats) {
    if (floats > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      size_t bytes = (floats * sizeof(float) + 4095) / 4096 * 4096;
      if (posix_memalign(reinterpret_cast<void**>(&data_), 64, bytes) != 0) throw std::bad_alloc();
      size_ = bytes / sizeof(float);
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

inline float* thread_scratch(size_t floats) {
  static thread_local Scratch scratch;
  return scratch.reserve(floats);
}

// Returns 0, or -1 where a task found no memory: no exception may leave a thread of the pool.
template <class Task> int run_tasks(const tdpass_pool* pool, int tasks, Task& task) {
  struct Guarded {
    Task& task;
    std::atomic<int> status{0};
  } guarded{task};
  auto call = [](void* argument, int32_t index) {
    auto* given = static_cast<Guarded*>(argument);
    try {
      given->task(index);
    } catch (const std::bad_alloc&) {
      given->status = -1;
    }
  };
  if (tasks == 1) call(&guarded, 0);
  else if (tasks > 1) pool->run(pool->context, tasks, call, &guarded);
  return guarded.status;
}

}  // namespace tdpass
