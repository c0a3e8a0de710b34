// The fused chain of convolutions, compiled once per instruction set.
#include "isa.h"

#include "channel_lanes.h"
#include "pixel_lanes.h"

namespace tdpass {
namespace {

constexpr size_t CACHE_FLOATS = 96 * 1024;  // what buffers may take of the second-level cache, the rest is for weights
constexpr int POSITIONS = 56;               // pixels per row where a chain of 1x1 layers sees positions only

template <class Engine> int choose_step(const Geometry& g, int rows, int multiple) {
  int step = multiple;
  while (step < rows && Engine::footprint(g, step + multiple) <= CACHE_FLOATS) step += multiple;
  int parts = (rows + step - 1) / step;
  int even = (rows + parts - 1) / parts;
  return std::min(rows, (even + multiple - 1) / multiple * multiple);
}

template <class Engine> void run(const Geometry& g, const tdpass_image& x, const tdpass_image& y, const tdpass_pool* pool, int multiple) {
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
  run_tasks(pool, tasks, task);
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

// A piece of `count` positions from `begin` on, as rows of POSITIONS.
tdpass_image piece(const tdpass_image& v, long begin, long count, int itemsize) {
  tdpass_image part = v;
  long width = std::min<long>(count, POSITIONS);
  part.data = static_cast<char*>(v.data) + begin * v.stride[3] * itemsize;
  part.size[0] = 1, part.size[2] = count / width, part.size[3] = width;
  part.stride[0] = 0, part.stride[2] = width * v.stride[3];
  return part;
}

int run_chain(const tdpass_chain& chain, const tdpass_image& x, const tdpass_image& y, const tdpass_pool* pool) {
  Geometry g;
  if (!trace_sizes(&chain, int(x.size[2]), int(x.size[3]), g)) return -1;
  if (y.size[0] != x.size[0] || x.size[1] != g.channels(0) || y.size[1] != g.channels(g.stages)) return -1;
  if (y.size[2] != g.h[g.stages] || y.size[3] != g.w[g.stages]) return -1;
  for (int s = 0; s < chain.stages; s++)
    if (chain.stage[s].kernel[0] * chain.stage[s].kernel[1] > ChannelLanes::MAX_TAPS) return -1;
  if (chain.lanes == TDPASS_PIXEL_LANES) {
    if (!PixelLanes::serves(g)) return -1;
    run<PixelLanes>(g, x, y, pool, PixelLanes::rows_per_cell(g));
  } else {
    run<ChannelLanes>(g, x, y, pool, 1);
  }
  return 0;
}

}  // namespace
}  // namespace tdpass

extern "C" int32_t TDPASS_SYMBOL(tdpass_conv_chain)(const tdpass_chain* chain, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool) {
  using namespace tdpass;
  const tdpass_image* residual = chain->residual;
  if (x->size[0] == 0 || x->size[2] == 0 || x->size[3] == 0) return 0;
  bool together = chain->lanes == TDPASS_CHANNEL_LANES && positions_only(*chain) && flat(*x) && flat(*y) && (!residual || flat(*residual));
  if (!together) return run_chain(*chain, *x, *y, pool);
  const long positions = x->size[0] * x->size[2] * x->size[3], whole = positions / POSITIONS * POSITIONS;
  const int itemsize = chain->dtype == TDPASS_BFLOAT16 ? 2 : 4;
  for (int k = 0; k < 2; k++) {
    long begin = k ? whole : 0, count = k ? positions - whole : whole;
    if (count == 0) continue;
    tdpass_image xs = piece(*x, begin, count, itemsize), ys = piece(*y, begin, count, itemsize), rs;
    tdpass_chain part = *chain;
    if (residual) rs = piece(*residual, begin, count, itemsize), part.residual = &rs;
    if (int32_t status = run_chain(part, xs, ys, pool)) return status;
  }
  return 0;
}
