// Sixteen floats at once in GCC/Clang vector extensions; the compiler splits them where registers are
// narrower.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "tdpass.h"

#define TDPASS_INLINE inline __attribute__((always_inline))
#define TDPASS_UNROLL _Pragma("GCC unroll 16")

namespace tdpass {

using Index = long;
constexpr int LANES = 16;
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(64), aligned(4), may_alias));

// Accumulators that fit the register file, in units of `Lanes`: 32 of 512 bits, 16 of 256, 16 of 128.
#if defined(__AVX512F__)
constexpr int ACCUMULATORS = 28;
#elif defined(__AVX2__)
constexpr int ACCUMULATORS = 6;
#else
constexpr int ACCUMULATORS = 2;
#endif

static TDPASS_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

static TDPASS_INLINE Lanes zero() { return Lanes{}; }
static TDPASS_INLINE Lanes broadcast(float value) { return value - Lanes{}; }
static TDPASS_INLINE Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
static TDPASS_INLINE void store(float* p, Lanes v) { *reinterpret_cast<Lanes*>(p) = v; }

static TDPASS_INLINE Lanes load_some(const float* p, int count) {
  Lanes v{};
  if (count >= LANES) return load(p);
  std::memcpy(&v, p, sizeof(float) * count);
  return v;
}
static TDPASS_INLINE void store_some(float* p, Lanes v, int count) {
  if (count >= LANES) store(p, v);
  else std::memcpy(p, &v, sizeof(float) * count);
}

typedef uint16_t Half;  // bfloat16 as bits
static TDPASS_INLINE float widen(Half h) {
  uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static TDPASS_INLINE Half narrow(float f) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return Half((bits >> 16) | 0x40u);
  return Half((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
static TDPASS_INLINE float widen(float f) { return f; }
template <class T> static TDPASS_INLINE T narrow_to(float f);
template <> TDPASS_INLINE float narrow_to<float>(float f) { return f; }
template <> TDPASS_INLINE Half narrow_to<Half>(float f) { return narrow(f); }

typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
static TDPASS_INLINE Lanes as_lanes(Bits bits) {
  Lanes v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
static TDPASS_INLINE Words as_words(Lanes v) {
  Words bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
static TDPASS_INLINE Halves narrow(Lanes v) {
  Bits bits;
  std::memcpy(&bits, &v, sizeof bits);
  Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0u, Halves);
}

static TDPASS_INLINE Bits load_some(const Half* p, int count) {
  Halves h{};
  if (count >= LANES) std::memcpy(&h, p, sizeof h);
  else std::memcpy(&h, p, sizeof(Half) * count);
#if defined(__AVX512F__)  // a conversion of vectors is done by halves
  return (Bits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);
#else
  return __builtin_convertvector(h, Bits);
#endif
}

typedef int8_t Signed __attribute__((vector_size(16), aligned(1), may_alias));
static TDPASS_INLINE Words load_signed(const int8_t* p) {
  const Signed bytes = *reinterpret_cast<const Signed*>(p);
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)bytes);
#else
  return __builtin_convertvector(bytes, Words);
#endif
}

static TDPASS_INLINE Lanes read_some(const float* p, int count) { return load_some(p, count); }
static TDPASS_INLINE Lanes read_some(const Half* p, int count) { return as_lanes(load_some(p, count) << 16); }
static TDPASS_INLINE void write_some(float* p, Lanes v, int count) { store_some(p, v, count); }
static TDPASS_INLINE void write_some(Half* p, Lanes v, int count) {
  Halves h = narrow(v);
  if (count >= LANES) std::memcpy(p, &h, sizeof h);
  else std::memcpy(p, &h, sizeof(Half) * count);
}

static TDPASS_INLINE Lanes clamp(Lanes x, float low, float high) {
  x = x < low ? broadcast(low) : x;
  return x > high ? broadcast(high) : x;
}

// exp to 2 ulp on [-87, 88]: 2^n by the exponent bits, the rest by a polynomial of degree 6; above it is
// infinite, NaN stays NaN.
static TDPASS_INLINE Lanes exponential(Lanes given) {
  Lanes x = clamp(given, -87.0f, 88.0f);
  Lanes t = x * 1.44269504f;
  Lanes magic = broadcast(12582912.0f);
  Lanes n = (t + magic) - magic;
  Lanes f = x - n * 0.693145752f;
  f = f - n * 1.42860677e-6f;
  Lanes p = broadcast(1.3981999e-3f);
  p = p * f + 8.3334519e-3f;
  p = p * f + 4.1665796e-2f;
  p = p * f + 1.6666666e-1f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  Words bits = __builtin_convertvector(n, Words) + 127;
  bits = bits << 23;
  Lanes scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return given > 88.0f ? broadcast(__builtin_inff()) : p * scale;
}
static TDPASS_INLINE Lanes sigmoid(Lanes x) { return 1.0f / (1.0f + exponential(-x)); }
static TDPASS_INLINE Lanes hyperbolic_tangent(Lanes x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

// erf by Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7.
static TDPASS_INLINE Lanes error_function(Lanes x) {
  Lanes a = x < 0.0f ? -x : x;
  Lanes t = 1.0f / (1.0f + 0.3275911f * a);
  Lanes p = broadcast(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  Lanes e = 1.0f - p * t * exponential(-a * a);
  return x < 0.0f ? -e : e;
}

static TDPASS_INLINE Lanes activate(Lanes x, const tdpass_activation& activation) {
  switch (activation.function) {
    case TDPASS_CLAMP: return clamp(x, activation.low, activation.high);
    case TDPASS_SILU: return x * sigmoid(x);
    case TDPASS_GELU: return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
    default: return x;
  }
}

// Where an activation cuts that does nothing else.
struct Bounds {
  float low = -__builtin_inff(), high = __builtin_inff();

  Bounds() = default;
  explicit Bounds(const tdpass_activation& activation) {
    if (activation.function == TDPASS_CLAMP) low = activation.low, high = activation.high;
  }
  TDPASS_INLINE Lanes operator()(Lanes x) const { return clamp(x, low, high); }
};

}  // namespace tdpass
