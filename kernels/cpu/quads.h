// Four input channels at a time, bytes times int8, summed exactly in 32 bits: by VNNI, else by exact products
// of 16 bits.
#pragma once
#include "grid.h"
#include "tile.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tdpass {

// 64 bytes: of an input channel for each of 16 output channels, or sums of 32 bits.
#if defined(__AVX512BW__)
struct Block {
  __m512i all;
  TDPASS_INLINE Block() : all(_mm512_setzero_si512()) {}
  TDPASS_INLINE explicit Block(__m512i v) : all(v) {}
  static TDPASS_INLINE Block load(const void* p) { return Block(_mm512_loadu_si512(p)); }
  static TDPASS_INLINE Block repeat(int32_t word) { return Block(_mm512_set1_epi32(word)); }
  TDPASS_INLINE Words words() const {
    Words w;
    std::memcpy(&w, &all, sizeof w);
    return w;
  }
};
static TDPASS_INLINE Block add_products(Block a, Block b, Block sum) {
#if defined(__AVX512VNNI__)
  return Block(_mm512_dpbusd_epi32(sum.all, a.all, b.all));
#else
  const __m512i even = _mm512_madd_epi16(
      _mm512_and_si512(a.all, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(b.all, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(a.all, 8), _mm512_srai_epi16(b.all, 8));
  return Block(_mm512_add_epi32(sum.all, _mm512_add_epi32(even, odd)));
#endif
}
#elif defined(__AVX2__)
struct Block {
  __m256i low, high;
  TDPASS_INLINE Block() : low(_mm256_setzero_si256()), high(_mm256_setzero_si256()) {}
  TDPASS_INLINE Block(__m256i l, __m256i h) : low(l), high(h) {}
  static TDPASS_INLINE Block load(const void* p) {
    return {_mm256_loadu_si256(static_cast<const __m256i*>(p)),
        _mm256_loadu_si256(static_cast<const __m256i*>(p) + 1)};
  }
  static TDPASS_INLINE Block repeat(int32_t word) {
    return {_mm256_set1_epi32(word), _mm256_set1_epi32(word)};
  }
  TDPASS_INLINE Words words() const {
    Words w;
    std::memcpy(&w, this, sizeof w);
    return w;
  }
};
static TDPASS_INLINE __m256i add_products(__m256i a, __m256i b, __m256i sum) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, a, b);
#else
  const __m256i even = _mm256_madd_epi16(
      _mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
#endif
}
static TDPASS_INLINE Block add_products(Block a, Block b, Block sum) {
  return {add_products(a.low, b.low, sum.low), add_products(a.high, b.high, sum.high)};
}
#else
struct Block {
  Words all{};
  static TDPASS_INLINE Block load(const void* p) {
    Block b;
    std::memcpy(&b.all, p, sizeof b.all);
    return b;
  }
  static TDPASS_INLINE Block repeat(int32_t word) {
    Block b;
    b.all = word - Words{};
    return b;
  }
  TDPASS_INLINE Words words() const { return all; }
};
static TDPASS_INLINE Block add_products(Block a, Block b, Block sum) {
  TDPASS_UNROLL for (int i = 0; i < 4; i++) sum.all +=
      ((a.all >> (8 * i)) & 255) * ((b.all << (24 - 8 * i)) >> 24);
  return sum;
}
#endif

// What a tile multiplies; see `Singles`.
struct Quads {
  typedef uint8_t Element;
  typedef int8_t Packed;
  typedef Block Weights, Sum;
  static constexpr bool PADDED = true;
  static constexpr int TOGETHER = 4;
  static constexpr double LATENCY = 5;

  static constexpr bool by_tiles(bool) { return MATRIX_TILES; }
  static TDPASS_INLINE Weights weights(const int8_t* p) { return Block::load(p); }
  static TDPASS_INLINE Weights input(const uint8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return Block::repeat(word);
  }
  static TDPASS_INLINE Weights last_input(const uint8_t* p) { return input(p); }
  static TDPASS_INLINE Sum multiply_add(Weights a, Weights b, Sum sum) { return add_products(a, b, sum); }
  static TDPASS_INLINE Words finished(Sum sum) { return sum.words(); }
};

// Sums to codes of the grid that the next stage reads; `steps[c]` is the step of a sum in steps of that grid.
struct ToCodes {
  uint8_t* out;
  Index pixel;
  const int32_t* offset;
  const float* steps;
  int zero;
  TDPASS_INLINE void operator()(int i, int j, Words sum) const {
    const Lanes value = __builtin_convertvector(sum + load_words(offset + j * LANES), Lanes);
    store_codes(out + i * pixel + j * LANES, round_to_codes(value * load(steps + j * LANES), zero));
  }
  static TDPASS_INLINE Words load_words(const int32_t* p) { return *reinterpret_cast<const Words*>(p); }
};

// Sums to numbers; `own` are the scales of pixels that have one each.
struct ToNumbers {
  float* out;
  Index pixel;
  const int32_t* offset;
  const float *scale, *own;
  int own_step;
  TDPASS_INLINE Lanes value(int i, int j, Words sum) const {
    const Lanes value = __builtin_convertvector(sum + ToCodes::load_words(offset + j * LANES), Lanes) *
        load(scale + j * LANES);
    return own ? value * own[i * own_step] : value;
  }
  TDPASS_INLINE void operator()(int i, int j, Words sum) const {
    store(out + i * pixel + j * LANES, value(i, j, sum));
  }
};

// Sums to y, where nothing but a bias, with ADDS bytes on a grid, and a clamp comes between; `channels` of
// them are there.
template <class T, bool ADDS> struct ToOutput {
  T* out;
  Index pixel;
  ToNumbers numbers;  // `out` and `pixel` of it are not used
  const float* bias;  // whole vectors
  Bounds bounds;
  Grid grid;
  int channels;
  Added added;
  TDPASS_INLINE void operator()(int i, int j, Words sum) const {
    const int some = channels - j * LANES;
    Lanes v = numbers.value(i, j, sum) + load(bias + j * LANES);
    if (ADDS) v += added(i, j, some);
    v = bounds(v);
    if constexpr (sizeof(T) == 1) store_codes(out + i * pixel + j * LANES, grid.codes(v), some);
    else store_some(out + i * pixel + j * LANES, v, some);
  }
};

}  // namespace tdpass
