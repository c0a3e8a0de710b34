// A chain of convolutions in whole numbers with output channels in vector lanes; buffers are bytes,
// `[row][pixel][channel]`.
//
// A sum becomes the code that the next stage reads while it is in a register.  Only where a position chooses
// its own grid are its numbers written first, a row at a time.
#pragma once
#include <vector>

#include "output.h"
#include "quads.h"
#include "rolling.h"

namespace tdpass {

inline bool by_channel(const tdpass_stage& t) { return t.groups == t.in && t.in == t.out && t.groups > 1; }

// Sizes, grids and what turns the sums of each stage into numbers or codes.
struct Int8Geometry : Geometry {
  const tdpass_int8_chain* whole;
  Grid grids[MAX_STAGES + 2];
  std::vector<int32_t> offsets[MAX_STAGES];  // what sums lack for the zero point of what they read
  std::vector<float> steps[MAX_STAGES], bias;

  Int8Geometry(const tdpass_int8_chain& given, const tdpass_image& x)
      : Geometry(trace_sizes(&given.chain, int(x.size[2]), int(x.size[3]))), whole(&given) {
    for (int s = 0; s < stages + 2; s++) grids[s] = Grid(given.grids[s]);
    bias.resize(stage(stages - 1).out + LANES);
    if (chain->bias) std::copy(chain->bias, chain->bias + stage(stages - 1).out, bias.begin());
    for (int s = 0; s < stages; s++) {
      const int out = stage(s).out;
      const int32_t zero = grids[s] ? grids[s].zero : MIDDLE_CODE;
      const float scale = !grids[s] ? 1.0f
          : to_codes(s)             ? grids[s].scale * grids[s + 1].inverse
                                    : grids[s].scale;
      offsets[s].resize(out + LANES), steps[s].resize(out + LANES);
      for (int o = 0; o < out; o++) {
        offsets[s][o] = int32_t(0u - uint32_t(zero) * uint32_t(given.totals[s][o]));
        steps[s][o] = grids[s] ? scale * given.scales[s][o] : given.scales[s][o];
      }
    }
  }

  // Whether sums of a stage are codes of the next one at once.
  bool to_codes(int s) const { return s + 1 < stages && grids[s] && grids[s + 1]; }
};

class QuadLanes {
 public:
  QuadLanes(const Int8Geometry& geometry, const tdpass_image& image, OutputTo<true>& out, int step)
      : g(geometry),
        dtype_(geometry.chain->dtype),
        x_(image),
        floats_(image, dtype_),
        output(out),
        first(reads_in_place(geometry, image) ? 1 : 0) {
    size_t total = 0, offset[MAX_STAGES + 1], own[MAX_STAGES];
    for (int s = first; s <= g.stages; s++) {
      pixel_[s] = pixel_stride(g, s);
      row_[s] = pixel_[s] * (s < g.stages ? g.padded_width(s) : g.w[s]);
      offset[s] = total;
      total += bytes(g, s, step);
      if (s < g.stages) own[s] = total, total += own_bytes(g, s, step);
    }
    char* memory = reinterpret_cast<char*>(thread_scratch((total + wide_bytes(g)) / sizeof(float)));
    for (int s = first; s < g.stages; s++) {
      buffer_[s] = reinterpret_cast<uint8_t*>(memory + offset[s]);
      own_[s] = reinterpret_cast<float*>(memory + own[s]);
      std::memset(buffer_[s], zero_of(s), bytes(g, s, step));
    }
    result_ = reinterpret_cast<float*>(memory + offset[g.stages]);
    wide_ = reinterpret_cast<float*>(memory + total);
  }

  // Bytes a step of that many rows needs; what `step` is chosen by.
  static size_t footprint(const Geometry& g, int step) {
    size_t total = 0;
    for (int s = 0; s <= g.stages; s++) total += bytes(g, s, step);
    return total;
  }

  void shift(int s, int from, int count) {
    std::memmove(buffer_[s], buffer_[s] + from * row_[s], count * row_[s]);
    if (!g.grids[s]) std::memmove(own_[s], own_[s] + from * g.w[s], sizeof(float) * count * g.w[s]);
  }
  void clear(int s, int row) { std::memset(buffer_[s] + row * row_[s], zero_of(s), row_[s]); }

  void fetch(int n, int image_row, int row) {
    uint8_t* to = buffer_[0] + row * row_[0] + g.stage(0).before[1] * pixel_[0];
    const Index at = n * x_.stride[0] + image_row * x_.stride[2];
    if (dtype_ == TDPASS_UINT8) copy(static_cast<const uint8_t*>(x_.data) + at, to);
    else if (!g.grids[0]) put_on_own(n, image_row, to, own_[0] + row * g.w[0]);
    else if (dtype_ == TDPASS_BFLOAT16) put_on_grid(static_cast<const Half*>(x_.data) + at, to);
    else put_on_grid(static_cast<const float*>(x_.data) + at, to);
  }

