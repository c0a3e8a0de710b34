// The fused chain of convolutions, compiled once per instruction set.
#include "isa.h"

#include "channel_lanes.h"
#include "pixel_lanes.h"

namespace tdpass {
namespace {

constexpr size_t CACHE_BYTES = 384 * 1024;  // what buffers may take of the second-level cache, the rest is for weights
constexpr int POSITIONS = 56;               // pixels per row where a chain of 1x1 layers sees positions only
constexpr int FEW = 8;                      // positions at which threads share panels of channels instead

template <class Engine> int choose_step(const Geometry& g, int rows, int multiple) {
  int step = multiple;
  while (step < rows && Engine::footprint(g, step + multiple) <= CACHE_BYTES) step += multiple;
  int parts = (rows + step - 1) / step;
  int even = (rows + parts - 1) / parts;
  return std::min(rows, (even + multiple - 1) / multiple * multiple);
}

template <class Engine> int run(const Geometry& g, const tdpass_image& x, const tdpass_image& y, const tdpass_pool* pool, int multiple) {
  Output output(*g.chain, y);
  const int images = int(x.size[0]), rows = g.h[g.stages];
  const long total = long(images) * rows;
  const int tasks = int(std::min<long>(pool->threads, total));
  auto task = [&](int k) {
    long low = images >= tasks ? long(images) * k / tasks * rows : total * k / tasks / multiple * multiple;
    long high = images >= tasks ? long(images) * (k + 1) / tasks * rows : k + 1 == tasks ? total : total * (k + 1) / tasks / multiple * multiple;
    if (low >= high) return;
    int step = choose_step<Engine>(g, int(std::min<long>(rows, high - low)), multiple);
    Engine engine(g, x, output, step);
    for (long at = low; at < high;) {
      int n = int(at / rows), from = int(at % rows), to = int(std::min<long>(rows, from + high - at));
      roll(engine, g, n, {from, to}, step);
      at += to - from;
    }
  };
  return run_tasks(pool, tasks, task);
}

bool positions_only(const tdpass_chain& chain) {
  for (int s = 0; s < chain.stages; s++) {
    const tdpass_stage& t = chain.stage[s];
    for (int a = 0; a < 2; a++)
      if (t.kernel[a] != 1 || t.stride[a] != 1 || t.before[a] || t.after[a]) return false;
  }
  return true;
}

// Whether pixels of the view lie `stride[3]` apart over whole images, and over the batch.
bool flat(const tdpass_image& v) {
  return (v.size[2] == 1 || v.stride[2] == v.stride[3] * v.size[3]) && (v.size[0] == 1 || v.stride[0] == v.stride[3] * v.size[3] * v.size[2]);
}

// A piece of `count` positions from `begin` on, as rows of `width`.
tdpass_image piece(const tdpass_image& v, long begin, long count, long width, int itemsize) {
  tdpass_image part = v;
  width = std::min(count, width);
  part.data = static_cast<char*>(v.data) + begin * v.stride[3] * itemsize;
  part.size[0] = 1, part.size[2] = count / width, part.size[3] = width;
  part.stride[0] = 0, part.stride[2] = width * v.stride[3];
  return part;
}

bool by_panels(const Geometry& g, const tdpass_image& y) {
  for (int s = 0; s < g.stages; s++)
    if (g.stage(s).groups != 1) return false;
  return g.h[0] == 1 && y.size[0] == 1 && positions_only(*g.chain) && Output(*g.chain, y).channels_together();
}

// Few positions through 1x1 layers: all threads work on one stage after the other, each on some of its output channels.
int run_panels(const Geometry& g, const tdpass_image& x, const tdpass_image& y, int count, const tdpass_pool* pool) {
  Output output(*g.chain, y);
  Scratch memory;
  size_t total = 0, offset[MAX_STAGES];
  for (int s = 0; s + 1 < g.stages; s++) offset[s] = total, total += size_t(count) * round_up(g.stage(s).out, LANES);
  float* between = memory.reserve(total + LANES);
  for (int s = 0; s < g.stages; s++) {
    const tdpass_stage& t = g.stage(s);
    const bool last = s + 1 == g.stages;
    const int panels = round_up(t.out, LANES) / LANES, tasks = std::min(pool->threads, panels), stride = panels * LANES;
    const Index depth = t.in, none = 0;
    const float* in = s ? between + offset[s - 1] : static_cast<const float*>(x.data);
    const Index pixel = s ? round_up(t.in, LANES) : x.stride[3], channel = s ? 1 : x.stride[1];
    auto task = [&](int k) {
      const int end = panels * (k + 1) / tasks;
      const int most = std::max(1, std::min(MAX_PANELS, ACCUMULATORS / std::min(count, ACCUMULATORS)));
      for (int p = panels * k / tasks, nr; p < end; p += nr) {
        nr = std::min(most, end - p);
        const float* w = static_cast<const float*>(g.chain->weights[s]) + Index(p) * depth * LANES;
        for (int i = 0, mr; i < count; i += mr) {
          mr = std::min(count - i, ACCUMULATORS / nr);
          TileInput<Singles> input{in + i * pixel, pixel, channel, &none, 1, int(depth)};
          if (last) {
            alignas(64) float result[ACCUMULATORS * LANES];
            TILES<Singles, float>[mr][nr - 1](input, w, depth * LANES, result, nr * LANES);
            output.store_tile(0, 0, i, p * LANES, result, nr * LANES, mr, std::min(nr * LANES, t.out - p * LANES));
          } else {
            TILES<Singles, float>[mr][nr - 1](input, w, depth * LANES, between + offset[s] + i * stride + p * LANES, stride);
          }
        }
      }
    };
    if (int status = run_tasks(pool, tasks, task)) return status;
  }
  return 0;
}

int run_chain(const tdpass_chain& chain, const tdpass_image& x, const tdpass_image& y, const tdpass_pool* pool) {
  const Geometry g = trace_sizes(&chain, int(x.size[2]), int(x.size[3]));
  if (chain.lanes == TDPASS_PIXEL_LANES) return PixelLanes::serves(g) ? run<PixelLanes>(g, x, y, pool, PixelLanes::rows_per_cell(g)) : -1;
  if (chain.lanes == TDPASS_PAIR_LANES) return ChannelLanes<Pairs>::serves(g) ? run<ChannelLanes<Pairs>>(g, x, y, pool, 1) : -1;
  const bool few = pool->threads > 1 && x.size[0] * x.size[2] * x.size[3] <= FEW && chain.dtype == TDPASS_FLOAT32 && by_panels(g, y);
  return few ? run_panels(g, x, y, int(x.size[3]), pool) : run<ChannelLanes<Singles>>(g, x, y, pool, 1);
}

}  // namespace
}  // namespace tdpass

