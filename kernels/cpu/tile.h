// The inner product of channel lanes: MR pixels x NR panels of 16 output channels, their sums in registers
// over all taps and input channels.  Inputs are broadcast.
#pragma once
#include <algorithm>

#include "lanes.h"
#include "matrix_tiles.h"
#include "tdpass.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace tdpass {

// What a tile multiplies: one input channel at a time, in float32.
struct Singles {
  typedef float Element, Packed;
  typedef Lanes Weights;  // of 16 output channels
  typedef Lanes Sum;
  static constexpr bool PADDED =
      false;  // whether inputs may be read up to a multiple of TOGETHER, their weights being zero
  static constexpr int TOGETHER = 1;    // input channels that are multiplied at once
  static constexpr double LATENCY = 4;  // cycles from one multiply-add to a sum to the next

  static constexpr bool by_tiles(bool) { return false; }
  static bool reads_in_place(const tdpass_image&, int dtype) { return dtype == TDPASS_FLOAT32; }
  static TDPASS_INLINE Weights weights(const float* p) { return load(p); }
  static TDPASS_INLINE Weights input(const float* p) { return broadcast(*p); }
  static TDPASS_INLINE Weights last_input(const float* p) { return input(p); }
  static TDPASS_INLINE Lanes multiply_add(Weights a, Weights b, Lanes sum) { return sum + a * b; }
  static TDPASS_INLINE Lanes finished(Sum sum) { return sum; }
};

// Two bfloat16 input channels at a time, summed in float32.  The instruction rounds to nearest and takes
// denormals for zero; without it the halves of every word are widened and multiplied one after the other.
struct Pairs {
  typedef Half Element, Packed;
  typedef Bits Weights;
  typedef Lanes Sum;
  static constexpr bool PADDED = false;
  static constexpr int TOGETHER = 2;
  static constexpr double LATENCY = 6;

  // An odd channel is multiplied with the next one, which has to be a number: not so beside x, nor in another
  // group.
  static constexpr bool by_tiles(bool whole) { return MATRIX_TILES && whole; }
  static bool reads_in_place(const tdpass_image& x, int dtype) {
    return dtype == TDPASS_BFLOAT16 && x.stride[1] == 1;
  }
  static TDPASS_INLINE Weights weights(const Half* p) { return *reinterpret_cast<const Bits*>(p); }
  static TDPASS_INLINE Weights input(const Half* p) {
    uint32_t word;
    std::memcpy(&word, p, sizeof word);
    return word - Bits{};
  }
  static TDPASS_INLINE Weights last_input(const Half* p) { return uint32_t(*p) - Bits{}; }
  static TDPASS_INLINE Lanes multiply_add(Weights a, Weights b, Lanes sum) {
#if defined(__AVX512BF16__)  // its builtin takes another type in every compiler
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    sum += as_lanes(a & 0xffff0000u) * as_lanes(b & 0xffff0000u);
    return sum + as_lanes(a << 16) * as_lanes(b << 16);
#endif
  }
  static TDPASS_INLINE Lanes finished(Sum sum) { return sum; }
};

// The products of the next channels: Operand::TOGETHER, or the LAST one where that is left without a partner.
template <class Operand, bool LAST, int MR, int NR, int GROUPS>
static TDPASS_INLINE void multiply_step(const typename Operand::Element* const (&row)[GROUPS], Index pixel,
    const typename Operand::Packed* w, Index panel, typename Operand::Sum (&sum)[MR][NR]) {
  typename Operand::Weights b[NR];
  TDPASS_UNROLL for (int j = 0; j < NR; j++) b[j] = Operand::weights(w + j * panel);
  TDPASS_UNROLL for (int i = 0; i < MR; i++) {
    const typename Operand::Element* p = row[i / 3] + (i % 3) * pixel;
    const typename Operand::Weights a = LAST ? Operand::last_input(p) : Operand::input(p);
    TDPASS_UNROLL for (int j = 0; j < NR; j++) sum[i][j] = Operand::multiply_add(a, b[j], sum[i][j]);
  }
}

// Where sums go: of pixel i and the panel j of 16 channels, as they are.
template <class To> struct Store {
  To* out;
  Index pixel;
  TDPASS_INLINE void operator()(int i, int j, Lanes sum) const {
    write_some(out + i * pixel + j * LANES, sum, LANES);
  }
};

