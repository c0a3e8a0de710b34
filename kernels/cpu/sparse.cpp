// A convolution or linear layer with a sparse weight, compiled once per instruction set.
//
// Pixels (tokens) lie in vector lanes, so a weight is a scalar and any pattern of zeros can be left out: a
// block is the weights of a few outputs for one (input channel, tap), and reads one vector of inputs per 16
// pixels.  The input is copied in bands, padded, a stride split into phases: then every tap of every stride
// is a plain vector load at a fixed offset.  Single weights read as much as they multiply: they come in
// segments of few inputs, which then serve many outputs out of the first-level cache.
//
// A thin product beside it is two walks of full panels over the same band: V leaves its result in the cache,
// and the sums of the sparse weight begin as what U makes of that.
#include "isa.h"

#include "limits.h"
#include "token_lanes.h"
#include "scratch.h"
#include "walks.h"

#include <vector>

namespace tdpass {
namespace {

constexpr Index BAND_FLOATS = 112 * 1024;  // what a band of inputs may take of the second-level cache
constexpr int GROUP = LANES;               // outputs that are finished together
constexpr Index SUM_FLOATS = 40 * 1024;    // what sums of several segments may take
constexpr int MAX_ROWS = 128;
constexpr Index MOST_FLOATS = Index(1) << 30;  // of the copy of a band: offsets into it have 32 bits

// Where things lie in the copy of a band: `[channel][phase][row][pixel]`.
struct Layout {
  const tdpass_stage& t;
  int rows, columns;                 // outputs of a whole band
  int high, wide;                    // rows and pixels of a phase
  int phases = 0, slot[MAX_PHASES];  // place of phase (row % stride) * stride_w + column % stride_w, -1 where
                                     // no tap reads it
  Index plane;
  Index pitch;  // of sums: whole vectors, an odd number, so that rows do not meet in one set of the cache
  std::vector<int32_t> offset;  // by channel * taps + tap

  Layout(const tdpass_sparse& weight, int band_rows, int band_columns)
      : t(weight.shape), rows(band_rows), columns(band_columns) {
    high = rows + (t.kernel[0] - 1) * t.dilation[0] / t.stride[0];
    wide = columns + (t.kernel[1] - 1) * t.dilation[1] / t.stride[1];
    for (int& s : slot) s = -1;
    const int taps = t.kernel[0] * t.kernel[1];
    for (int k = 0; k < taps; k++) {
      int& s = slot[phase(k)];
      if (s < 0) s = phases++;
    }
    plane = Index(high) * wide * phases;
    pitch = ((Index(rows) * wide / LANES + 1) | 1) * LANES;
    if (floats() > MOST_FLOATS) return;
    offset.resize(size_t(t.in) * taps);
    for (int c = 0; c < t.in; c++)
      for (int k = 0; k < taps; k++) {
        int y = k / t.kernel[1] * t.dilation[0] / t.stride[0],
            x = k % t.kernel[1] * t.dilation[1] / t.stride[1];
        offset[c * taps + k] = int32_t(c * plane + (Index(slot[phase(k)]) * high + y) * wide + x);
      }
  }
  int phase(int tap) const {
    int y = tap / t.kernel[1] * t.dilation[0] % t.stride[0],
        x = tap % t.kernel[1] * t.dilation[1] % t.stride[1];
    return y * t.stride[1] + x;
  }
  // Floats of the copy, with what a vector reads past its end.
  Index floats() const { return plane * t.in + MAX_VECTORS * LANES; }
};

// The thin product beside a sparse weight: where the blocks of its full panels begin, and what they read.
struct Thin {
  static constexpr int WIDTH = 8;
  int v_panels = 0;
  std::vector<int32_t> every, v_start, u_start, u_offset;

  Thin(const tdpass_sparse& weight, const Layout& layout) {
    if (!weight.rank) return;
    const int inputs = int(layout.offset.size());
    v_panels = (weight.rank + WIDTH - 1) / WIDTH;
    every = multiples(std::max(inputs, weight.rank), 1);
    v_start = multiples(v_panels + 1, inputs);
    u_start = multiples((weight.panels * weight.width + WIDTH - 1) / WIDTH + 1, weight.rank);
    u_offset = multiples(weight.rank, layout.pitch);
  }
  // Floats of what lies between V and U.
  static Index floats(const tdpass_sparse& weight, const Layout& layout) {
    return Index(round_up(weight.rank, WIDTH)) * layout.pitch;
  }

