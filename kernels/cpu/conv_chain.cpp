// The fused chain of convolutions, compiled once per instruction set.
#include "isa.h"

#include "chain_runner.h"
#include "channel_lanes.h"
#include "pixel_lanes.h"

namespace tdpass {
namespace {

bool by_panels(const Geometry& g, const tdpass_image& y) {
  for (int s = 0; s < g.stages; s++)
    if (g.stage(s).groups != 1) return false;
  return g.h[0] == 1 && y.size[0] == 1 && positions_only(*g.chain) && Output(*g.chain, y).channels_together();
}

// Few positions through 1x1 layers: all threads work on one stage after the other, each on some of its output
// channels.
int run_panels(
    const Geometry& g, const tdpass_image& x, const tdpass_image& y, int count, const tdpass_pool* pool) {
  Output output(*g.chain, y);
  Scratch memory;
  size_t total = 0, offset[MAX_STAGES];
  for (int s = 0; s + 1 < g.stages; s++)
    offset[s] = total, total += size_t(count) * round_up(g.stage(s).out, LANES);
  float* between = memory.reserve(total + LANES);
  for (int s = 0; s < g.stages; s++) {
    const tdpass_stage& t = g.stage(s);
    const bool last = s + 1 == g.stages;
    const int panels = round_up(t.out, LANES) / LANES, tasks = std::min(pool->threads, panels),
              stride = panels * LANES;
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
            TILES<Singles, Store<float>>[mr][nr - 1](input, w, depth* LANES, {result, nr * LANES});
            output.store_tile(
                0, 0, i, p * LANES, result, nr * LANES, mr, std::min(nr * LANES, t.out - p * LANES));
          } else {
            TILES<Singles, Store<float>>[mr][nr - 1](
                input, w, depth* LANES, {between + offset[s] + i * stride + p * LANES, stride});
          }
        }
      }
    };
    if (int status = run_tasks(pool, tasks, task)) return status;
  }
  return 0;
}

int run_chain(
    const tdpass_chain& chain, const tdpass_image& x, const tdpass_image& y, const tdpass_pool* pool) {
  const Geometry g = trace_sizes(&chain, int(x.size[2]), int(x.size[3]));
  Output output(chain, y);
  if (chain.lanes == TDPASS_PIXEL_LANES)
    return PixelLanes::serves(g) ? run<PixelLanes>(g, x, output, pool, PixelLanes::rows_per_cell(g)) : -1;
  if (chain.lanes == TDPASS_PAIR_LANES) return run<ChannelLanes<Pairs>>(g, x, output, pool, 1);
  const bool few = pool->threads > 1 && x.size[0] * x.size[2] * x.size[3] <= FEW &&
      chain.dtype == TDPASS_FLOAT32 && by_panels(g, y);
  return few ? run_panels(g, x, y, int(x.size[3]), pool) : run<ChannelLanes<Singles>>(g, x, output, pool, 1);
}

}  // namespace
}  // namespace tdpass

extern "C" int32_t TDPASS_SYMBOL(tdpass_conv_chain)(
    const tdpass_chain* chain, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool) {
  using namespace tdpass;
  const int itemsize = chain->dtype == TDPASS_BFLOAT16 ? 2 : 4;
  return in_pieces(*chain, *x, *y, pool, {itemsize, itemsize, itemsize},
      [&](const tdpass_image& xs, const tdpass_image& ys, const tdpass_image* residual) {
        tdpass_chain part = *chain;
        part.residual = residual;
        return run_chain(part, xs, ys, pool);
      });
}
