// Reading x and finishing y: element types, memory layouts, bias, residual, activation.
#pragma once
#include <algorithm>

#include "grid.h"
#include "lanes.h"
#include "tdpass.h"

namespace tdpass {

static TDPASS_INLINE void transpose(Lanes (&v)[LANES]) {
#define TDPASS_MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
  Lanes t[LANES];
  TDPASS_UNROLL for (int i = 0; i < 8; i++) {  // rows i and i + 8
    t[2 * i] = TDPASS_MIX(v[i], v[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    t[2 * i + 1] = TDPASS_MIX(v[i], v[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
  TDPASS_UNROLL for (int i = 0; i < 8; i++) {
    v[2 * i] = TDPASS_MIX(t[i], t[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    v[2 * i + 1] = TDPASS_MIX(t[i], t[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
  TDPASS_UNROLL for (int i = 0; i < 8; i++) {
    t[2 * i] = TDPASS_MIX(v[i], v[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    t[2 * i + 1] = TDPASS_MIX(v[i], v[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
  TDPASS_UNROLL for (int i = 0; i < 8; i++) {
    v[2 * i] = TDPASS_MIX(t[i], t[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    v[2 * i + 1] = TDPASS_MIX(t[i], t[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
#undef TDPASS_MIX
}

// x through its strides.
class Input {
 public:
  Input(const tdpass_image& image, int dtype) : image_(image), half_(dtype == TDPASS_BFLOAT16) {}
  template <class T> const T* elements() const { return static_cast<const T*>(image_.data); }
  Index stride(int axis) const { return image_.stride[axis]; }

  // Copies a row of `width` pixels x `channels`, widened, to `to[pixel * i + channel * c]`.
  void gather(Index n, Index h, float* to, Index pixel, Index channel, int width, int channels) const {
    Index at = n * stride(0) + h * stride(2);
    if (half_) widen_row(elements<Half>() + at, to, pixel, channel, width, channels);
    else widen_row(elements<float>() + at, to, pixel, channel, width, channels);
  }

  // Copies a row to `to[pixel * i + c]`: widened, or as bfloat16, to which float32 is rounded.
  void gather(Index n, Index h, float* to, Index pixel, int width, int channels) const {
    gather(n, h, to, pixel, 1, width, channels);
  }
  void gather(Index n, Index h, Half* to, Index pixel, int width, int channels) const {
    if (!half_)
      return narrow_row(elements<float>() + n * stride(0) + h * stride(2), to, pixel, width, channels);
    const Half* from = elements<Half>() + n * stride(0) + h * stride(2);
    if (stride(1) == 1 && stride(3) == pixel && channels == pixel) {
      std::memcpy(to, from, sizeof(Half) * pixel * width);
    } else if (stride(1) == 1) {
      for (int i = 0; i < width; i++)
        std::memcpy(to + i * pixel, from + i * stride(3), sizeof(Half) * channels);
    } else if (stride(3) == 1) {
      for (int c = 0; c < channels; c += 2 * LANES)
        for (int i = 0; i < width; i += LANES)
          turn_block(from + c * stride(1) + i, std::min(LANES, width - i), std::min(2 * LANES, channels - c),
              to + i * pixel + c, pixel);
    } else {
      for (int c = 0; c < channels; c++)
        for (int i = 0; i < width; i++) to[i * pixel + c] = from[c * stride(1) + i * stride(3)];
    }
  }

 private:
  template <class T>
  void widen_row(const T* from, float* to, Index pixel, Index channel, int width, int channels) const {
    if (stride(1) == 1)
      for (int i = 0; i < width; i++)
        for (int c = 0; c < channels; c++) to[i * pixel + c * channel] = widen(from[i * stride(3) + c]);
    else
      for (int c = 0; c < channels; c++)
        for (int i = 0; i < width; i++)
          to[i * pixel + c * channel] = widen(from[c * stride(1) + i * stride(3)]);
  }

  void narrow_row(const float* from, Half* to, Index pixel, int width, int channels) const {
    for (int c = 0; c < channels; c += LANES)
      for (int i = 0; i < width; i += LANES) {
        Lanes block[LANES] = {};
        const int some = std::min(LANES, channels - c), pixels = std::min(LANES, width - i);
        if (stride(1) == 1) {
          for (int k = 0; k < pixels; k++) block[k] = load_some(from + (i + k) * stride(3) + c, some);
        } else {
          for (int k = 0; k < some; k++)
            for (int l = 0; l < pixels; l++) block[k][l] = from[(c + k) * stride(1) + (i + l) * stride(3)];
          transpose(block);
        }
        for (int k = 0; k < pixels; k++) write_some(to + (i + k) * pixel + c, block[k], some);
      }
  }

  // Up to 16 pixels of up to 32 channels: pairs of channels are words, which lie together when transposed.
  void turn_block(const Half* from, int pixels, int channels, Half* to, Index pixel) const {
    Lanes block[LANES] = {};
    for (int c = 0; c < channels; c += 2) {
      Bits pair = load_some(from + c * stride(1), pixels);
      if (c + 1 < channels) pair |= load_some(from + (c + 1) * stride(1), pixels) << 16;
      block[c / 2] = as_lanes(pair);
    }
    transpose(block);
    for (int i = 0; i < pixels; i++) std::memcpy(to + i * pixel, &block[i], sizeof(Half) * channels);
  }

  tdpass_image image_;
  bool half_;
};

// y = activation(value + bias + residual), written through y's strides in y's type; with BYTES, y and the
// residual may be on grids.
template <bool BYTES> class OutputTo {
 public:
  OutputTo(const tdpass_chain& chain, const tdpass_image& y)
      : y_(y),
        bias_(chain.bias),
        residual_(chain.residual),
        activation_(chain.activation),
        half_(chain.dtype == TDPASS_BFLOAT16) {}
  OutputTo(const tdpass_chain& chain, const tdpass_image& y, const Grid& grid, const Grid& residual_grid)
      : OutputTo(chain, y) {
    grid_ = grid, residual_grid_ = residual_grid;
  }

  // Whether vectors of channels can be written as they are.
  bool channels_together() const { return y_.stride[1] == 1 && (!residual_ || residual_->stride[1] == 1); }

  // Whether rows of that width follow each other without a gap.
  bool rows_together(int width) const {
    return floats() && y_.stride[3] == 1 && y_.stride[2] == width &&
        (!residual_ || (residual_->stride[3] == 1 && residual_->stride[2] == width));
  }

  // Whether vectors of pixels can be written as they are, the activation being a clamp.
  bool plain() const {
    return floats() && cuts_only() && y_.stride[3] == 1 && (!residual_ || residual_->stride[3] == 1);
  }

  // Whether vectors of channels are numbers of one size with nothing added but a bias and bytes on a grid,
  // the activation being a clamp.
  bool simple() const {
    return !half_ && (!residual_ || residual_grid_) && cuts_only() && channels_together();
  }

  // The bytes that are added from a position and channel on; none where nothing is added.
  Added added_codes(Index n, Index h, Index w, Index channel) const {
    if (!residual_) return {};
    return {residual_row<uint8_t>(n, h) + w * residual_->stride[3] + channel, residual_->stride[3],
        residual_grid_};
  }
  Bounds bounds() const { return Bounds(activation_); }
  const Grid& grid() const { return grid_; }
  Index pixel() const { return y_.stride[3]; }
  template <class T> T* at(Index n, Index h, Index w, Index channel) const {
    return static_cast<T*>(y_.data) + n * y_.stride[0] + h * y_.stride[2] + w * y_.stride[3] + channel;
  }

  // Where the row of a channel begins, and what is added to it; only where `plain`.
  template <class Writer> void locate(Index n, Index h, int channel, Writer& to) const {
    to.base = static_cast<float*>(y_.data) + n * y_.stride[0] + channel * y_.stride[1] + h * y_.stride[2];
    to.plane = y_.stride[1], to.row = y_.stride[2];
    to.bias = bias_ ? bias_ + channel : nullptr;
    to.bounds = bounds();
    if (residual_) {
      to.residual = residual_row<float>(n, h) + channel * residual_->stride[1];
      to.residual_plane = residual_->stride[1], to.residual_row = residual_->stride[2];
    }
  }

  // `mr` pixels x `count` channels from `tile[pixel i + channel]`; only where channels lie together.
  void store_tile(
      Index n, Index h, int w, int channel, const float* tile, Index pixel, int mr, int count) const {
    by_type([&](auto y, auto residual) {
      store_tile_as<decltype(y), decltype(residual)>(n, h, w, channel, tile, pixel, mr, count);
    });
  }

  // A row of pixels from `row[pixel i + channel]`, any layout; reads up to 15 floats past the last channel.
  void store_pixels(Index n, Index h, const float* row, Index pixel, int width, int channels) const {
    if (channels_together()) {
      store_tile(n, h, 0, 0, row, pixel, width, channels);
      return;
    }
    for (int c = 0; c < channels; c += LANES)
      for (int i = 0; i < width; i += LANES) {
        Lanes block[LANES] = {};
        int rows = std::min(LANES, width - i);
        for (int r = 0; r < rows; r++) block[r] = load(row + (i + r) * pixel + c);
        transpose(block);
        for (int r = 0; r < LANES && c + r < channels; r++) put(n, h, i, c + r, block[r], rows);
      }
  }

  // `count` pixels of one channel from position (h, w) on.
  TDPASS_INLINE void put(Index n, Index h, int w, int channel, Lanes v, int count) const {
    by_type(
        [&](auto y, auto residual) { put_as<decltype(y), decltype(residual)>(n, h, w, channel, v, count); });
  }

 private:
  bool floats() const { return !half_ && !grid_ && !residual_grid_; }
  bool cuts_only() const { return activation_.function <= TDPASS_CLAMP; }

  // Calls `body` with numbers of the types of y and the residual.
  template <class Body> TDPASS_INLINE void by_type(const Body& body) const {
    if (half_) by_grid(Half(), body);
    else by_grid(float(), body);
  }
  template <class T, class Body> TDPASS_INLINE void by_grid(T floating, const Body& body) const {
    const uint8_t code = 0;
    if (!BYTES || (!grid_ && !residual_grid_)) return body(floating, floating);
    if (!grid_) return body(floating, code);
    if (residual_grid_) return body(code, code);
    return body(code, floating);
  }
  TDPASS_INLINE Lanes added(const float* p, int count) const { return read_some(p, count); }
  TDPASS_INLINE Lanes added(const Half* p, int count) const { return read_some(p, count); }
  TDPASS_INLINE Lanes added(const uint8_t* p, int count) const {
    return residual_grid_.values(load_codes(p, count));
  }
  TDPASS_INLINE void write(float* p, Lanes v, int count) const { write_some(p, v, count); }
  TDPASS_INLINE void write(Half* p, Lanes v, int count) const { write_some(p, v, count); }
  TDPASS_INLINE void write(uint8_t* p, Lanes v, int count) const { store_codes(p, grid_.codes(v), count); }

  template <class T, class R>
  void store_tile_as(
      Index n, Index h, int w, int channel, const float* tile, Index pixel, int mr, int count) const {
    T* y = at<T>(n, h, w, channel);
    const R* residual = residual_ ? residual_row<R>(n, h) + w * residual_->stride[3] + channel : nullptr;
    for (int c = 0; c < count; c += LANES) {
      int some = std::min(LANES, count - c);
      Lanes bias = bias_ ? load_some(bias_ + channel + c, some) : zero();
      for (int i = 0; i < mr; i++) {
        Lanes v = load(tile + i * pixel + c) + bias;
        if (residual) v += added(residual + i * residual_->stride[3] + c, some);
        __builtin_prefetch(
            y + y_.stride[2] + i * y_.stride[3] + c, 1);  // the next row: a store waits for its cache line
        write(y + i * y_.stride[3] + c, activate(v, activation_), some);
      }
    }
  }

  template <class T, class R>
  TDPASS_INLINE void put_as(Index n, Index h, int w, int channel, Lanes v, int count) const {
    if (bias_) v += bias_[channel];
    T* y = static_cast<T*>(y_.data) + n * y_.stride[0] + channel * y_.stride[1] + h * y_.stride[2] +
        w * y_.stride[3];
    const R* residual = residual_
        ? residual_row<R>(n, h) + channel * residual_->stride[1] + w * residual_->stride[3]
        : nullptr;
    if (residual && residual_->stride[3] == 1) {
      v += added(residual, count);
    } else if (residual) {
      R some[LANES] = {};
      for (int i = 0; i < count; i++) some[i] = residual[i * residual_->stride[3]];
      v += added(some, LANES);
    }
    v = activate(v, activation_);
    if (y_.stride[3] == 1) {
      write(y, v, count);
      return;
    }
    T made[LANES];
    write(made, v, LANES);
    for (int i = 0; i < count; i++) y[i * y_.stride[3]] = made[i];
  }

  template <class T> const T* residual_row(Index n, Index h) const {
    return static_cast<const T*>(residual_->data) + n * residual_->stride[0] + h * residual_->stride[2];
  }

  tdpass_image y_;
  const float* bias_;
  const tdpass_image* residual_;
  tdpass_activation activation_;
  bool half_;
  Grid grid_, residual_grid_;
};
using Output = OutputTo<false>;

}  // namespace tdpass