  void compute(int s, int n, Range out, int in_row, int out_row) {
    const int next = s + 1;
    if (next == g.stages) {
      finish_sums(s, n, out, in_row, result_ + out_row * row_[next]);
      return;
    }
    uint8_t* to = buffer_[next] + out_row * row_[next] + g.stage(next).before[1] * pixel_[next];
    if (g.to_codes(s)) {
      each_block(s, n, out.size(), in_row, [&](const Place& at, const auto& multiply_into) {
        multiply_into(ToCodes{to + at.row * row_[next] + at.pixel * pixel_[next] + at.channel, pixel_[next],
            &g.offsets[s][at.channel], &g.steps[s][at.channel], g.grids[next].zero});
      });
      return;
    }
    for (int r = 0; r < out.size(); r++, to += row_[next]) {
      each_block(s, n, 1, in_row + r * g.stage(s).stride[0], [&](const Place& at, const auto& multiply_into) {
        multiply_into(numbers(s, at, in_row + r * g.stage(s).stride[0],
            wide_ + at.pixel * pixel_[next] + at.channel, pixel_[next]));
      });
      put_row(next, wide_, to, own_[next] + (out_row + r) * g.w[next]);
    }
  }

  void finish(int n, Range out) {
    const int s = g.stages;
    if (output.channels_together()) return;
    for (int r = 0; r < out.size(); r++)
      output.store_pixels(n, out.low + r, result_ + r * row_[s], pixel_[s], g.w[s], g.channels(s));
  }

 private:
  // Of a block of sums: a row below the first, a pixel, a channel; how many pixels, and channels that are
  // there.
  struct Place {
    int row, pixel, channel, pixels, channels, panels;
  };

  // Few channels of x lie together without gaps, so that the taps of a kernel's row do.
  static int pixel_stride(const Geometry& g, int s) {
    if (s == 0 && g.stage(0).groups == 1 && g.channels(0) <= 2 * Quads::TOGETHER)
      return round_up(g.channels(0), Quads::TOGETHER);
    const int groups = s > 0 && !by_channel(g.stage(s - 1)) ? g.stage(s - 1).groups : 1,
              channels = g.channels(s);
    return round_up((groups - 1) * (channels / groups) + round_up(channels / groups, LANES), LANES);
  }
  static size_t line(size_t bytes) { return (bytes + 63) / 64 * 64; }
  static size_t bytes(const Geometry& g, int s, int step) {
    if (s == g.stages) return sizeof(float) * step * pixel_stride(g, s) * g.w[s];
    return line(size_t(g.capacity(s, step)) * pixel_stride(g, s) * g.padded_width(s));
  }
  static size_t own_bytes(const Int8Geometry& g, int s, int step) {
    return g.grids[s] ? 0 : line(sizeof(float) * g.capacity(s, step) * g.w[s]);
  }
  // Of a row of numbers before they are put on grids.
  static size_t wide_bytes(const Geometry& g) {
    size_t most = 0;
    for (int s = 0; s < g.stages; s++) most = std::max(most, sizeof(float) * pixel_stride(g, s) * g.w[s]);
    return line(most);
  }
  static bool reads_in_place(const Int8Geometry& g, const tdpass_image& x) {
    const tdpass_stage& t = g.stage(0);
    return g.chain->dtype == TDPASS_UINT8 && x.stride[1] == 1 && !g.padded(0) && !by_channel(t) &&
        (t.in / t.groups) % Quads::TOGETHER == 0;
  }
  int zero_of(int s) const { return g.grids[s] ? g.grids[s].zero : MIDDLE_CODE; }

  // Bytes as they are.
  void copy(const uint8_t* from, uint8_t* to) const {
    const int width = g.w[0], channels = g.channels(0);
    for (int i = 0; i < width; i++) {
      if (x_.stride[1] == 1) std::memcpy(to + i * pixel_[0], from + i * x_.stride[3], channels);
      else
        for (int c = 0; c < channels; c++) to[i * pixel_[0] + c] = from[i * x_.stride[3] + c * x_.stride[1]];
    }
  }

