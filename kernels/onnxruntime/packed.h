// Weights as ONNX has them, laid out in panels for the kernels.
#pragma once
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "../cpu/tdpass.h"

namespace tdpass_ort {

struct Free {
  void operator()(void* data) const { std::free(data); }
};
using Panels = std::unique_ptr<void, Free>;

inline Panels zeros(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, bytes) != 0) throw std::bad_alloc();
  std::memset(data, 0, bytes);
  return Panels(data);
}

// A matrix product as the kernels see it.
inline tdpass_stage product_of(int64_t inputs, int64_t outputs) {
  return {int32_t(inputs), int32_t(outputs), 1, {1, 1}, {1, 1}, {}, {}, {1, 1}};
}

inline constexpr auto as_it_is = [](auto value) { return value; };

inline bool is_depthwise(const tdpass_stage& stage) {
  return stage.groups == stage.in && stage.in == stage.out && stage.groups > 1;
}

// A weight `[o][i / groups][h w]`, or `[i][o]` where `transposed`, in the layout that tdpass.h describes;
// `made` makes its numbers.
template <class To, class From, class Make>
Panels pack(const tdpass_stage& stage, int lanes, const From* weight, bool transposed, const Make& made) {
  const size_t width = lanes == TDPASS_PIXEL_LANES ? 8 : 16, taps = size_t(stage.kernel[0]) * stage.kernel[1];
  const bool depthwise = lanes != TDPASS_PIXEL_LANES && is_depthwise(stage);
  const size_t beside = lanes == TDPASS_QUAD_LANES ? 4
      : lanes == TDPASS_PAIR_LANES                 ? 2
                                                   : 1,
               together = depthwise ? 1 : beside;
  const size_t groups = depthwise ? 1 : stage.groups, depth = stage.in / stage.groups,
               outputs = stage.out / groups;
  const size_t panels = (outputs + width - 1) / width, deep = (depth + together - 1) / together,
               panel = deep * together * taps * width;
  Panels packed = zeros(groups * panels * panel * sizeof(To));
  for (size_t o = 0; o < size_t(stage.out); o++) {
    To* to = static_cast<To*>(packed.get()) + (o / outputs * panels + o % outputs / width) * panel +
        o % outputs % width * together;
    for (size_t i = 0; i < depth; i++)
      for (size_t t = 0; t < taps; t++) {
        const size_t place = lanes == TDPASS_PIXEL_LANES ? i * taps + t : t * deep + i / together;
        to[place * width * together + i % together] =
            made(transposed ? weight[i * stage.out + o] : weight[(o * depth + i) * taps + t]);
      }
  }
  return packed;
}

inline float widened(uint16_t half) {  // of bfloat16
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widened16(uint16_t half) {  // of float16
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  float value;
  if (exponent == 0) {
    value = float(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace tdpass_ort
