// A linear layer whose matrices are stored in few bits and multiplied in float32, compiled once per
// instruction set.
//
// 16 outputs lie in a vector; codes become numbers in registers.  Few tokens take as long as the codes take
// to arrive: every weight is read once, the thin factors beside the large matrix in the same pass.  For many
// tokens a panel is decoded once.
#include "isa.h"

#include <algorithm>

#include "lanes.h"
#include "scratch.h"
#include "tdpass.h"

namespace tdpass {
namespace {

constexpr int MOST_TOKENS = 8;  // that are multiplied at once

// How the weights of 16 outputs are read, in units of `UNIT`: a block of `BYTES` holds those of `WORD`
// inputs, and those of `STEP` inputs are read at once where so many are left.
struct Whole {
  static constexpr float UNIT = 1;
};
struct Floats : Whole {
  static constexpr int WORD = 1, STEP = 1, BYTES = 64;
  static TDPASS_INLINE Lanes block(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  static TDPASS_INLINE Lanes weights(Lanes block, int) { return block; }
};
struct Halfwords : Whole {
  static constexpr int WORD = 1, STEP = 1, BYTES = 32;
  static TDPASS_INLINE Lanes block(const char* p) {
    return read_some(reinterpret_cast<const Half*>(p), LANES);
  }
  static TDPASS_INLINE Lanes weights(Lanes block, int) { return block; }
};
struct Bytes : Whole {
  static constexpr int WORD = 1, STEP = 1, BYTES = 16;
  static TDPASS_INLINE Lanes block(const char* p) {
    return __builtin_convertvector(load_signed(reinterpret_cast<const int8_t*>(p)), Lanes);
  }
  static TDPASS_INLINE Lanes weights(Lanes block, int) { return block; }
};
struct Nibbles : Whole {
  static constexpr int WORD = 8, STEP = 8, BYTES = 64;
  static TDPASS_INLINE Words block(const char* p) { return *reinterpret_cast<const Words*>(p); }
  static TDPASS_INLINE Lanes weights(Words block, int j) {
#if defined(__AVX512F__)  // a table of 16 numbers is one register, of whose index four bits count
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return (Lanes)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)(block >> (4 * j)), table);
#else
    return __builtin_convertvector((block << (28 - 4 * j)) >> 28, Lanes);
#endif
  }
};

struct Float8s {  // sign, four bits of exponent, three of mantissa: those of a float16 that is 2^8 times
                  // smaller
  static constexpr float UNIT = 256;
  static constexpr int WORD = 1, BYTES = 16;
  static TDPASS_INLINE Lanes block(const char* p) {
#if defined(__AVX2__) && defined(__F16C__)  // which widens the smallest numbers too, however rounding is set
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i spread = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
    const __m256i nan = _mm256_cmpeq_epi16(
        _mm256_or_si256(spread, _mm256_set1_epi16(short(0xc000))), _mm256_set1_epi16(short(0xff80)));
    const __m256i half = _mm256_or_si256(
        _mm256_and_si256(spread, _mm256_set1_epi16(short(0xbfff))), _mm256_srli_epi16(nan, 1));
    return widened(half);
#else
    const Words code = load_signed(reinterpret_cast<const int8_t*>(p)), magnitude = code & 0x7f;
    const Words normal = (magnitude << 20) + (112 << 23);
    const Words small = (Words)(__builtin_convertvector(magnitude, Lanes) * 0x1p-17f);
    const Words number = magnitude > 7 ? normal : small;
    return (Lanes)((magnitude == 0x7f ? Words{} + 0x7fc00000 : number) | (code & int32_t(0x80000000)));
#endif
  }
  static TDPASS_INLINE Lanes weights(Lanes block, int) { return block; }

#if defined(__AVX512F__)
  struct Two {
    Lanes of[2];
  };
  static constexpr int STEP = 2;
  static TDPASS_INLINE Two blocks(const char* p) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m512i spread = _mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7);
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(
        _mm512_or_si512(spread, _mm512_set1_epi16(short(0xc000))), _mm512_set1_epi16(short(0xff80)));
    const __m512i half = _mm512_mask_mov_epi16(
        _mm512_and_si512(spread, _mm512_set1_epi16(short(0xbfff))), nan, _mm512_set1_epi16(0x7fff));
    return {{widened(_mm512_castsi512_si256(half)), widened(_mm512_maskz_extracti64x4_epi64(0xf, half, 1))}};
  }
  static TDPASS_INLINE Lanes weights(const Two& blocks, int j) { return blocks.of[j]; }
