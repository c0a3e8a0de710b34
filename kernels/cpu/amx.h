// The instructions of Intel's matrix unit (AMX) that the kernels use; where a test asks for it
// (TDPASS_AMX_EMULATED), in plain C++.
//
// Tiles are named by literal numbers.  Whole numbers come out of the emulation as of the unit, bit for bit;
// products of bfloat16 are added in another order.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(TDPASS_AMX_EMULATED) || (defined(__AMX_INT8__) && defined(__AMX_BF16__))
#define TDPASS_AMX
#endif

namespace tdpass {

#if defined(TDPASS_AMX)

// How the unit takes the shapes of its tiles: rows, and bytes of a row.
struct alignas(64) AmxShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  void set(int tile, int r, int b) {
    bytes[tile] = uint16_t(r && b ? b : 0), rows[tile] = uint8_t(r && b ? r : 0);
  }
};
static_assert(sizeof(AmxShapes) == 64, "as the unit reads it");

#endif

#if defined(TDPASS_AMX_EMULATED)

struct AmxTile {
  alignas(64) unsigned char row[16][64];
};
struct AmxState {
  bool ready = false;
  AmxShapes shapes;
  AmxTile tile[8];
};
inline AmxState& amx_state() {
  static thread_local AmxState state;
  return state;
}
inline bool amx_ready() { return amx_state().ready; }
inline void amx_configure(const AmxShapes& shapes) { amx_state().shapes = shapes, amx_state().ready = true; }
inline void amx_release() { amx_state().ready = false; }

inline void amx_zero(int t) { std::memset(&amx_state().tile[t], 0, sizeof(AmxTile)); }
inline void amx_load(int t, const void* from, long stride) {
  AmxState& state = amx_state();
  amx_zero(t);
  for (int r = 0; r < state.shapes.rows[t]; r++)
    std::memcpy(state.tile[t].row[r], static_cast<const char*>(from) + r * stride, state.shapes.bytes[t]);
}
inline void amx_store(int t, void* to) {
  AmxState& state = amx_state();
  for (int r = 0; r < state.shapes.rows[t]; r++)
    std::memcpy(static_cast<char*>(to) + r * 64, state.tile[t].row[r], state.shapes.bytes[t]);
}
template <class Sum, class Product> void amx_multiply(int c, int a, int b, const Product& product) {
  AmxState& state = amx_state();
  for (int m = 0; m < state.shapes.rows[c]; m++)
    for (int k = 0; k < state.shapes.bytes[a] / 4; k++)
      for (int n = 0; n < state.shapes.bytes[c] / 4; n++) {
        Sum sum;
        unsigned char* place = state.tile[c].row[m] + 4 * n;
        std::memcpy(&sum, place, sizeof sum);
        sum = product(sum, state.tile[a].row[m] + 4 * k, state.tile[b].row[k] + 4 * n);
        std::memcpy(place, &sum, sizeof sum);
      }
}
inline void amx_bytes(int c, int a, int b) {
  amx_multiply<int32_t>(c, a, b, [](int32_t sum, const unsigned char* x, const unsigned char* w) {
    for (int i = 0; i < 4; i++) sum += int32_t(x[i]) * int8_t(w[i]);
    return sum;
  });
}
inline void amx_halves(int c, int a, int b) {
  amx_multiply<float>(c, a, b, [](float sum, const unsigned char* x, const unsigned char* w) {
    for (int i = 0; i < 2; i++) {
      uint32_t bits[2] = {0, 0};
      std::memcpy(reinterpret_cast<char*>(&bits[0]) + 2, x + 2 * i, 2);
      std::memcpy(reinterpret_cast<char*>(&bits[1]) + 2, w + 2 * i, 2);
      float pair[2];
      std::memcpy(pair, bits, sizeof pair);
      sum += pair[0] * pair[1];
    }
    return sum;
  });
}
#define AMX_ZERO(t) amx_zero(t)
#define AMX_LOAD(t, from, stride) amx_load(t, from, stride)
#define AMX_STORE(t, to) amx_store(t, to)
#define AMX_MULTIPLY(Operand, c, a, b) (Operand::TOGETHER == 4 ? amx_bytes(c, a, b) : amx_halves(c, a, b))

#elif defined(TDPASS_AMX)

}  // namespace tdpass
#include <immintrin.h>
namespace tdpass {

inline bool& amx_state() {
  static thread_local bool ready = false;
  return ready;
}
inline bool amx_ready() { return amx_state(); }
inline void amx_configure(const AmxShapes& shapes) { _tile_loadconfig(&shapes), amx_state() = true; }
inline void amx_release() {
  if (amx_state()) _tile_release();
  amx_state() = false;
}
// The compiler is not told that tiles read memory.
#define AMX_FENCE() __asm__ volatile("" ::: "memory")
#define AMX_ZERO(t) _tile_zero(t)
#define AMX_LOAD(t, from, stride) \
  do {                            \
    AMX_FENCE();                  \
    _tile_loadd(t, from, stride); \
  } while (0)
#define AMX_STORE(t, to)     \
  do {                       \
    _tile_stored(t, to, 64); \
    AMX_FENCE();             \
  } while (0)
#define AMX_MULTIPLY(Operand, c, a, b)                 \
  do {                                                 \
    if (Operand::TOGETHER == 4) _tile_dpbusd(c, a, b); \
    else _tile_dpbf16ps(c, a, b);                      \
  } while (0)

#else
inline void amx_release() {}
#endif

}  // namespace tdpass