 private:
  static std::vector<int32_t> multiples(int count, Index step) {
    std::vector<int32_t> made(static_cast<size_t>(count));
    for (int k = 0; k < count; k++) made[size_t(k)] = int32_t(k * step);
    return made;
  }
};

// Rows and columns of outputs that are made at once.
struct Band {
  int row, rows, column, columns;
};

template <class T> class Engine {
 public:
  Engine(const tdpass_sparse& weight, const Kernel& kernel, const Layout& layout, const Thin& thin,
      const tdpass_image& x, const tdpass_image& y)
      : s_(weight),
        kernel_(kernel),
        at_(layout),
        thin_(thin),
        x_(x),
        y_(y),
        last_(y.stride[1] == 1 && (!weight.residual || weight.residual->stride[1] == 1)),
        pitch_(layout.pitch) {
    if (weight.segments > 1)
      rows_ = std::max<int>(GROUP, int(std::min<Index>(MAX_ROWS, SUM_FLOATS / pitch_)) / GROUP * GROUP);
    in_ = thread_scratch(at_.floats() + rows_ * pitch_ + Thin::floats(weight, layout));
    sums_ = in_ + at_.floats();
    between_ = sums_ + rows_ * pitch_;
    std::memset(in_, 0, at_.floats() * sizeof(float));
  }

  void run(int n, const Band& band) {
    fetch(n, band);
    const int positions = (band.rows - 1) * at_.wide + band.columns,
              vectors = (positions + LANES - 1) / LANES, panels = rows_ / s_.width;
    if (s_.rank)
      sweep(full_, vectors,
          {s_.v, thin_.every.data(), thin_.v_start.data(), thin_.v_panels, at_.offset.data(), in_, between_,
              pitch_, false, true});
    for (int first = 0; first < s_.panels; first += panels) {
      const int some = std::min(panels, s_.panels - first), rows = some * s_.width;
      if (s_.rank)
        sweep(full_, vectors,
            {s_.u, thin_.every.data(), thin_.u_start.data() + first * s_.width / Thin::WIDTH,
                (rows + Thin::WIDTH - 1) / Thin::WIDTH, thin_.u_offset.data(), between_, sums_, pitch_, false,
                true});
      sweep(kernel_, vectors,
          {s_.values, s_.index, s_.start + first, some, at_.offset.data(), in_, sums_, pitch_, s_.rank > 0},
          s_.segments);
      for (int row = 0; row < rows; row += GROUP)
        finish(n, band, s_.rows + first * s_.width + row, std::min(GROUP, rows - row), sums_ + row * pitch_);
    }
  }

 private:
  // Walks every segment over all vectors, as many at a time as the registers hold.
  void sweep(const Kernel& kernel, int vectors, Walk w, int segments = 1) const {
    const int tiles = (vectors + kernel.most - 1) / kernel.most;
    const int32_t* const start = w.start;
    const bool add = w.add;
    for (int tile = 0, done = 0; tile < tiles; tile++) {
      const int nv = (vectors - done) / (tiles - tile);
      for (int segment = 0; segment < segments; segment++) {
        w.start = start + Index(segment) * s_.panels, w.add = add || segment > 0;
        kernel.by_vectors[nv - 1](w);
      }
      done += nv, w.in += nv * LANES, w.out += nv * LANES;
    }
  }

  // Copies what the band reads.  Columns of padding are the same in every band, and zero from the start,
  // unless rows are cut.
  void fetch(int n, const Band& band) {
    const tdpass_stage& t = s_.shape;
    if (at_.columns < y_.size[3] && (t.before[1] || t.after[1]))
      std::memset(in_, 0, at_.floats() * sizeof(float));
    for (int phase = 0; phase < t.stride[0] * t.stride[1]; phase++) {
      if (at_.slot[phase] < 0) continue;
      int left = band.column * t.stride[1] + phase % t.stride[1] - t.before[1];
      int low = left < 0 ? (-left + t.stride[1] - 1) / t.stride[1] : 0;
      int high = std::min<long>(at_.wide, (x_.size[3] - 1 - left + t.stride[1]) / t.stride[1]);
      if (x_.size[3] - 1 < left) high = 0;
      for (int j = 0; j < at_.high; j++) {
        Index y = Index(band.row + j) * t.stride[0] + phase / t.stride[1] - t.before[0];
        float* to = in_ + (Index(at_.slot[phase]) * at_.high + j) * at_.wide;
        if (y < 0 || y >= x_.size[2]) {
          for (int c = 0; c < t.in; c++) std::memset(to + c * at_.plane, 0, at_.wide * sizeof(float));
        } else if (low < high) {
          copy(place<const T>(x_, n, 0, y, left + low * t.stride[1]), to + low, high - low);
        }
      }
    }
  }

  void copy(const T* from, float* to, int count) {
    const Index pixel = x_.stride[3] * s_.shape.stride[1], channel = x_.stride[1];
    if (channel == 1) {
      for (int i = 0; i < count; i += LANES)
        turn_in(from + i * pixel, pixel, std::min(LANES, count - i), s_.shape.in, to + i, at_.plane, false);
      return;
    }
    for (int c = 0; c < s_.shape.in; c++) {
      const T* row = from + c * channel;
      float* target = to + c * at_.plane;
      if (pixel == 1)
        for (int i = 0; i < count; i += LANES)
          store_some(target + i, read_some(row + i, std::min(LANES, count - i)), std::min(LANES, count - i));
      else
        for (int i = 0; i < count; i++) target[i] = widen(row[i * pixel]);
    }
  }

  void finish(int n, const Band& band, const int32_t* channels, int count, const float* sums) {
    while (count > 0 && channels[count - 1] < 0) count--;
    bool together = last_ && count > 0 && channels[0] >= 0;
    for (int c = 1; c < count; c++) together &= channels[c] == channels[c - 1] + 1;
    for (int r = 0; r < band.rows; r++) {
      const float* from = sums + r * at_.wide;
      if (together) {
        Epilogue end{s_.bias ? s_.bias + channels[0] : nullptr, s_.activation};
        for (int i = 0; i < band.columns; i += LANES)
          turn_out(from + i, pitch_, std::min(LANES, band.columns - i), count, end,
              place<T>(y_, n, channels[0], band.row + r, band.column + i), y_.stride[3],
              s_.residual ? place<const T>(*s_.residual, n, channels[0], band.row + r, band.column + i)
                          : nullptr,
              s_.residual ? s_.residual->stride[3] : 0);
      } else {
        for (int c = 0; c < count; c++)
          for (int i = 0; i < band.columns && channels[c] >= 0; i += LANES)
            put(n, band.row + r, band.column + i, channels[c], load(from + c * pitch_ + i),
                std::min(LANES, band.columns - i));
      }
    }
  }

  template <class U> static U* place(const tdpass_image& v, Index n, Index c, Index h, Index w) {
    return static_cast<U*>(v.data) + n * v.stride[0] + c * v.stride[1] + h * v.stride[2] + w * v.stride[3];
  }

  void put(int n, int h, int w, int channel, Lanes v, int count) {
    if (s_.bias) v += s_.bias[channel];
    if (s_.residual) {
      const T* rest = place<const T>(*s_.residual, n, channel, h, w);
      const Index step = s_.residual->stride[3];
      if (step == 1) v += read_some(rest, count);
      else
        for (int i = 0; i < count; i++) v[i] += widen(rest[i * step]);
    }
    v = activate(v, s_.activation);
    T* y = place<T>(y_, n, channel, h, w);
    if (y_.stride[3] == 1) write_some(y, v, count);
    else
      for (int i = 0; i < count; i++) y[i * y_.stride[3]] = narrow_to<T>(v[i]);
  }

  const tdpass_sparse& s_;
  const Kernel& kernel_;
  static constexpr Kernel full_ = {Walks<Thin::WIDTH>::by_vectors, Walks<Thin::WIDTH>::MOST};
  const Layout& at_;
  const Thin& thin_;
  const tdpass_image &x_, &y_;
  const bool last_;  // whether channels of y, and of the residual, lie together
  const Index pitch_;
  int rows_ = GROUP;  // whose sums are held at once
  float *in_, *sums_, *between_;
};

int parts_of(int size, Index most) {
  return int((size + std::max<Index>(most, 1) - 1) / std::max<Index>(most, 1));
}

template <class T>
int run_bands(const tdpass_sparse& weight, const Kernel& kernel, const tdpass_image& x, const tdpass_image& y,
    const tdpass_pool* pool) {
  const tdpass_stage& t = weight.shape;
  const int h = int(y.size[2]), w = int(y.size[3]);
  const Index per_pixel =
      Index(t.in) * std::min(t.stride[0], t.kernel[0]) * std::min(t.stride[1], t.kernel[1]) + weight.rank;
  // One row of outputs may be too long, as that of all tokens of a linear layer is; whole tiles of vectors
  // are cut off it.
  const Index tile = Index(kernel.most) * LANES,
              row_halo = 1 + (t.kernel[0] - 1) * t.dilation[0] / t.stride[0];
  const Index fit = BAND_FLOATS / (per_pixel * row_halo);
  const int columns = w <= std::max(fit, tile) ? w : int(std::max<Index>(1, fit / tile) * tile);
  const int wide = columns + (t.kernel[1] - 1) * t.dilation[1] / t.stride[1];
  const int down = parts_of(h, BAND_FLOATS / (per_pixel * wide) - row_halo + 1),
            rows = columns < w ? 1 : (h + down - 1) / down;
  const Layout layout(weight, rows, columns);
  if (std::max(layout.floats(), Thin::floats(weight, layout)) > MOST_FLOATS) return -1;
  const Thin thin(weight, layout);
  const long across = (w + columns - 1) / columns, bands = (h + rows - 1) / rows * across,
             total = x.size[0] * bands;
  const int tasks = int(std::min<long>(pool->threads, total));
  auto task = [&](int k) {
    Engine<T> engine(weight, kernel, layout, thin, x, y);
    for (long i = total * k / tasks; i < total * (k + 1) / tasks; i++) {
      int row = int(i % bands / across) * rows, column = int(i % across) * columns;
      engine.run(int(i / bands), {row, std::min(rows, h - row), column, std::min(columns, w - column)});
    }
  };
  return run_tasks(pool, tasks, task);
}

}  // namespace
}  // namespace tdpass

extern "C" int32_t TDPASS_SYMBOL(tdpass_sparse_conv)(
    const tdpass_sparse* weight, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool) {
  using namespace tdpass;
  Kernel kernel;
  if (!choose(weight->width, kernel)) return -1;
  return weight->dtype == TDPASS_BFLOAT16 ? run_bands<Half>(*weight, kernel, *x, *y, pool)
                                          : run_bands<float>(*weight, kernel, *x, *y, pool);
}
