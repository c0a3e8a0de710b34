// A chain of convolutions with output channels in vector lanes; buffers are `[row][pixel][channel]`.
//
// A tile of MR pixels x NR panels of 16 channels stays in registers over all taps and input channels; inputs are broadcast.
// x and y may be channels-last or not: x is read through its strides, y is transposed on the way out where it must be.
#pragma once
#include "output.h"
#include "rolling.h"

namespace tdpass {

static TDPASS_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

struct TileInput {
  const float* base;
  Index pixel, channel;  // strides
  const Index* taps;     // offsets of the kernel's positions
  int tap_count, channels;
};

// out[i][16 j ..] = sum over taps t, channels k of base[i pixel + taps[t] + k channel] * w[j panel + (t channels + k) 16 ..]
template <int MR, int NR> static __attribute__((noinline)) void tile(const TileInput& in, const float* w, Index panel, float* out, Index out_pixel) {
  constexpr int GROUPS = (MR + 2) / 3;
  Lanes sum[MR][NR];
  TDPASS_UNROLL for (int i = 0; i < MR; i++) TDPASS_UNROLL for (int j = 0; j < NR; j++) sum[i][j] = zero();
  const Index pixel = in.pixel, channel = in.channel;
  for (int t = 0; t < in.tap_count; t++) {
    const float* row[GROUPS];
    TDPASS_UNROLL for (int q = 0; q < GROUPS; q++) row[q] = in.base + in.taps[t] + 3 * q * pixel;
    for (int k = 0; k < in.channels; k++) {
      Lanes b[NR];
      TDPASS_UNROLL for (int j = 0; j < NR; j++) b[j] = load(w + j * panel);
      w += LANES;
      TDPASS_UNROLL for (int i = 0; i < MR; i++) {
        Lanes a = broadcast(row[i / 3][(i % 3) * pixel]);
        TDPASS_UNROLL for (int j = 0; j < NR; j++) sum[i][j] += a * b[j];
      }
      TDPASS_UNROLL for (int q = 0; q < GROUPS; q++) row[q] += channel;
    }
  }
  TDPASS_UNROLL for (int i = 0; i < MR; i++) TDPASS_UNROLL for (int j = 0; j < NR; j++) store(out + i * out_pixel + j * LANES, sum[i][j]);
}

typedef void (*Tile)(const TileInput&, const float*, Index, float*, Index);
constexpr int MAX_PIXELS = 14, MAX_PANELS = 4;

template <int MR, int NR> constexpr Tile tile_or_null() {
  if constexpr (MR * NR <= ACCUMULATORS) return &tile<MR, NR>;
  else return nullptr;
}
template <int MR> struct TileRow {
  static constexpr Tile by_panels[MAX_PANELS] = {tile_or_null<MR, 1>(), tile_or_null<MR, 2>(), tile_or_null<MR, 3>(), tile_or_null<MR, 4>()};
};
static constexpr const Tile* TILES[MAX_PIXELS + 1] = {
    nullptr,                TileRow<1>::by_panels,  TileRow<2>::by_panels,  TileRow<3>::by_panels,  TileRow<4>::by_panels,
    TileRow<5>::by_panels,  TileRow<6>::by_panels,  TileRow<7>::by_panels,  TileRow<8>::by_panels,  TileRow<9>::by_panels,
    TileRow<10>::by_panels, TileRow<11>::by_panels, TileRow<12>::by_panels, TileRow<13>::by_panels, TileRow<14>::by_panels};

// Panels and pixels per tile that take the fewest cycles for a row: two multiply-adds or two loads a cycle, four cycles latency.
struct Blocking {
  int panels = 1, blocks = 1;
  Blocking(int width, int panel_count) {
    double best = 1e30;
    for (int nr = 1; nr <= MAX_PANELS && nr <= panel_count; nr++) {
      int most = std::min(MAX_PIXELS, ACCUMULATORS / nr);
      if (most < 1) break;
      int count = (width + most - 1) / most;
      double mr = double(width) / count;
      double cycles = std::max({mr * nr / 2, (mr + nr) / 2, 4.0}) * count * ((panel_count + nr - 1) / nr);
      if (cycles < best * 0.999) best = cycles, panels = nr, blocks = count;
    }
  }
};

class ChannelLanes {
 public:
  ChannelLanes(const Geometry& geometry, const tdpass_image& image, Output& out, int step)
      : g(geometry), x(image, geometry.chain->dtype), output(out), first(reads_in_place(geometry, image) ? 1 : 0) {
    size_t total = 0;
    for (int s = first; s <= g.stages; s++) {
      pixel_[s] = pixel_stride(g, s);
      row_[s] = pixel_[s] * (s < g.stages ? g.padded_width(s) : g.w[s]);
      offset_[s] = total;
      total += row_[s] * (s < g.stages ? g.capacity(s, step) : step);
    }
    float* memory = thread_scratch(total);
    std::memset(memory, 0, offset_[g.stages] * sizeof(float));
    for (int s = first; s <= g.stages; s++) buffer_[s] = memory + offset_[s];
  }

