// Rows of channels turned so that 16 rows (tokens or pixels) lie in the lanes of a vector, and back.
#pragma once
#include <algorithm>

#include "lanes.h"
#include "output.h"

namespace tdpass {

typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(64), aligned(4), may_alias));

static TDPASS_INLINE Lanes read_some(const float* p, int count) { return load_some(p, count); }
static TDPASS_INLINE Lanes read_some(const Half* p, int count) {
  Halves h{};
  if (count >= LANES) std::memcpy(&h, p, sizeof h);
  else std::memcpy(&h, p, sizeof(Half) * count);
  Bits bits = __builtin_convertvector(h, Bits) << 16;
  Lanes v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
static TDPASS_INLINE void write_some(float* p, Lanes v, int count) { store_some(p, v, count); }
static TDPASS_INLINE void write_some(Half* p, Lanes v, int count) {  // rounds as `narrow` does
  Bits bits;
  std::memcpy(&bits, &v, sizeof bits);
  Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = (bits >> 16) | 0x40u;
  Halves h = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Halves);
  if (count >= LANES) std::memcpy(p, &h, sizeof h);
  else std::memcpy(p, &h, sizeof(Half) * count);
}

// to[c * pitch + i] = from[i * row + c] for `rows` <= 16 rows and all channels.  Whole vectors are written where `whole`,
// the lanes of missing rows then being zero; else `rows` floats each.
template <class T> static void turn_in(const T* from, Index row, int rows, int channels, float* to, Index pitch, bool whole) {
  for (int c = 0; c < channels; c += LANES) {
    Lanes block[LANES];
    int some = std::min(LANES, channels - c), lanes = whole ? LANES : rows;
    for (int i = 0; i < LANES; i++) block[i] = i < rows ? read_some(from + i * row + c, some) : zero();
    transpose(block);
    for (int i = 0; i < some; i++) store_some(to + (c + i) * pitch, block[i], lanes);
  }
}

// What is done to a sum before it is stored; `residual` has the type of y.
struct Epilogue {
  const float* bias;
  int activation;
};

// y[i * row + c] = activation(from[c * pitch + i] + bias[c] + residual[i * residual_row + c]), for up to 16 rows and 16 channels;
// reads whole vectors of `from`.
template <class T>
static TDPASS_INLINE void turn_out(const float* from, Index pitch, int rows, int channels, const Epilogue& end, T* y, Index row, const T* residual, Index residual_row) {
  Lanes block[LANES];
  TDPASS_UNROLL for (int c = 0; c < LANES; c++) block[c] = c < channels ? load(from + c * pitch) : zero();
  transpose(block);
  Lanes bias = end.bias ? load_some(end.bias, channels) : zero();
  for (int i = 0; i < rows; i++) {
    Lanes v = block[i] + bias;
    if (residual) v += read_some(residual + i * residual_row, channels);
    write_some(y + i * row, end.activation ? activate(v, end.activation) : v, channels);
  }
}

}  // namespace tdpass
