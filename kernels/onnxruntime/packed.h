// Weights as ONNX has them, laid out in panels for the kernels.
#pragma once
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "../cpu/tdpass.h"

namespace tdpass_ort {

struct Free {
  void operator()(float* data) const { std::free(data); }
};
using Panels = std::unique_ptr<float, Free>;

inline Panels zeros(size_t floats) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, floats * sizeof(float)) != 0) throw std::bad_alloc();
  std::memset(data, 0, floats * sizeof(float));
  return Panels(static_cast<float*>(data));
}

// A weight `[o][i / groups][h w]`, or `[i][o]` where `transposed`, in the layout that tdpass.h describes.
inline Panels pack(const tdpass_stage& stage, int lanes, const float* weight, bool transposed) {
  const size_t width = lanes == TDPASS_PIXEL_LANES ? 8 : 16, taps = size_t(stage.kernel[0]) * stage.kernel[1];
  const bool depthwise = lanes == TDPASS_CHANNEL_LANES && stage.groups == stage.in && stage.in == stage.out && stage.groups > 1;
  const size_t groups = depthwise ? 1 : stage.groups, depth = stage.in / stage.groups, outputs = stage.out / groups;
  const size_t panels = (outputs + width - 1) / width, panel = depth * taps * width;
  Panels packed = zeros(groups * panels * panel);
  for (size_t o = 0; o < size_t(stage.out); o++) {
    float* to = packed.get() + (o / outputs * panels + o % outputs / width) * panel + o % outputs % width;
    for (size_t i = 0; i < depth; i++)
      for (size_t t = 0; t < taps; t++) {
        size_t place = lanes == TDPASS_PIXEL_LANES ? i * taps + t : t * depth + i;
        to[place * width] = transposed ? weight[i * stage.out + o] : weight[(o * depth + i) * taps + t];
      }
  }
  return packed;
}

}  // namespace tdpass_ort