#else
  static constexpr int STEP = 1;
#endif

 private:
#if defined(__AVX512F__)
  static TDPASS_INLINE Lanes widened(__m256i half) { return (Lanes)_mm512_maskz_cvtph_ps(0xffff, half); }
#elif defined(__AVX2__) && defined(__F16C__)
  static TDPASS_INLINE Lanes widened(__m256i half) {
    const __m256 parts[] = {
        _mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
    Lanes values;
    std::memcpy(&values, parts, sizeof values);
    return values;
  }
#endif
};

// The weights of `STEP` inputs.
template <class Code> static TDPASS_INLINE auto at_once(const char* p) {
  if constexpr (Code::STEP > Code::WORD) return Code::blocks(p);
  else return Code::block(p);
}

// Calls `body` with what reads codes of that kind.
template <class Body> void by_kind(int32_t kind, const Body& body) {
  switch (kind) {
    case TDPASS_FLOATS: return body(Floats());
    case TDPASS_HALVES: return body(Halfwords());
    case TDPASS_BYTES: return body(Bytes());
    case TDPASS_FLOAT8: return body(Float8s());
    default: return body(Nibbles());
  }
}

// A matrix as its panels lie; one group of all inputs where it has no scales.
template <class Code> struct Panels {
  const tdpass_matrix& matrix;
  const int groups, size;
  const Index group_bytes;

  explicit Panels(const tdpass_matrix& m)
      : matrix(m),
        groups(std::max(1, m.groups)),
        size(m.in / groups),
        group_bytes(Index(size + Code::WORD - 1) / Code::WORD * Code::BYTES) {}
  const char* codes(int panel, int group) const {
    return static_cast<const char*>(matrix.codes) + (Index(panel) * groups + group) * group_bytes;
  }
  Lanes scale(int panel, int group) const {
    return matrix.groups ? load(matrix.scales + (Index(panel) * groups + group) * LANES) : broadcast(1.0f);
  }
  Lanes zero_point(int panel, int group) const {
    return matrix.zeros ? load(matrix.zeros + (Index(panel) * groups + group) * LANES) : zero();
  }
};

// sum[i] += what a panel makes of token i, for MR of them.  `totals[i][group]` are sums of the inputs where
// codes have zero points.
template <class Code, int MR>
static TDPASS_INLINE void multiply(
    const Panels<Code>& w, int panel, const float* x, Index row, const float* totals, Lanes (&sum)[MR]) {
  constexpr int SPLIT = MR >= 4 ? 1
      : MR >= 2                 ? 2
                                : 4;  // sums of every n-th term, which do not wait for each other
  constexpr int AT_ONCE = std::max(Code::STEP, SPLIT);
  for (int g = 0; g < w.groups; g++, x += w.size) {
    const char* codes = w.codes(panel, g);
    Lanes part[SPLIT][MR] = {};
    auto term = [&](Lanes weights, int k, Lanes(&to)[MR]) __attribute__((always_inline)) {
      TDPASS_UNROLL for (int i = 0; i < MR; i++) to[i] += x[i * row + k] * weights;
    };
    int k = 0;
    for (; k + AT_ONCE <= w.size; k += AT_ONCE) {
      TDPASS_UNROLL for (int j = 0; j < AT_ONCE; j += Code::STEP) {
        const auto block = at_once<Code>(codes);
        codes += Code::BYTES * (Code::STEP / Code::WORD);
        TDPASS_UNROLL for (int l = 0; l < Code::STEP; l++)
            term(Code::weights(block, l), k + j + l, part[(j + l) % SPLIT]);
      }
    }
    for (int l = 0; k < w.size; k++, l = (l + 1) % Code::WORD) {
      term(Code::weights(Code::block(codes), l), k, part[0]);
      if (Code::WORD == 1) codes += Code::BYTES;
    }
    const Lanes scale = w.scale(panel, g), shift = w.zero_point(panel, g);
    TDPASS_UNROLL for (int i = 0; i < MR; i++) {
      Lanes all = part[0][i];
      TDPASS_UNROLL for (int s = 1; s < SPLIT; s++) all += part[s][i];
      if (Code::UNIT != 1) all *= Code::UNIT;
      if (totals) all -= totals[i * w.groups + g] * shift;
      sum[i] += all * scale;
    }
  }
}

