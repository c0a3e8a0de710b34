// Rows of channels turned so that 16 rows (tokens or pixels) lie in the lanes of a vector, and back.
#pragma once
#include <algorithm>

#include "lanes.h"
#include "output.h"

namespace tdpass {

// A 16 x 16 transpose whose first two rounds stay within 128 bits, where registers of any width shuffle
// fastest.
static TDPASS_INLINE void turn(Lanes (&v)[LANES]) {
#define TDPASS_MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
  Lanes t[LANES];
  TDPASS_UNROLL for (int i = 0; i < LANES; i += 2) {
    t[i] = TDPASS_MIX(v[i], v[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    t[i + 1] = TDPASS_MIX(v[i], v[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  TDPASS_UNROLL for (int i = 0; i < LANES; i += 4) TDPASS_UNROLL for (int k = 0; k < 2; k++) {
    v[i + 2 * k] =
        TDPASS_MIX(t[i + k], t[i + k + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    v[i + 2 * k + 1] =
        TDPASS_MIX(t[i + k], t[i + k + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  TDPASS_UNROLL for (int k = 0; k < 4; k++) TDPASS_UNROLL for (int i = 0; i < LANES; i += 8) {
    t[i + k] = TDPASS_MIX(v[i + k], v[i + k + 4], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    t[i + k + 4] =
        TDPASS_MIX(v[i + k], v[i + k + 4], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  TDPASS_UNROLL for (int k = 0; k < 8; k++) {
    v[k] = TDPASS_MIX(t[k], t[k + 8], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    v[k + 8] = TDPASS_MIX(t[k], t[k + 8], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#undef TDPASS_MIX
}

// to[c * pitch + i] = from[i * row + c] for `rows` <= 16 rows and all channels.  Whole vectors are written
// where `whole`, the lanes of missing rows then being zero; else `rows` floats each.
template <class T>
static void turn_in(const T* from, Index row, int rows, int channels, float* to, Index pitch, bool whole) {
  for (int c = 0; c < channels; c += LANES) {
    Lanes block[LANES];
    int some = std::min(LANES, channels - c), lanes = whole ? LANES : rows;
    for (int i = 0; i < LANES; i++) block[i] = i < rows ? read_some(from + i * row + c, some) : zero();
    turn(block);
    for (int i = 0; i < some; i++) store_some(to + (c + i) * pitch, block[i], lanes);
  }
}

// What is done to a sum before it is stored; `residual` has the type of y.
struct Epilogue {
  const float* bias;
  tdpass_activation activation;
};

// y[i * row + c] = activation(from[c * pitch + i] + bias[c] + residual[i * residual_row + c]), for up to 16
// rows and 16 channels; reads whole vectors of `from`.
template <class T>
static TDPASS_INLINE void turn_out(const float* from, Index pitch, int rows, int channels,
    const Epilogue& end, T* y, Index row, const T* residual, Index residual_row) {
  Lanes block[LANES];
  TDPASS_UNROLL for (int c = 0; c < LANES; c++) block[c] = c < channels ? load(from + c * pitch) : zero();
  turn(block);
  Lanes bias = end.bias ? load_some(end.bias, channels) : zero();
  for (int i = 0; i < rows; i++) {
    Lanes v = block[i] + bias;
    if (residual) v += read_some(residual + i * residual_row, channels);
    write_some(y + i * row, activate(v, end.activation), channels);
  }
}

}  // namespace tdpass