// Gives `to` (i, j, sum) with the sum over taps t, channels k of base[i pixel + taps[t] + k channel] * w[j
// panel + (t channels + k) 16 ..], as they are packed.
template <class Operand, class To, int MR, int NR>
static __attribute__((noinline)) void tile(
    const TileInput<Operand>& in, const typename Operand::Packed* w, Index panel, const To& to) {
  constexpr int GROUPS = (MR + 2) / 3, TOGETHER = Operand::TOGETHER;
  typename Operand::Sum sum[MR][NR];
  TDPASS_UNROLL for (int i = 0; i < MR; i++) TDPASS_UNROLL for (int j = 0; j < NR; j++) sum[i][j] =
      typename Operand::Sum{};
  const Index pixel = in.pixel, channel = TOGETHER > 1 ? TOGETHER : in.channel;
  const int steps = (in.channels + (Operand::PADDED ? TOGETHER - 1 : 0)) / TOGETHER;
  for (int t = 0; t < in.tap_count; t++) {
    const typename Operand::Element* row[GROUPS];
    TDPASS_UNROLL for (int q = 0; q < GROUPS; q++) row[q] = in.base + in.taps[t] + 3 * q * pixel;
    for (int k = 0; k < steps; k++) {
      multiply_step<Operand, false>(row, pixel, w, panel, sum);
      w += LANES * TOGETHER;
      TDPASS_UNROLL for (int q = 0; q < GROUPS; q++) row[q] += channel;
    }
    if (!Operand::PADDED && in.channels % TOGETHER) {
      multiply_step<Operand, true>(row, pixel, w, panel, sum);
      w += LANES * TOGETHER;
    }
  }
  const To end = to;  // a copy: stores cannot change it
  TDPASS_UNROLL for (int i = 0; i < MR; i++) TDPASS_UNROLL for (int j = 0; j < NR; j++)
      end(i, j, Operand::finished(sum[i][j]));
}

template <class Operand, class To>
using Tile = void (*)(const TileInput<Operand>&, const typename Operand::Packed*, Index, const To&);
constexpr int MAX_PIXELS = 14, MAX_PANELS = 4;
constexpr int MOST_RESULTS =
    std::max(ACCUMULATORS, MATRIX_TILES ? 2 * MOST_TILE_PIXELS : 0);  // vectors of sums at once

template <class Operand, class To, int MR, int NR> constexpr Tile<Operand, To> tile_or_null() {
  if constexpr (MR * NR <= ACCUMULATORS) return &tile<Operand, To, MR, NR>;
  else return nullptr;
}
template <class Operand, class To, int MR> struct TileRow {
  static constexpr Tile<Operand, To> by_panels[MAX_PANELS] = {tile_or_null<Operand, To, MR, 1>(),
      tile_or_null<Operand, To, MR, 2>(), tile_or_null<Operand, To, MR, 3>(),
      tile_or_null<Operand, To, MR, 4>()};
};
template <class Operand, class To>
static constexpr const Tile<Operand, To>* TILES[MAX_PIXELS + 1] = {nullptr,
    TileRow<Operand, To, 1>::by_panels, TileRow<Operand, To, 2>::by_panels,
    TileRow<Operand, To, 3>::by_panels, TileRow<Operand, To, 4>::by_panels,
    TileRow<Operand, To, 5>::by_panels, TileRow<Operand, To, 6>::by_panels,
    TileRow<Operand, To, 7>::by_panels, TileRow<Operand, To, 8>::by_panels,
    TileRow<Operand, To, 9>::by_panels, TileRow<Operand, To, 10>::by_panels,
    TileRow<Operand, To, 11>::by_panels, TileRow<Operand, To, 12>::by_panels,
    TileRow<Operand, To, 13>::by_panels, TileRow<Operand, To, 14>::by_panels};

// Panels and pixels that are multiplied at once.  Of registers those that take the fewest cycles for a row:
// two multiply-adds or two loads a cycle, `latency` cycles each.  Tiles of a matrix unit are all of one size;
// the last two may overlap.
struct Blocking {
  int panels = 1, blocks = 1;
  Blocking(int width, int panel_count, double latency, bool by_tiles) : width_(width) {
    if (by_tiles) {
      panels = std::min(2, panel_count);
      blocks = (width + MOST_TILE_PIXELS - 1) / MOST_TILE_PIXELS;
      size_ = (width + blocks - 1) / blocks;
      return;
    }
    double best = 1e30;
    for (int nr = 1; nr <= MAX_PANELS && nr <= panel_count; nr++) {
      int most = std::min(MAX_PIXELS, ACCUMULATORS / nr);
      if (most < 1) break;
      int count = (width + most - 1) / most;
      double mr = double(width) / count;
      double cycles = std::max({mr * nr / 2, (mr + nr) / 2, latency}) * count * ((panel_count + nr - 1) / nr);
      if (cycles < best * 0.999) best = cycles, panels = nr, blocks = count;
    }
  }
  int start(int block) const {
    return size_ ? std::min(block * size_, width_ - size_) : width_ * block / blocks;
  }
  int pixels(int block) const { return size_ ? size_ : start(block + 1) - start(block); }

 private:
  int width_, size_ = 0;
};

// `mr` pixels x `nr` panels, by the matrix unit or in registers.
template <class Operand, class To>
static TDPASS_INLINE void multiply(bool by_tiles, const TileInput<Operand>& in,
    const typename Operand::Packed* w, Index panel, int mr, int nr, const To& to) {
  if (by_tiles) matrix_tiles(in, w, panel, mr, nr, to);
  else TILES<Operand, To>[mr][nr - 1](in, w, panel, to);
}

}  // namespace tdpass
