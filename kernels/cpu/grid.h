// Putting numbers on grids of bytes: `code = clamp(round(x / scale) + zero, 0, 255)`, ties to even, NaN to 0.
#pragma once
#include <algorithm>

#include "lanes.h"
#include "tdpass.h"

namespace tdpass {

typedef uint8_t Codes __attribute__((vector_size(16), aligned(1), may_alias));

constexpr int TOP_CODE = 255, MIDDLE_CODE = 128;
constexpr float LEAST_RANGE = 1e-30f;  // of a row that is all zeros

// Codes of numbers given in steps of the grid.
static TDPASS_INLINE Words round_to_codes(Lanes steps, int zero) {
#if defined(__AVX512F__)  // rounded at once: what is below all integers, or no number, becomes the least of
                          // them
  const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(float(TOP_CODE - zero)), (__m512)steps);
  const __m512i codes = _mm512_add_epi32(_mm512_cvtps_epi32(bounded), _mm512_set1_epi32(zero));
  return (Words)_mm512_max_epi32(codes, _mm512_setzero_si512());
#else
  const Lanes low = broadcast(float(-zero)), high = broadcast(float(TOP_CODE - zero)),
              magic = broadcast(12582912.0f);  // 1.5 2^23: adding it rounds
  steps = steps > low ? steps : low;
  steps = steps < high ? steps : high;
  const Lanes rounded = (steps + magic) - magic;
  return __builtin_convertvector(rounded, Words) + zero;
#endif
}

static TDPASS_INLINE void store_codes(uint8_t* p, Words codes, int count = LANES) {
  const Codes narrow = __builtin_convertvector(codes, Codes);
  if (count >= LANES) std::memcpy(p, &narrow, sizeof narrow);
  else std::memcpy(p, &narrow, count);
}
static TDPASS_INLINE Words load_codes(const uint8_t* p, int count = LANES) {
  Codes narrow{};
  if (count >= LANES) std::memcpy(&narrow, p, sizeof narrow);
  else std::memcpy(&narrow, p, count);
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)narrow);
#else
  return __builtin_convertvector(narrow, Words);
#endif
}

struct Grid {
  float scale = 0, inverse = 0;
  int zero = 0;

  Grid() = default;
  explicit Grid(const tdpass_grid& given)
      : scale(given.scale), inverse(1.0f / given.scale), zero(given.zero) {}
  explicit operator bool() const { return scale > 0; }
  TDPASS_INLINE Words codes(Lanes x) const { return round_to_codes(x * inverse, zero); }
  TDPASS_INLINE Lanes values(Words codes) const {
    return __builtin_convertvector(codes - zero, Lanes) * scale;
  }
};

// Bytes on a grid that are added to y; none where `codes` is null.
struct Added {
  const uint8_t* codes = nullptr;
  Index pixel = 0;
  Grid grid;
  TDPASS_INLINE Lanes operator()(int i, int j, int some) const {
    return grid.values(load_codes(codes + i * pixel + j * LANES, some));
  }
};

// Puts `count` numbers on a grid of their own, zero point 128; returns its scale, which is NaN where one of
// the numbers is.  Sizes are compared as integers, of which those of NaN are above all others.
template <class T> static float own_grid(const T* from, int count, uint8_t* to) {
  Words most{};
  for (int c = 0; c < count; c += LANES) {
    const Words size = as_words(read_some(from + c, std::min(LANES, count - c))) & 0x7fffffff;
    most = size > most ? size : most;
  }
  int32_t top = 0;
  for (int i = 0; i < LANES; i++) top = std::max(top, int32_t(most[i]));
  float largest;
  std::memcpy(&largest, &top, sizeof largest);
  largest = LEAST_RANGE > largest ? LEAST_RANGE : largest;
  const float inverse = 127.0f / largest;
  for (int c = 0; c < count; c += LANES) {
    const int some = std::min(LANES, count - c);
    store_codes(to + c, round_to_codes(read_some(from + c, some) * inverse, MIDDLE_CODE), some);
  }
  return largest / 127.0f;
}

}  // namespace tdpass