extern "C" int32_t TDPASS_SYMBOL(tdpass_conv_chain)(const tdpass_chain* chain, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool) {
  using namespace tdpass;
  const tdpass_image* residual = chain->residual;
  bool together = chain->lanes != TDPASS_PIXEL_LANES && positions_only(*chain) && flat(*x) && flat(*y) && (!residual || flat(*residual));
  if (!together) return run_chain(*chain, *x, *y, pool);
  const long positions = x->size[0] * x->size[2] * x->size[3];
  const long share = positions <= FEW ? positions : (positions + pool->threads - 1) / pool->threads;  // so that no thread is left without a row
  const long width = std::min<long>(POSITIONS, share), whole = positions / width * width;
  const int itemsize = chain->dtype == TDPASS_BFLOAT16 ? 2 : 4;
  for (int k = 0; k < 2; k++) {
    long begin = k ? whole : 0, count = k ? positions - whole : whole;
    if (count == 0) continue;
    tdpass_image xs = piece(*x, begin, count, width, itemsize), ys = piece(*y, begin, count, width, itemsize), rs;
    tdpass_chain part = *chain;
    if (residual) rs = piece(*residual, begin, count, width, itemsize), part.residual = &rs;
    if (int32_t status = run_chain(part, xs, ys, pool)) return status;
  }
  return 0;
}