// A panel as float32, `[inputs][16]`.
template <class Code> void decode(const Panels<Code>& w, int panel, float* to) {
  for (int g = 0; g < w.groups; g++) {
    const Lanes scale = w.scale(panel, g), shift = w.zero_point(panel, g);
    for (int k = 0; k < w.size; k++, to += LANES)
      store(to,
          (Code::weights(
               Code::block(w.codes(panel, g) + Index(k / Code::WORD) * Code::BYTES), k % Code::WORD) *
                  Code::UNIT -
              shift) *
              scale);
  }
}

// Adds to `sums[token][16]` what a panel makes of tokens of `x`.
template <int MR, class Code>
void add_tokens(
    const Panels<Code>& w, int panel, const float* x, Index row, const float* totals, Lanes* sums) {
  Lanes sum[MR];
  TDPASS_UNROLL for (int i = 0; i < MR; i++) sum[i] = sums[i];
  multiply<Code, MR>(w, panel, x, row, totals, sum);
  TDPASS_UNROLL for (int i = 0; i < MR; i++) sums[i] = sum[i];
}
template <class Code>
void add(const Panels<Code>& w, int panel, const float* x, Index row, int tokens, const float* totals,
    Lanes* sums) {
  for (int i = 0; i < tokens;) {
    const float *from = x + i * row, *of = totals ? totals + Index(i) * w.groups : nullptr;
    if (tokens - i >= 8) add_tokens<8>(w, panel, from, row, of, sums + i), i += 8;
    else if (tokens - i >= 4) add_tokens<4>(w, panel, from, row, of, sums + i), i += 4;
    else if (tokens - i >= 2) add_tokens<2>(w, panel, from, row, of, sums + i), i += 2;
    else add_tokens<1>(w, panel, from, row, of, sums + i), i += 1;
  }
}

// The same, by whichever code the matrix has; many tokens share what was decoded once.
void add_panel(const tdpass_matrix& m, int panel, const float* x, Index row, int tokens, const float* totals,
    float* decoded, Lanes* sums) {
  by_kind(m.kind, [&](auto code) {
    const Panels<decltype(code)> panels(m);
    if (tokens <= MOST_TOKENS || m.kind == TDPASS_FLOATS)
      return add(panels, panel, x, row, tokens, totals, sums);
    decode(panels, panel, decoded);
    const tdpass_matrix plain{decoded, nullptr, TDPASS_FLOATS, 0, m.in, LANES, nullptr};
    add(Panels<Floats>(plain), 0, x, row, tokens, nullptr, sums);
  });
}

// y = activation(sums + bias + residual) of one panel.
template <class T>
void finish(const tdpass_weight_only& layer, const tdpass_rows& y, int panel, const Lanes* sums) {
  const int at = panel * LANES, count = std::min(LANES, int(y.channels) - at);
  const Lanes bias = layer.bias ? load_some(layer.bias + at, count) : zero();
  for (int64_t i = 0; i < y.rows; i++) {
    Lanes v = sums[i] + bias;
    if (layer.residual)
      v += read_some(static_cast<const T*>(layer.residual->data) + i * layer.residual->stride + at, count);
    write_some(static_cast<T*>(y.data) + i * y.stride + at, activate(v, layer.activation), count);
  }
}