  // Floats a step of that many rows needs; what `step` is chosen by.
  static size_t footprint(const Geometry& g, int step) {
    size_t total = 0;
    for (int s = 0; s <= g.stages; s++) {
      size_t rows = s < g.stages ? g.capacity(s, step) : step;
      total += rows * pixel_stride(g, s) * (s < g.stages ? g.padded_width(s) : g.w[s]);
    }
    return total;
  }

  void shift(int s, int from, int count) { std::memmove(buffer_[s], buffer_[s] + from * row_[s], sizeof(float) * count * row_[s]); }
  void clear(int s, int row) { std::memset(buffer_[s] + row * row_[s], 0, sizeof(float) * row_[s]); }

  void fetch(int n, int image_row, int row) {
    float* to = buffer_[0] + row * row_[0] + g.stage(0).before[1] * pixel_[0];
    x.gather(n, image_row, to, pixel_[0], 1, g.w[0], g.channels(0));
  }

  void compute(int s, int n, Range out, int in_row, int out_row) {
    const tdpass_stage& t = g.stage(s);
    bool last = s + 1 == g.stages;
    Index in_pixel, in_channel, in_stride;
    const float* in;
    if (s < first) {
      in_pixel = x.stride(3), in_channel = x.stride(1), in_stride = x.stride(2);
      in = x.floats() + n * x.stride(0);
    } else {
      in_pixel = pixel_[s], in_channel = 1, in_stride = row_[s];
      in = buffer_[s];
    }
    in += in_row * in_stride;
    float* to = buffer_[s + 1] + out_row * row_[s + 1] + (last ? 0 : g.stage(s + 1).before[1] * pixel_[s + 1]);
    Index taps[MAX_TAPS];
    int count = 0;
    for (int y = 0; y < t.kernel[0]; y++)
      for (int z = 0; z < t.kernel[1]; z++) taps[count++] = y * t.dilation[0] * in_stride + z * t.dilation[1] * in_pixel;
    const float* weights = g.chain->weights[s];
    if (depthwise(t)) {
      for (int r = 0; r < out.size(); r++)
        depthwise_row(in + r * t.stride[0] * in_stride, in_pixel * t.stride[1], taps, count, weights, to + r * row_[s + 1], pixel_[s + 1], t.out, g.w[s + 1]);
      return;
    }
    bool direct = last && output.channels_together();
    int depth = t.in / t.groups, width = t.out / t.groups, panels = round_up(width, LANES) / LANES;
    Index panel = Index(count) * depth * LANES;
    Blocking blocking(g.w[s + 1], panels);
    for (int group = 0; group < t.groups; group++) {
      const float* from = in + group * depth * in_channel;
      for (int p = 0; p < panels; p += blocking.panels) {
        int nr = std::min(blocking.panels, panels - p);
        const float* w = weights + (Index(group) * panels + p) * panel;
        for (int r = 0; r < out.size(); r++) {
          float* row = to + r * row_[s + 1] + group * width + p * LANES;
          const float* source = from + r * t.stride[0] * in_stride;
          for (int b = 0, done = 0; b < blocking.blocks; b++) {
            int mr = (g.w[s + 1] - done) / (blocking.blocks - b);
            TileInput input{source + done * t.stride[1] * in_pixel, in_pixel * t.stride[1], in_channel, taps, count, depth};
            if (direct) {
              alignas(64) float result[ACCUMULATORS * LANES];
              TILES[mr][nr - 1](input, w, panel, result, nr * LANES);
              output.store_tile(n, out.low + r, done, group * width + p * LANES, result, nr * LANES, mr, std::min(nr * LANES, width - p * LANES));
            } else {
              TILES[mr][nr - 1](input, w, panel, row + done * pixel_[s + 1], pixel_[s + 1]);
            }
            done += mr;
          }
        }
      }
    }
  }

