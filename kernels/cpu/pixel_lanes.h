// A chain of convolutions with output pixels in vector lanes; buffers are `[channel][row][pixel]`, x and y
// NCHW.
//
// Made for few channels and any rank: no lane is lost to a rank that is no multiple of 16, and no layout
// changes.  A cell is 16 output pixels: of one row, or of two or four rows where rows are 8 or 4 pixels wide.
#pragma once
#include "output.h"
#include "rolling.h"

namespace tdpass {

constexpr int CHANNEL_BLOCK = 8;

struct CellInput {
  const float* base;
  Index plane, row;   // strides: of a channel, and of what the next output row reads
  const Index* taps;  // offsets of the kernel's positions
  int tap_count, channels;
};

typedef float Half8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Quarter4 __attribute__((vector_size(16), aligned(4), may_alias));

// SPAN pixels of a row, then of the next one; STEP apart.
template <int SPAN, int STEP> static TDPASS_INLINE Lanes load_cell(const float* p, Index row) {
  if constexpr (SPAN == LANES && STEP == 1) {
    return load(p);
  } else if constexpr (SPAN == LANES && STEP == 2) {
    return __builtin_shufflevector(
        load(p), load(p + LANES), 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  } else if constexpr (SPAN == 8 && STEP == 1) {
    Half8 a = *reinterpret_cast<const Half8*>(p), b = *reinterpret_cast<const Half8*>(p + row);
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  } else if constexpr (SPAN == 8 && STEP == 2) {
    return __builtin_shufflevector(
        load(p), load(p + row), 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  } else if constexpr (SPAN == 4 && STEP == 1) {
    Quarter4 a = *reinterpret_cast<const Quarter4*>(p), b = *reinterpret_cast<const Quarter4*>(p + row);
    Quarter4 c = *reinterpret_cast<const Quarter4*>(p + 2 * row),
             d = *reinterpret_cast<const Quarter4*>(p + 3 * row);
    Half8 ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7),
          cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  } else {
    Lanes v;
    TDPASS_UNROLL for (int l = 0; l < LANES; l++) v[l] = p[(l / SPAN) * row + (l % SPAN) * STEP];
    return v;
  }
}

// out[i NV + j] of channel i, cell j: over input channels k and taps t of cell(base + at[j] + k plane +
// taps[t]) * w[(k taps + t) 8 + i] A function of its own, so that nothing else competes for the registers of
// the sums.
template <int MB, int NV, int SPAN, int STEP>
static __attribute__((noinline)) void cells(
    const CellInput& in, const Index* at, const float* w, Lanes* out) {
  Lanes sum[MB][NV];
  TDPASS_UNROLL for (int i = 0; i < MB; i++) TDPASS_UNROLL for (int j = 0; j < NV; j++) sum[i][j] = zero();
  const float* from[NV];
  TDPASS_UNROLL for (int j = 0; j < NV; j++) from[j] = in.base + at[j];
  for (int k = 0; k < in.channels; k++) {
    for (int t = 0; t < in.tap_count; t++) {
      Lanes v[NV];
      TDPASS_UNROLL for (int j = 0; j < NV; j++) v[j] = load_cell<SPAN, STEP>(from[j] + in.taps[t], in.row);
      TDPASS_UNROLL for (int i = 0; i < MB; i++) {
        Lanes a = broadcast(w[i]);
        TDPASS_UNROLL for (int j = 0; j < NV; j++) sum[i][j] += a * v[j];
      }
      w += CHANNEL_BLOCK;
    }
    TDPASS_UNROLL for (int j = 0; j < NV; j++) from[j] += in.plane;
  }
  TDPASS_UNROLL for (int i = 0; i < MB; i++) TDPASS_UNROLL for (int j = 0; j < NV; j++) out[i * NV + j] =
      sum[i][j];
}

class PixelLanes {
 public:
  PixelLanes(const Geometry& geometry, const tdpass_image& image, Output& out, int step)
      : g(geometry),
        x(image, geometry.chain->dtype),
        output(out),
        first(reads_in_place(geometry, image) ? 1 : 0) {
    size_t total = 0;
    for (int s = first; s < g.stages; s++) {
      row_[s] = g.padded_width(s);
      plane_[s] = row_[s] * (g.capacity(s, step) + SLACK_ROWS);
      buffer_[s] = reinterpret_cast<float*>(total);
      total += plane_[s] * g.channels(s) + 3 * LANES;
    }
    float* memory = thread_scratch(total);
    std::memset(memory, 0, total * sizeof(float));
    for (int s = first; s < g.stages; s++) buffer_[s] = memory + reinterpret_cast<size_t>(buffer_[s]);
  }

  // Bytes a step of that many rows needs; what `step` is chosen by.
  static size_t footprint(const Geometry& g, int step) {
    size_t total = 0;
    for (int s = 0; s < g.stages; s++)
      total += size_t(g.channels(s)) * (g.capacity(s, step) + SLACK_ROWS) * g.padded_width(s);
    return total * sizeof(float);
  }

  // Rows that one step should be a multiple of, so that cells are full.
  static int rows_per_cell(const Geometry& g) { return LANES / span(g.w[g.stages]); }

  void shift(int s, int from, int count) {
    for (int c = 0; c < g.channels(s); c++) {
      float* plane = buffer_[s] + c * plane_[s];
      std::memmove(plane, plane + from * row_[s], sizeof(float) * count * row_[s]);
    }
  }
  void clear(int s, int row) {
    for (int c = 0; c < g.channels(s); c++)
      std::memset(buffer_[s] + c * plane_[s] + row * row_[s], 0, sizeof(float) * row_[s]);
  }
  void fetch(int n, int image_row, int row) {
    x.gather(
        n, image_row, buffer_[0] + row * row_[0] + g.stage(0).before[1], 1, plane_[0], g.w[0], g.channels(0));
  }
  void finish(int, Range) {}

  void compute(int s, int n, Range out, int in_row, int out_row) {
    const tdpass_stage& t = g.stage(s);
    int step = t.stride[1];
    switch (span(g.w[s + 1])) {
      case 4:
        step == 1       ? run<4, 1>(s, n, out, in_row, out_row)
            : step == 2 ? run<4, 2>(s, n, out, in_row, out_row)
                        : run<4, 4>(s, n, out, in_row, out_row);
        break;
      case 8:
        step == 1       ? run<8, 1>(s, n, out, in_row, out_row)
            : step == 2 ? run<8, 2>(s, n, out, in_row, out_row)
                        : run<8, 4>(s, n, out, in_row, out_row);
        break;
      default:
        step == 1       ? run<16, 1>(s, n, out, in_row, out_row)
            : step == 2 ? run<16, 2>(s, n, out, in_row, out_row)
                        : run<16, 4>(s, n, out, in_row, out_row);
    }
  }

  // Strides of 1, 2 and 4 pixels are served.
  static bool serves(const Geometry& g) {
    for (int s = 0; s < g.stages; s++) {
      int step = g.stage(s).stride[1];
      if (step != 1 && step != 2 && step != 4) return false;
    }
    return true;
  }

 private:
  static constexpr int SLACK_ROWS = 4;  // a cell of four rows reads past the last one
  static int span(int width) { return width == 4 || width == 8 ? width : LANES; }

  // A vector must not reach past the end of x: whole cells only.
  static bool reads_in_place(const Geometry& g, const tdpass_image& x) {
    int cell = span(g.w[1]);
    return !g.padded(0) && g.chain->dtype == TDPASS_FLOAT32 && x.stride[3] == 1 &&
        g.stage(0).stride[0] == 1 && g.stage(0).stride[1] == 1 && g.stage(0).kernel[0] == 1 &&
        g.stage(0).kernel[1] == 1 && g.w[0] % cell == 0 && (cell == LANES || g.h[0] % (LANES / cell) == 0);
  }

  template <int SPAN, int STEP> void run(int s, int n, Range out, int in_row, int out_row) {
    const tdpass_stage& t = g.stage(s);
    Index row, plane;
    const float* in;
    if (s < first) {
      row = x.stride(2), plane = x.stride(1);
      in = x.elements<float>() + n * x.stride(0);
    } else {
      row = row_[s], plane = plane_[s];
      in = buffer_[s];
    }
    in += in_row * row;
    Index taps[MAX_TAPS];
    int count = 0;
    for (int y = 0; y < t.kernel[0]; y++)
      for (int z = 0; z < t.kernel[1]; z++) taps[count++] = y * t.dilation[0] * row + z * t.dilation[1];
    int depth = t.in / t.groups, width = t.out / t.groups,
        blocks = (width + CHANNEL_BLOCK - 1) / CHANNEL_BLOCK;
    CellInput input{in, plane, row * t.stride[0], taps, count, depth};
    Target to{s, n, out, out_row};
    for (int group = 0; group < t.groups; group++) {
      input.base = in + group * depth * plane;
      for (int b = 0; b < blocks; b++) {
        const float* w = static_cast<const float*>(g.chain->weights[s]) +
            (Index(group) * blocks + b) * depth * count * CHANNEL_BLOCK;
        int channel = group * width + b * CHANNEL_BLOCK,
            channels = std::min(CHANNEL_BLOCK, width - b * CHANNEL_BLOCK);
        constexpr int MOST = ACCUMULATORS >= 16 ? 8 : ACCUMULATORS >= 4 ? 4 : 2;
        for (int i = 0; i < channels; i += MOST) {
          int some = std::min(MOST, channels - i);
          if (some > 4) sweep<MOST, 2, SPAN, STEP>(input, w + i, to, channel + i, some);
          else if (some > 2) sweep<(MOST < 4 ? MOST : 4), 2, SPAN, STEP>(input, w + i, to, channel + i, some);
          else if (some > 1) sweep<2, 2, SPAN, STEP>(input, w + i, to, channel + i, some);
          else sweep<1, 4, SPAN, STEP>(input, w + i, to, channel + i, some);
        }
      }
    }
  }

  struct Target {
    int s, n;
    Range out;
    int row;
  };

  // All cells of these output rows for a block of channels, WANTED at a time where the registers hold them.
  template <int MB, int WANTED, int SPAN, int STEP>
  __attribute__((noinline)) void sweep(
      const CellInput& in, const float* w, const Target& to, int channel, int channels) {
    constexpr int NV = MB * WANTED <= ACCUMULATORS ? WANTED : 1;
    constexpr int ROWS = LANES / SPAN;
    const int width = g.w[to.s + 1], across = (width + SPAN - 1) / SPAN,
              down = (to.out.size() + ROWS - 1) / ROWS, total = across * down;
    const bool whole =
        width % SPAN == 0 && to.out.size() % ROWS == 0 && channels == MB && writes_vectors(to.s, SPAN);
    const Writer writer(*this, to, channel);
    int r[NV] = {}, c[NV] = {};
    int row = 0, column = 0;
    for (int done = 0; done < total; done += NV) {
      Index at[NV];
      int cells_here = std::min(NV, total - done);
      for (int j = 0; j < NV; j++) {
        if (j < cells_here) {
          r[j] = row, c[j] = column;
          if ((column += SPAN) >= width) column = 0, row += ROWS;
        } else {
          r[j] = r[0], c[j] = c[0];
        }
        at[j] = r[j] * in.row + c[j] * STEP;
      }
      alignas(64) Lanes sum[MB * NV];
      cells<MB, NV, SPAN, STEP>(in, at, w, sum);
      if (whole && cells_here == NV) {
        TDPASS_UNROLL for (int j = 0; j < NV; j++) {
          float* p = writer.base + r[j] * writer.row + c[j];
          const float* rest = writer.residual ? writer.residual + r[j] * writer.residual_row + c[j] : nullptr;
          TDPASS_UNROLL for (int i = 0; i < MB; i++) {
            Lanes v = sum[i * NV + j];
            if (writer.last) {
              if (writer.bias) v += writer.bias[i];
              if (rest) v += load(rest + i * writer.residual_plane);
              v = writer.bounds(v);
            }
            if constexpr (SPAN == LANES) {
              store(p + i * writer.plane, v);
            } else if (writer.last) {
              store(p + i * writer.plane, v);
            } else if constexpr (SPAN == 8) {
              *reinterpret_cast<Half8*>(p + i * writer.plane) =
                  __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
              *reinterpret_cast<Half8*>(p + i * writer.plane + writer.row) =
                  __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
            } else {
              Quarter4* q = reinterpret_cast<Quarter4*>(p + i * writer.plane);
              *q = __builtin_shufflevector(v, v, 0, 1, 2, 3);
              *reinterpret_cast<Quarter4*>(p + i * writer.plane + writer.row) =
                  __builtin_shufflevector(v, v, 4, 5, 6, 7);
              *reinterpret_cast<Quarter4*>(p + i * writer.plane + 2 * writer.row) =
                  __builtin_shufflevector(v, v, 8, 9, 10, 11);
              *reinterpret_cast<Quarter4*>(p + i * writer.plane + 3 * writer.row) =
                  __builtin_shufflevector(v, v, 12, 13, 14, 15);
            }
          }
        }
        continue;
      }
      for (int i = 0; i < channels; i++)
        for (int j = 0; j < cells_here; j++) put<SPAN>(to, channel + i, r[j], c[j], width, sum[i * NV + j]);
    }
  }

  // Whether whole cells of stage s can be stored as vectors, with an activation that is a clamp.
  bool writes_vectors(int s, int span) const {
    return s + 1 < g.stages || (output.plain() && (span == LANES || output.rows_together(span)));
  }

  // Where cells of a block of channels go.
  struct Writer {
    Writer(const PixelLanes& lanes, const Target& to, int channel) {
      const Geometry& g = lanes.g;
      last = to.s + 1 == g.stages;
      if (!last) {
        int next = to.s + 1;
        plane = lanes.plane_[next], row = lanes.row_[next];
        base = lanes.buffer_[next] + channel * plane + to.row * row + g.stage(next).before[1];
      } else if (lanes.output.plain()) {
        lanes.output.locate(to.n, to.out.low, channel, *this);
      }
    }
    bool last;
    float* base = nullptr;
    const float *bias = nullptr, *residual = nullptr;
    Index plane = 0, row = 0, residual_plane = 0, residual_row = 0;
    Bounds bounds;
  };

  template <int SPAN>
  TDPASS_INLINE void put(const Target& to, int channel, int row, int column, int width, Lanes v) {
    int rows = std::min(LANES / SPAN, to.out.size() - row), columns = std::min(SPAN, width - column);
    if (to.s + 1 < g.stages) {
      int next = to.s + 1;
      float* p = buffer_[next] + channel * plane_[next] + (to.row + row) * row_[next] +
          g.stage(next).before[1] + column;
      if constexpr (SPAN == LANES) {
        store_some(p, v, columns);
      } else {
        for (int q = 0; q < rows; q++)
          std::memcpy(
              p + q * row_[next], reinterpret_cast<const float*>(&v) + q * SPAN, SPAN * sizeof(float));
      }
      return;
    }
    if constexpr (SPAN == LANES) {
      output.put(to.n, to.out.low + row, column, channel, v, columns);
    } else if (output.rows_together(SPAN)) {
      output.put(to.n, to.out.low + row, 0, channel, v, rows * SPAN);
    } else {
      for (int q = 0; q < rows; q++) {
        Lanes part{};
        std::memcpy(&part, reinterpret_cast<const float*>(&v) + q * SPAN, SPAN * sizeof(float));
        output.put(to.n, to.out.low + row + q, 0, channel, part, SPAN);
      }
    }
  }

  const Geometry& g;
  Input x;
  Output& output;
  Index row_[MAX_STAGES], plane_[MAX_STAGES];
  float* buffer_[MAX_STAGES];

 public:
  const int first;
};

}  // namespace tdpass