// `totals[token][group]`: the sums of what the groups of a matrix read.
void add_up(const tdpass_matrix& m, const float* x, Index row, int tokens, float* totals) {
  const int groups = std::max(1, m.groups), size = m.in / groups;
  for (int i = 0; i < tokens; i++)
    for (int g = 0; g < groups; g++) {
      float total = 0;
      for (int k = 0; k < size; k++) total += x[i * row + Index(g) * size + k];
      *totals++ = total;
    }
}

int panels_of(const tdpass_matrix& m) { return (m.out + LANES - 1) / LANES; }

// All of `x`, float32 rows, through the layer; panels are shared among threads, those of V first.
int run_layer(const tdpass_weight_only& layer, const float* x, Index row, const tdpass_rows& y,
    const tdpass_pool* pool) {
  const int tokens = int(y.rows);
  const bool thin = layer.matrices > 1;
  const tdpass_matrix* m = layer.matrix;
  const int rank = thin ? round_up(m[1].out, LANES) : 0;
  Scratch between, grouped;
  float* totals = m[0].zeros ? grouped.reserve(size_t(tokens) * std::max(1, m[0].groups)) : nullptr;
  if (totals) add_up(m[0], x, row, tokens, totals);
  float* q = between.reserve(size_t(tokens) * rank + LANES);
  auto each_panel = [&](int panels, const auto& body) {
    const int tasks = std::min(pool->threads, panels);
    auto task = [&](int k) {
      int most = 0;
      for (int i = 0; i < layer.matrices; i++) most = std::max(most, m[i].in);
      float* memory = thread_scratch(size_t(tokens + most) * LANES);
      for (int p = panels * k / tasks; p < panels * (k + 1) / tasks; p++) {
        Lanes* sums = reinterpret_cast<Lanes*>(memory);
        std::fill(sums, sums + tokens, zero());
        body(p, sums, memory + size_t(tokens) * LANES);
      }
    };
    return run_tasks(pool, tasks, task);
  };
  if (thin) {
    const int status = each_panel(panels_of(m[1]), [&](int p, Lanes* sums, float* decoded) {
      add_panel(m[1], p, x, row, tokens, nullptr, decoded, sums);
      for (int i = 0; i < tokens; i++) store(q + Index(i) * rank + p * LANES, sums[i]);
    });
    if (status) return status;
  }
  return each_panel(panels_of(m[0]), [&](int p, Lanes* sums, float* decoded) {
    add_panel(m[0], p, x, row, tokens, totals, decoded, sums);
    if (thin) add_panel(m[2], p, q, rank, tokens, nullptr, decoded, sums);
    if (layer.dtype == TDPASS_BFLOAT16) finish<Half>(layer, y, p, sums);
    else finish<float>(layer, y, p, sums);
  });
}

}  // namespace
}  // namespace tdpass

extern "C" int32_t TDPASS_SYMBOL(tdpass_weight_only_linear)(
    const tdpass_weight_only* layer, const tdpass_rows* x, const tdpass_rows* y, const tdpass_pool* pool) {
  using namespace tdpass;
  constexpr int64_t AT_ONCE = 256;  // tokens whose sums of a panel stay in the first-level cache
  Scratch wide;
  const bool half = layer->dtype == TDPASS_BFLOAT16;
  const Index item = half ? 2 : 4;
  for (int64_t begin = 0; begin < y->rows; begin += AT_ONCE) {
    const int64_t count = std::min(AT_ONCE, y->rows - begin);
    auto part = [&](const tdpass_rows& all) {
      return tdpass_rows{
          static_cast<char*>(all.data) + begin * all.stride * item, count, all.channels, all.stride};
    };
    tdpass_weight_only some = *layer;
    tdpass_rows rest{};
    if (layer->residual) rest = part(*layer->residual), some.residual = &rest;
    const tdpass_rows from = part(*x);
    const float* floats = static_cast<const float*>(from.data);
    Index row = from.stride;
    if (half) {
      float* made = wide.reserve(size_t(count) * x->channels);
      for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < x->channels; c++)
          made[i * x->channels + c] = widen(static_cast<const Half*>(from.data)[i * from.stride + c]);
      floats = made, row = x->channels;
    }
    if (const int status = run_layer(some, floats, row, part(*y), pool)) return status;
  }
  return 0;
}