  // A row of x on the grid of the first stage.
  template <class T> void put_on_grid(const T* from, uint8_t* to) const {
    const int width = g.w[0], channels = g.channels(0);
    const Grid grid = g.grids[0];
    if (pixel_[0] == Quads::TOGETHER && x_.stride[3] == 1) {
      for (int i = 0; i < width; i += LANES) {
        const int pixels = std::min(LANES, width - i);
        Words all{};
        for (int c = 0; c < channels; c++)
          all |= grid.codes(read_some(from + c * x_.stride[1] + i, pixels)) << (8 * c);
        std::memcpy(to + i * pixel_[0], &all, size_t(pixels) * Quads::TOGETHER);
      }
    } else if (pixel_[0] == Quads::TOGETHER && x_.stride[1] == 1 && x_.stride[3] == channels) {
      uint8_t* row = reinterpret_cast<uint8_t*>(
          wide_);  // without gaps; what lies behind the last channel of a pixel has no weight
      for (int k = 0; k < width * channels; k += LANES)
        store_codes(row + k, grid.codes(read_some(from + k, std::min(LANES, width * channels - k))));
      for (int i = 0; i < width; i++) std::memcpy(to + i * pixel_[0], row + i * channels, Quads::TOGETHER);
    } else if (x_.stride[1] == 1) {
      for (int i = 0; i < width; i++)
        for (int c = 0; c < channels; c += LANES) {
          const int some = std::min(LANES, channels - c);
          store_codes(to + i * pixel_[0] + c, grid.codes(read_some(from + i * x_.stride[3] + c, some)), some);
        }
    } else if (x_.stride[3] == 1) {
      for (int c = 0; c < channels; c += LANES)
        for (int i = 0; i < width; i += LANES) {
          Lanes block[LANES] = {};
          const int some = std::min(LANES, channels - c), pixels = std::min(LANES, width - i);
          for (int k = 0; k < some; k++) block[k] = read_some(from + (c + k) * x_.stride[1] + i, pixels);
          transpose(block);
          for (int k = 0; k < pixels; k++)
            store_codes(to + (i + k) * pixel_[0] + c, grid.codes(block[k]), some);
        }
    } else {
      for (int i = 0; i < width; i++)
        for (int c = 0; c < channels; c++)
          to[i * pixel_[0] + c] =
              uint8_t(grid.codes(broadcast(widen(from[i * x_.stride[3] + c * x_.stride[1]])))[0]);
    }
  }

  // A row of x, every position on a grid of its own.
  void put_on_own(int n, int image_row, uint8_t* to, float* own) {
    floats_.gather(n, image_row, wide_, pixel_[0], g.w[0], g.channels(0));
    put_row(0, wide_, to, own);
  }

  // A row of numbers on the grid of a stage, or on grids of their own.
  void put_row(int s, const float* from, uint8_t* to, float* own) const {
    const int channels = g.channels(s);
    for (int i = 0; i < g.w[s]; i++, from += pixel_[s], to += pixel_[s]) {
      if (!g.grids[s]) own[i] = own_grid(from, channels, to);
      else
        for (int c = 0; c < channels; c += LANES) store_codes(to + c, g.grids[s].codes(load(from + c)));
    }
  }

  ToNumbers numbers(int s, const Place& at, int in_row, float* to, Index pixel) const {
    const float* own = g.grids[s] ? nullptr : own_[s] + in_row * g.w[s] + at.pixel * g.stage(s).stride[1];
    return {to, pixel, &g.offsets[s][at.channel], &g.steps[s][at.channel], own, g.stage(s).stride[1]};
  }

  // Sums of the last stage, to y or as numbers to `result`.
  void finish_sums(int s, int n, Range out, int in_row, float* result) {
    const bool direct = output.channels_together(), simple = output.simple();
    each_block(s, n, out.size(), in_row, [&](const Place& at, const auto& multiply_into) {
      const int row = in_row + at.row * g.stage(s).stride[0], width = at.panels * LANES;
      if (simple) {
        if (output.grid()) to_output<uint8_t>(s, n, out.low + at.row, row, at, multiply_into);
        else to_output<float>(s, n, out.low + at.row, row, at, multiply_into);
      } else if (direct) {
        alignas(64) float some[MOST_RESULTS * LANES];
        multiply_into(numbers(s, at, row, some, width));
        output.store_tile(n, out.low + at.row, at.pixel, at.channel, some, width, at.pixels, at.channels);
      } else {
        multiply_into(numbers(s, at, row,
            result + at.row * row_[s + 1] + at.pixel * pixel_[s + 1] + at.channel, pixel_[s + 1]));
      }
    });
  }

