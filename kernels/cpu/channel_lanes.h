// A chain of convolutions with output channels in vector lanes; buffers are `[row][pixel][channel]`.
//
// x and y may be channels-last or not: x is read through its strides, y is transposed on the way out where it
// must be.  Where bfloat16 is multiplied in pairs of channels, what lies between two stages is rounded to it,
// as in a chain of torch's layers.
#pragma once
#include "output.h"
#include "rolling.h"
#include "tile.h"

namespace tdpass {

template <class Operand> class ChannelLanes {
  typedef typename Operand::Element Element;

 public:
  ChannelLanes(const Geometry& geometry, const tdpass_image& image, Output& out, int step)
      : g(geometry),
        x(image, geometry.chain->dtype),
        output(out),
        first(reads_in_place(geometry, image) ? 1 : 0) {
    size_t total = 0, offset[MAX_STAGES + 1];
    for (int s = first; s <= g.stages; s++) {
      pixel_[s] = pixel_stride(g, s);
      row_[s] = pixel_[s] * (s < g.stages ? g.padded_width(s) : g.w[s]);
      offset[s] = total;
      total += bytes(g, s, step);
    }
    char* memory = reinterpret_cast<char*>(thread_scratch(total / sizeof(float)));
    std::memset(memory, 0, offset[g.stages]);
    for (int s = first; s < g.stages; s++) buffer_[s] = reinterpret_cast<Element*>(memory + offset[s]);
    result_ = reinterpret_cast<float*>(memory + offset[g.stages]);
  }

  // Bytes a step of that many rows needs; what `step` is chosen by.
  static size_t footprint(const Geometry& g, int step) {
    size_t total = 0;
    for (int s = 0; s <= g.stages; s++) total += bytes(g, s, step);
    return total;
  }

  void shift(int s, int from, int count) {
    std::memmove(buffer_[s], buffer_[s] + from * row_[s], sizeof(Element) * count * row_[s]);
  }
  void clear(int s, int row) { std::memset(buffer_[s] + row * row_[s], 0, sizeof(Element) * row_[s]); }

  void fetch(int n, int image_row, int row) {
    x.gather(n, image_row, buffer_[0] + row * row_[0] + g.stage(0).before[1] * pixel_[0], pixel_[0], g.w[0],
        g.channels(0));
  }

  void compute(int s, int n, Range out, int in_row, int out_row) {
    Index row = out_row * row_[s + 1];
    if (s + 1 == g.stages) run(s, n, out, in_row, result_ + row);
    else run(s, n, out, in_row, buffer_[s + 1] + row + g.stage(s + 1).before[1] * pixel_[s + 1]);
  }

  void finish(int n, Range out) {
    int s = g.stages;
    if (output.channels_together() && !depthwise(g.stage(s - 1))) return;
    for (int r = 0; r < out.size(); r++)
      output.store_pixels(n, out.low + r, result_ + r * row_[s], pixel_[s], g.w[s], g.channels(s));
  }

 private:
  // Channels of a pixel in buffer s: the last panel of the last group may reach past the last channel.
  static int pixel_stride(const Geometry& g, int s) {
    int groups = s > 0 ? g.stage(s - 1).groups : 1, channels = g.channels(s);
    if (s > 0 && depthwise(g.stage(s - 1))) groups = 1;
    return round_up((groups - 1) * (channels / groups) + round_up(channels / groups, LANES), LANES);
  }
  // Of buffer s; the result is float32, to be rounded when all is added.
  static size_t bytes(const Geometry& g, int s, int step) {
    if (s == g.stages) return sizeof(float) * step * pixel_stride(g, s) * g.w[s];
    return sizeof(Element) * g.capacity(s, step) * pixel_stride(g, s) * g.padded_width(s);
  }
  static bool depthwise(const tdpass_stage& t) { return t.groups == t.in && t.in == t.out && t.groups > 1; }
  // A depthwise stage loads whole vectors of channels, which x may not have.
  static bool reads_in_place(const Geometry& g, const tdpass_image& x) {
    return !g.padded(0) && !depthwise(g.stage(0)) && Operand::reads_in_place(x, g.chain->dtype);
  }

  // Rows `out` of stage s, the first one to `to`.
  template <class To> void run(int s, int n, Range out, int in_row, To* to) {
    const tdpass_stage& t = g.stage(s);
    Index in_pixel = pixel_[s], in_channel = 1, in_stride = row_[s];
    const Element* in = buffer_[s];
    if (s < first) {
      in_pixel = x.stride(3), in_channel = x.stride(1), in_stride = x.stride(2);
      in = x.template elements<Element>() + n * x.stride(0);
    }
    in += in_row * in_stride;
    Index taps[MAX_TAPS];
    int count = 0;
    for (int y = 0; y < t.kernel[0]; y++)
      for (int z = 0; z < t.kernel[1]; z++)
        taps[count++] = y * t.dilation[0] * in_stride + z * t.dilation[1] * in_pixel;
    if (depthwise(t)) {
      const float* weights = static_cast<const float*>(g.chain->weights[s]);
      for (int r = 0; r < out.size(); r++)
        depthwise_row(in + r * t.stride[0] * in_stride, in_pixel * t.stride[1], taps, count, weights,
            to + r * row_[s + 1], pixel_[s + 1], t.out, g.w[s + 1]);
      return;
    }
    const Element* weights = static_cast<const Element*>(g.chain->weights[s]);
    bool direct = s + 1 == g.stages && output.channels_together();
    int depth = t.in / t.groups, width = t.out / t.groups, panels = round_up(width, LANES) / LANES;
    Index panel = Index(count) * round_up(depth, Operand::TOGETHER) * LANES;
    const bool by_tiles = Operand::by_tiles(depth % Operand::TOGETHER == 0 || (s >= first && t.groups == 1));
    Blocking blocking(g.w[s + 1], panels, Operand::LATENCY, by_tiles);
    for (int group = 0; group < t.groups; group++) {
      const Element* from = in + group * depth * in_channel;
      for (int p = 0; p < panels; p += blocking.panels) {
        int nr = std::min(blocking.panels, panels - p), channel = group * width + p * LANES,
            channels = std::min(nr * LANES, width - p * LANES);
        const Element* w = weights + (Index(group) * panels + p) * panel;
        for (int r = 0; r < out.size(); r++) {
          const Element* source = from + r * t.stride[0] * in_stride;
          for (int b = 0; b < blocking.blocks; b++) {
            const int at = blocking.start(b), mr = blocking.pixels(b);
            if (s < first && p == 0 && in_channel == 1)
              prefetch(source + t.stride[0] * in_stride + at * t.stride[1] * in_pixel, in_pixel * t.stride[1],
                  mr, depth);
            TileInput<Operand> input{
                source + at * t.stride[1] * in_pixel, in_pixel * t.stride[1], in_channel, taps, count, depth};
            if (direct) {
              alignas(64) float result[MOST_RESULTS * LANES];
              multiply(by_tiles, input, w, panel, mr, nr, Store<float>{result, nr * LANES});
              output.store_tile(n, out.low + r, at, channel, result, nr * LANES, mr, channels);
            } else {
              multiply(by_tiles, input, w, panel, mr, nr,
                  Store<To>{to + r * row_[s + 1] + at * pixel_[s + 1] + channel, pixel_[s + 1]});
            }
          }
        }
      }
    }
  }

  // What the next row reads of x first: a tile begins with as many cache misses as it has pixels.
  static TDPASS_INLINE void prefetch(const Element* from, Index pixel, int pixels, Index channels) {
    constexpr Index LINE = 64 / sizeof(Element), FIRST = 4 * LINE;
    for (int i = 0; i < pixels; i++)
      for (Index c = 0; c < std::min(channels, FIRST); c += LINE) __builtin_prefetch(from + i * pixel + c);
  }

  // Every channel by itself: out[i][c] = sum over taps t of base[i pixel + taps[t] + c] * w[t][c], in
  // float32.
  template <class To>
  void depthwise_row(const Element* base, Index pixel, const Index* taps, int count, const float* w, To* out,
      Index out_pixel, int channels, int width) {
    for (int c = 0; c < channels; c += LANES, w += count * LANES) {
      int i = 0;
      for (; i + 4 <= width; i += 4)
        depthwise_tile<4>(base + i * pixel + c, pixel, taps, count, w, out + i * out_pixel + c, out_pixel);
      for (; i < width; i++)
        depthwise_tile<1>(base + i * pixel + c, pixel, taps, count, w, out + i * out_pixel + c, out_pixel);
    }
  }
  template <int MR, class To>
  static TDPASS_INLINE void depthwise_tile(const Element* base, Index pixel, const Index* taps, int count,
      const float* w, To* out, Index out_pixel) {
    Lanes sum[MR];
    TDPASS_UNROLL for (int i = 0; i < MR; i++) sum[i] = zero();
    for (int t = 0; t < count; t++) {
      Lanes b = load(w + t * LANES);
      TDPASS_UNROLL for (int i = 0; i < MR; i++) sum[i] += b * read_some(base + taps[t] + i * pixel, LANES);
    }
    TDPASS_UNROLL for (int i = 0; i < MR; i++) write_some(out + i * out_pixel, sum[i], LANES);
  }

  const Geometry& g;
  Input x;
  Output& output;
  Index pixel_[MAX_STAGES + 1] = {}, row_[MAX_STAGES + 1] = {};
  Element* buffer_[MAX_STAGES] = {};
  float* result_;

 public:
  const int first;
};

}  // namespace tdpass
