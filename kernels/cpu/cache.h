// Sizes of this machine's caches, asked once.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <cstddef>

namespace tdpass {

// Bytes of the second-level cache of a core; 1 MiB where the system does not say.
inline size_t second_level_bytes() {
  static const size_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long said = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (said > 0) return size_t(said);
#endif
    return size_t(1) << 20;
  }();
  return bytes;
}

// What buffers between stages may take of it: three eighths, the rest is for weights and what streams past.
inline size_t buffer_bytes() { return std::max<size_t>(second_level_bytes() / 8 * 3, 96 * 1024); }

}  // namespace tdpass