  // A block of sums to row `out_row` of y, in registers.
  template <class T, class MultiplyInto>
  void to_output(int s, int n, int out_row, int in_row, const Place& at, const MultiplyInto& multiply_into) {
    T* y = output.template at<T>(n, out_row, at.pixel, at.channel);
    const ToNumbers sums = numbers(s, at, in_row, nullptr, 0);
    const float* bias = &g.bias[at.channel];
    const Added added = output.added_codes(n, out_row, at.pixel, at.channel);
    if (added.codes)
      multiply_into(ToOutput<T, true>{
          y, output.pixel(), sums, bias, output.bounds(), output.grid(), at.channels, added});
    else
      multiply_into(ToOutput<T, false>{
          y, output.pixel(), sums, bias, output.bounds(), output.grid(), at.channels, added});
  }

  // Calls `visit(place, multiply_into)` for every block of `rows` rows of a stage; `multiply_into(to)` gives
  // its sums to `to`.
  template <class Visit> void each_block(int s, int n, int rows, int in_row, const Visit& visit) {
    const tdpass_stage& t = g.stage(s);
    const bool in_place = s < first;
    const Index in_pixel = in_place ? x_.stride[3] : pixel_[s], in_stride = in_place ? x_.stride[2] : row_[s];
    const uint8_t* in = in_place ? static_cast<const uint8_t*>(x_.data) + n * x_.stride[0] : buffer_[s];
    in += in_row * in_stride;
    Index taps[MAX_TAPS];
    int count = 0;
    const int depth = t.in / t.groups, width = t.out / t.groups, panels = round_up(width, LANES) / LANES,
              quads = round_up(depth, Quads::TOGETHER);
    // the taps of a row are one where no other bytes lie between them
    const bool whole_rows = !by_channel(t) && t.groups == 1 && t.dilation[1] == 1 && in_pixel == quads;
    const int across = whole_rows ? 1 : t.kernel[1];
    for (int y = 0; y < t.kernel[0]; y++)
      for (int z = 0; z < across; z++)
        taps[count++] = y * t.dilation[0] * in_stride + z * t.dilation[1] * in_pixel;
    const Index pixel = in_pixel * t.stride[1];
    const int8_t* weights = static_cast<const int8_t*>(g.chain->weights[s]);
    if (by_channel(t))
      return each_channel(
          t, in, in_stride * t.stride[0], pixel, taps, count, weights, rows, g.w[s + 1], visit);
    const Index panel = Index(t.kernel[0]) * t.kernel[1] * quads * LANES;
    const int run = whole_rows ? t.kernel[1] * quads : depth;
    const bool by_tiles = Quads::by_tiles(true);
    const Blocking blocking(g.w[s + 1], panels, Quads::LATENCY, by_tiles);
    for (int group = 0; group < t.groups; group++)
      for (int p = 0; p < panels; p += blocking.panels) {
        const int nr = std::min(blocking.panels, panels - p);
        const int8_t* w = weights + (Index(group) * panels + p) * panel;
        for (int r = 0; r < rows; r++)
          for (int b = 0; b < blocking.blocks; b++) {
            const Place at{r, blocking.start(b), group * width + p * LANES, blocking.pixels(b),
                std::min(nr * LANES, width - p * LANES), nr};
            const TileInput<Quads> input{in + group * depth + r * t.stride[0] * in_stride + at.pixel * pixel,
                pixel, 1, taps, count, run};
            visit(at, [&](const auto& to) { multiply(by_tiles, input, w, panel, at.pixels, nr, to); });
          }
      }
  }

  // The same where every channel is convolved by itself, four pixels at a time.
  template <class Visit>
  void each_channel(const tdpass_stage& t, const uint8_t* in, Index in_row, Index pixel, const Index* taps,
      int count, const int8_t* w, int rows, int width, const Visit& visit) {
    constexpr int MR = 4;
    for (int c = 0; c < t.out; c += LANES, w += count * LANES)
      for (int r = 0; r < rows; r++)
        for (int i = 0; i < width; i += MR) {
          const Place at{r, i, c, std::min(MR, width - i), std::min(LANES, t.out - c), 1};
          const uint8_t* from = in + r * in_row + i * pixel + c;
          visit(at, [&](const auto& to) {
            Words sum[MR] = {};
            for (int k = 0; k < count; k++) {
              const Words weight = load_signed(w + k * LANES);
              for (int m = 0; m < at.pixels; m++) sum[m] += load_codes(from + taps[k] + m * pixel) * weight;
            }
            for (int m = 0; m < at.pixels; m++) to(m, 0, sum[m]);
          });
        }
  }

  const Int8Geometry& g;
  int dtype_;
  tdpass_image x_;
  Input floats_;
  OutputTo<true>& output;
  Index pixel_[MAX_STAGES + 1] = {}, row_[MAX_STAGES + 1] = {};
  uint8_t* buffer_[MAX_STAGES] = {};
  float* own_[MAX_STAGES] = {};
  float *result_, *wide_;

 public:
  const int first;
};

}  // namespace tdpass
