// The inner product of channel lanes: MR pixels x NR panels of 16 output channels, their sums in registers over all taps and
// input channels.  Inputs are broadcast.
#pragma once
#include <algorithm>

#include "lanes.h"
#include "tdpass.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace tdpass {

// What a tile multiplies: one input channel at a time, in float32.
struct Singles {
  typedef float Element;
  typedef Lanes Weights;                // of 16 output channels
  static constexpr int TOGETHER = 1;    // input channels that are multiplied at once
  static constexpr double LATENCY = 4;  // cycles from one multiply-add to a sum to the next

  static bool takes(int) { return true; }
  static bool reads_in_place(const tdpass_image&, int dtype) { return dtype == TDPASS_FLOAT32; }
  static TDPASS_INLINE Weights weights(const float* p) { return load(p); }
  static TDPASS_INLINE Weights input(const float* p) { return broadcast(*p); }
  static TDPASS_INLINE Weights last_input(const float* p) { return input(p); }
  static TDPASS_INLINE Lanes multiply_add(Weights a, Weights b, Lanes sum) { return sum + a * b; }
};

// Two bfloat16 input channels at a time, summed in float32.  The instruction rounds to nearest and takes denormals for zero; without
// it the halves of every word are widened and multiplied one after the other.
struct Pairs {
  typedef Half Element;
  typedef Bits Weights;
  static constexpr int TOGETHER = 2;
  static constexpr double LATENCY = 6;

  static bool takes(int dtype) { return dtype == TDPASS_BFLOAT16; }
  static bool reads_in_place(const tdpass_image& x, int) { return x.stride[1] == 1; }
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
};

template <class Operand> struct TileInput {
  const typename Operand::Element* base;
  Index pixel, channel;  // strides; channels that are multiplied together lie together
  const Index* taps;     // offsets of the kernel's positions
  int tap_count, channels;
};

// The products of the next channels: Operand::TOGETHER, or the LAST one where that is left without a partner.
template <class Operand, bool LAST, int MR, int NR, int GROUPS>
static TDPASS_INLINE void multiply_step(const typename Operand::Element* const (&row)[GROUPS], Index pixel, const typename Operand::Element* w, Index panel,
                                        Lanes (&sum)[MR][NR]) {
  typename Operand::Weights b[NR];
  TDPASS_UNROLL for (int j = 0; j < NR; j++) b[j] = Operand::weights(w + j * panel);
  TDPASS_UNROLL for (int i = 0; i < MR; i++) {
    const typename Operand::Element* p = row[i / 3] + (i % 3) * pixel;
    const typename Operand::Weights a = LAST ? Operand::last_input(p) : Operand::input(p);
    TDPASS_UNROLL for (int j = 0; j < NR; j++) sum[i][j] = Operand::multiply_add(a, b[j], sum[i][j]);
  }
}

// out[i][16 j ..] = sum over taps t, channels k of base[i pixel + taps[t] + k channel] * w[j panel + (t channels + k) 16 ..], as they are packed.
template <class Operand, class To, int MR, int NR>
static __attribute__((noinline)) void tile(const TileInput<Operand>& in, const typename Operand::Element* w, Index panel, To* out, Index out_pixel) {
  constexpr int GROUPS = (MR + 2) / 3, TOGETHER = Operand::TOGETHER;
  Lanes sum[MR][NR];
  TDPASS_UNROLL for (int i = 0; i < MR; i++) TDPASS_UNROLL for (int j = 0; j < NR; j++) sum[i][j] = zero();
  const Index pixel = in.pixel, channel = TOGETHER > 1 ? TOGETHER : in.channel;
  const int steps = in.channels / TOGETHER;
  for (int t = 0; t < in.tap_count; t++) {
    const typename Operand::Element* row[GROUPS];
    TDPASS_UNROLL for (int q = 0; q < GROUPS; q++) row[q] = in.base + in.taps[t] + 3 * q * pixel;
    for (int k = 0; k < steps; k++) {
      multiply_step<Operand, false>(row, pixel, w, panel, sum);
      w += LANES * TOGETHER;
      TDPASS_UNROLL for (int q = 0; q < GROUPS; q++) row[q] += channel;
    }
    if (in.channels % TOGETHER) {
      multiply_step<Operand, true>(row, pixel, w, panel, sum);
      w += LANES * TOGETHER;
    }
  }
  TDPASS_UNROLL for (int i = 0; i < MR; i++) TDPASS_UNROLL for (int j = 0; j < NR; j++) write_some(out + i * out_pixel + j * LANES, sum[i][j], LANES);
}

template <class Operand, class To> using Tile = void (*)(const TileInput<Operand>&, const typename Operand::Element*, Index, To*, Index);
constexpr int MAX_PIXELS = 14, MAX_PANELS = 4;

template <class Operand, class To, int MR, int NR> constexpr Tile<Operand, To> tile_or_null() {
  if constexpr (MR * NR <= ACCUMULATORS) return &tile<Operand, To, MR, NR>;
  else return nullptr;
}
template <class Operand, class To, int MR> struct TileRow {
  static constexpr Tile<Operand, To> by_panels[MAX_PANELS] = {tile_or_null<Operand, To, MR, 1>(), tile_or_null<Operand, To, MR, 2>(),
                                                              tile_or_null<Operand, To, MR, 3>(), tile_or_null<Operand, To, MR, 4>()};
};
template <class Operand, class To>
static constexpr const Tile<Operand, To>* TILES[MAX_PIXELS + 1] = {
    nullptr,
    TileRow<Operand, To, 1>::by_panels,  TileRow<Operand, To, 2>::by_panels,  TileRow<Operand, To, 3>::by_panels,  TileRow<Operand, To, 4>::by_panels,
    TileRow<Operand, To, 5>::by_panels,  TileRow<Operand, To, 6>::by_panels,  TileRow<Operand, To, 7>::by_panels,  TileRow<Operand, To, 8>::by_panels,
    TileRow<Operand, To, 9>::by_panels,  TileRow<Operand, To, 10>::by_panels, TileRow<Operand, To, 11>::by_panels, TileRow<Operand, To, 12>::by_panels,
    TileRow<Operand, To, 13>::by_panels, TileRow<Operand, To, 14>::by_panels};

// Panels and pixels per tile that take the fewest cycles for a row: two multiply-adds or two loads a cycle, `latency` cycles each.
struct Blocking {
  int panels = 1, blocks = 1;
  Blocking(int width, int panel_count, double latency) {
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
};

}  // namespace tdpass
