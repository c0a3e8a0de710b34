// Products by a matrix unit (Intel's AMX): 16 pixels x 16 output channels at once, over 64 bytes of input
// channels.
//
// Packed weights of channel pairs and quads are what the unit takes: 16 rows of a panel are a tile.  It is
// used where the instruction set has it, or where `amx.h` does what it would do.
#pragma once
#include "amx.h"
#include "lanes.h"

namespace tdpass {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64, MOST_TILE_PIXELS = 2 * TILE_ROWS;

template <class Operand> struct TileInput {
  const typename Operand::Element* base;
  Index pixel, channel;  // strides; channels that are multiplied together lie together
  const Index* taps;     // offsets of the kernel's positions
  int tap_count, channels;
};

#if defined(TDPASS_AMX)

constexpr bool MATRIX_TILES = true;

// Shapes of the unit's eight tiles: sums in 0 to 3, inputs in 4 and weights in 6, in 5 and 7 those of the
// last channels.
static void configure_tiles(int rows, int tail) {
  static thread_local int configured = -1;
  const int wanted = rows * TILE_BYTES + tail;
  if (amx_ready() && configured == wanted) return;
  AmxShapes shapes;
  for (int t = 0; t < 4; t++) shapes.set(t, rows, TILE_BYTES);
  shapes.set(4, rows, TILE_BYTES), shapes.set(5, rows, tail);
  shapes.set(6, TILE_ROWS, TILE_BYTES), shapes.set(7, tail / 4, TILE_BYTES);
  amx_configure(shapes);
  configured = wanted;
}

template <class Operand, class To>
static __attribute__((noinline)) void matrix_tiles(const TileInput<Operand>& in,
    const typename Operand::Packed* w, Index panel, int mr, int nr, const To& to) {
  typedef typename Operand::Element Element;
  const bool two = mr > TILE_ROWS;
  const int rows = two ? (mr + 1) / 2 : mr,
            bytes = (in.channels + Operand::TOGETHER - 1) / Operand::TOGETHER * 4, tail = bytes % TILE_BYTES;
  const Index pitch = in.pixel * Index(sizeof(Element)), second = (mr - rows) * in.pixel;
  configure_tiles(rows, tail);
  AMX_ZERO(0);
  AMX_ZERO(1);
  AMX_ZERO(2);
  AMX_ZERO(3);
#define TDPASS_TILE_STEP(inputs, weights)        \
  AMX_LOAD(inputs, p, pitch);                    \
  AMX_LOAD(weights, w, TILE_BYTES);              \
  AMX_MULTIPLY(Operand, 0, inputs, weights);     \
  if (nr > 1) {                                  \
    AMX_LOAD(weights, w + panel, TILE_BYTES);    \
    AMX_MULTIPLY(Operand, 1, inputs, weights);   \
  }                                              \
  if (two) {                                     \
    AMX_LOAD(inputs, p + second, pitch);         \
    if (nr > 1) {                                \
      AMX_MULTIPLY(Operand, 3, inputs, weights); \
      AMX_LOAD(weights, w, TILE_BYTES);          \
    }                                            \
    AMX_MULTIPLY(Operand, 2, inputs, weights);   \
  }
  constexpr Index FULL = TILE_BYTES / Index(sizeof(Element));
  for (int t = 0; t < in.tap_count; t++) {
    const Element* p = in.base + in.taps[t];
    for (int k = 0; k < bytes / TILE_BYTES; k++) {
      TDPASS_TILE_STEP(4, 6)
      p += FULL, w += FULL * LANES;
    }
    if (tail) {
      TDPASS_TILE_STEP(5, 7)
      w += tail / Index(sizeof(Element)) * LANES;
    }
  }
#undef TDPASS_TILE_STEP
  typedef decltype(Operand::finished(typename Operand::Sum{})) Sum;
  alignas(64) Sum sums[4][TILE_ROWS];
  AMX_STORE(0, sums[0]);
  if (nr > 1) AMX_STORE(1, sums[1]);
  if (two) AMX_STORE(2, sums[2]);
  if (two && nr > 1) AMX_STORE(3, sums[3]);
  const To end = to;
  for (int half = 0; half <= int(two); half++)
    for (int j = 0; j < nr; j++)
      for (int i = 0; i < rows; i++) end(half * (mr - rows) + i, j, sums[2 * half + j][i]);
}

#else

constexpr bool MATRIX_TILES = false;

template <class Operand, class To>
static TDPASS_INLINE void matrix_tiles(
    const TileInput<Operand>&, const typename Operand::Packed*, Index, int, int, const To&) {}

#endif

}  // namespace tdpass