  void finish(int n, Range out) {
    int s = g.stages;
    if (output.channels_together() && !depthwise(g.stage(s - 1))) return;
    for (int r = 0; r < out.size(); r++) output.store_pixels(n, out.low + r, buffer_[s] + r * row_[s], pixel_[s], g.w[s], g.channels(s));
  }

  static constexpr int MAX_TAPS = 128;

 private:
  // Channels of a pixel in buffer s: the last panel of the last group may reach past the last channel.
  static int pixel_stride(const Geometry& g, int s) {
    int groups = s > 0 ? g.stage(s - 1).groups : 1, channels = g.channels(s);
    if (s > 0 && depthwise(g.stage(s - 1))) groups = 1;
    return round_up((groups - 1) * (channels / groups) + round_up(channels / groups, LANES), LANES);
  }
  static bool depthwise(const tdpass_stage& t) { return t.groups == t.in && t.in == t.out && t.groups > 1; }
  // A depthwise stage loads whole vectors of channels, which x may not have.
  static bool reads_in_place(const Geometry& g, const tdpass_image&) { return !g.padded(0) && g.chain->dtype == TDPASS_FLOAT32 && !depthwise(g.stage(0)); }

  // Every channel by itself: out[i][c] = sum over taps t of base[i pixel + taps[t] + c] * w[t][c].
  void depthwise_row(const float* base, Index pixel, const Index* taps, int count, const float* w, float* out, Index out_pixel, int channels, int width) {
    for (int c = 0; c < channels; c += LANES, w += count * LANES) {
      int i = 0;
      for (; i + 4 <= width; i += 4) depthwise_tile<4>(base + i * pixel + c, pixel, taps, count, w, out + i * out_pixel + c, out_pixel);
      for (; i < width; i++) depthwise_tile<1>(base + i * pixel + c, pixel, taps, count, w, out + i * out_pixel + c, out_pixel);
    }
  }
  template <int MR> static TDPASS_INLINE void depthwise_tile(const float* base, Index pixel, const Index* taps, int count, const float* w, float* out, Index out_pixel) {
    Lanes sum[MR];
    TDPASS_UNROLL for (int i = 0; i < MR; i++) sum[i] = zero();
    for (int t = 0; t < count; t++) {
      Lanes b = load(w + t * LANES);
      TDPASS_UNROLL for (int i = 0; i < MR; i++) sum[i] += b * load(base + taps[t] + i * pixel);
    }
    TDPASS_UNROLL for (int i = 0; i < MR; i++) store(out + i * out_pixel, sum[i]);
  }

  const Geometry& g;
  Input x;
  Output& output;
  Index pixel_[MAX_STAGES + 1], row_[MAX_STAGES + 1];
  size_t offset_[MAX_STAGES + 1];
  float* buffer_[MAX_STAGES + 1];

 public:
  const int first;
};

}  // namespace tdpass
