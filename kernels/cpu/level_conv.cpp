// A convolution whose weight is levels, compiled once per instruction set.
//
// Codes become numbers a few panels of outputs at a time, in the layout and within the cache that the chain
// of convolutions reads them from: what they come to is never there as a whole.
#include "isa.h"

#include <algorithm>

#include "lanes.h"
#include "scratch.h"
#include "tdpass.h"

extern "C" int32_t TDPASS_SYMBOL(tdpass_conv_chain)(
    const tdpass_chain* chain, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool);

namespace tdpass {
namespace {

constexpr int FEW = 16;                      // levels that codes of four bits tell apart
constexpr Index DECODED_FLOATS = 48 * 1024;  // that share the second-level cache with the input

// to[lane] = table[codes[lane]], codes being a byte each.
static TDPASS_INLINE void look_up(const float* table, Words codes, float* to) {
#if defined(__AVX512F__)
  store(to, (Lanes)_mm512_i32gather_ps((__m512i)codes, table, 4));
#else
  for (int lane = 0; lane < LANES; lane++) to[lane] = table[codes[lane]];
#endif
}

// The same of 16 levels, by the low four bits of codes.
static TDPASS_INLINE void look_up_few(const float* table, Words codes, float* to) {
#if defined(__AVX512F__)
  store(to, (Lanes)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)codes, (__m512)load(table)));
#else
  look_up(table, codes & (FEW - 1), to);
#endif
}

static TDPASS_INLINE Words load_unsigned(const uint8_t* codes) {
  typedef uint8_t Sixteen __attribute__((vector_size(16), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Sixteen*>(codes), Words);
}

// Rows of 16 weights out of codes, two to a byte where `few`.
void decode(const uint8_t* codes, const float* table, bool few, Index rows, float* to) {
  if (!few) {
    for (Index row = 0; row < rows; row++)
      look_up(table, load_unsigned(codes + row * LANES), to + row * LANES);
    return;
  }
  for (Index row = 0; row < rows; row += 2, codes += LANES) {
    const Words both = load_unsigned(codes);
    look_up_few(table, both, to + row * LANES);
    if (row + 1 < rows) look_up_few(table, both >> 4, to + (row + 1) * LANES);
  }
}

// Channels `first ..` of an image.
tdpass_image channels(const tdpass_image& whole, int32_t dtype, int first, int count) {
  tdpass_image some = whole;
  some.data = static_cast<char*>(whole.data) + first * whole.stride[1] * (dtype == TDPASS_BFLOAT16 ? 2 : 4);
  some.size[1] = count;
  return some;
}

}  // namespace
}  // namespace tdpass

extern "C" int32_t TDPASS_SYMBOL(tdpass_level_conv)(
    const tdpass_levels* layer, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool) {
  using namespace tdpass;
  const tdpass_stage& t = layer->shape;
  const Index rows = Index(t.in) * t.kernel[0] * t.kernel[1];
  const bool few = layer->levels <= FEW;
  const Index panel_bytes = (few ? (rows + 1) / 2 : rows) * LANES;
  const int panels = (t.out + LANES - 1) / LANES,
            some = int(std::min<Index>(panels, std::max<Index>(1, DECODED_FLOATS / (rows * LANES))));
  alignas(64) float table[256] = {};
  std::copy(layer->table, layer->table + layer->levels, table);
  static thread_local Scratch decoded;
  float* const weight = decoded.reserve(size_t(some) * rows * LANES);
  const void* const weights[] = {weight};
  for (int panel = 0; panel < panels; panel += some) {
    const int count = std::min(some, panels - panel), first = panel * LANES;
    for (int k = 0; k < count; k++)
      decode(layer->codes + (panel + k) * panel_bytes, table, few, rows, weight + k * rows * LANES);
    tdpass_stage stage = t;
    stage.out = std::min(t.out - first, count * LANES);
    tdpass_chain chain{layer->dtype, TDPASS_CHANNEL_LANES, 1, layer->activation, &stage, weights,
        layer->bias ? layer->bias + first : nullptr, nullptr};
    tdpass_image rest{};
    if (layer->residual)
      chain.residual = &(rest = channels(*layer->residual, layer->dtype, first, stage.out));
    const tdpass_image into = channels(*y, layer->dtype, first, stage.out);
    if (const int32_t status = TDPASS_SYMBOL(tdpass_conv_chain)(&chain, x, &into, pool)) return status;
  }
  return 0;
}
