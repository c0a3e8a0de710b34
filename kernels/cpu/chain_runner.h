// Runs a chain of convolutions by an engine on several threads: how many rows at once, which rows on which
// thread.
#pragma once
#include "amx.h"
#include "cache.h"
#include "output.h"
#include "rolling.h"

namespace tdpass {

constexpr int POSITIONS = 56;  // pixels per row where a chain of 1x1 layers sees positions only
constexpr int FEW = 8;         // positions at which threads share panels of channels instead

template <class Engine> int choose_step(const Geometry& g, int rows, int multiple) {
  int step = multiple;
  while (step < rows && Engine::footprint(g, step + multiple) <= buffer_bytes()) step += multiple;
  int parts = (rows + step - 1) / step;
  int even = (rows + parts - 1) / parts;
  return std::min(rows, (even + multiple - 1) / multiple * multiple);
}

// `Sizes` is a Geometry, or one with what else the engine asks for.
template <class Engine, class Sizes, class Out>
int run(const Sizes& g, const tdpass_image& x, Out& output, const tdpass_pool* pool, int multiple) {
  const int images = int(x.size[0]), rows = g.h[g.stages];
  const long total = long(images) * rows;
  const int tasks = int(std::min<long>(pool->threads, total));
  auto task = [&](int k) {
    long low = images >= tasks ? long(images) * k / tasks * rows : total * k / tasks / multiple * multiple;
    long high = images >= tasks ? long(images) * (k + 1) / tasks * rows
        : k + 1 == tasks        ? total
                                : total * (k + 1) / tasks / multiple * multiple;
    if (low >= high) return;
    int step = choose_step<Engine>(g, int(std::min<long>(rows, high - low)), multiple);
    Engine engine(g, x, output, step);
    for (long at = low; at < high;) {
      int n = int(at / rows), from = int(at % rows), to = int(std::min<long>(rows, from + high - at));
      roll(engine, g, n, {from, to}, step);
      at += to - from;
    }
    amx_release();
  };
  return run_tasks(pool, tasks, task);
}

inline bool positions_only(const tdpass_chain& chain) {
  for (int s = 0; s < chain.stages; s++) {
    const tdpass_stage& t = chain.stage[s];
    for (int a = 0; a < 2; a++)
      if (t.kernel[a] != 1 || t.stride[a] != 1 || t.before[a] || t.after[a]) return false;
  }
  return true;
}

// Whether pixels of the view lie `stride[3]` apart over whole images, and over the batch.
inline bool flat(const tdpass_image& v) {
  return (v.size[2] == 1 || v.stride[2] == v.stride[3] * v.size[3]) &&
      (v.size[0] == 1 || v.stride[0] == v.stride[3] * v.size[3] * v.size[2]);
}

// A piece of `count` positions from `begin` on, as rows of `width`.
inline tdpass_image piece(const tdpass_image& v, long begin, long count, long width, int itemsize) {
  tdpass_image part = v;
  width = std::min(count, width);
  part.data = static_cast<char*>(v.data) + begin * v.stride[3] * itemsize;
  part.size[0] = 1, part.size[2] = count / width, part.size[3] = width;
  part.stride[0] = 0, part.stride[2] = width * v.stride[3];
  return part;
}

struct ItemSizes {
  int x, y, residual;
};

// Calls `body(x, y, residual)` once, or where the chain sees positions only, on rows of positions and on what
// is left over.
template <class Body>
int32_t in_pieces(const tdpass_chain& chain, const tdpass_image& x, const tdpass_image& y,
    const tdpass_pool* pool, const ItemSizes& sizes, const Body& body) {
  const tdpass_image* residual = chain.residual;
  const bool together = chain.lanes != TDPASS_PIXEL_LANES && positions_only(chain) && flat(x) && flat(y) &&
      (!residual || flat(*residual));
  if (!together) return body(x, y, residual);
  const long positions = x.size[0] * x.size[2] * x.size[3];
  const long share = positions <= FEW
      ? positions
      : (positions + pool->threads - 1) / pool->threads;  // so that no thread is left without a row
  const long width = std::min<long>(POSITIONS, share), whole = positions / width * width;
  for (int k = 0; k < 2; k++) {
    const long begin = k ? whole : 0, count = k ? positions - whole : whole;
    if (count == 0) continue;
    tdpass_image rest{};
    if (residual) rest = piece(*residual, begin, count, width, sizes.residual);
    if (int32_t status = body(piece(x, begin, count, width, sizes.x), piece(y, begin, count, width, sizes.y),
            residual ? &rest : nullptr))
      return status;
  }
  return 0;
}

}  // namespace tdpass
