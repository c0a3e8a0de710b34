// Runs a chain of convolutions over an image a few rows at a time, so that what lies between two stages stays
// in cache.
//
// Buffer s holds rows of the padded input of stage s.  Going down the image, rows that the next step still
// needs are moved to the front of their buffer and only the new ones are computed.  An engine says how rows
// are laid out and computed.
#pragma once
#include <algorithm>

#include "lanes.h"
#include "limits.h"
#include "scratch.h"

namespace tdpass {

struct Range {
  int low = 0, high = 0;
  int size() const { return high - low; }
  bool empty() const { return high <= low; }
};

// Sizes of everything between the stages; `h[s], w[s]` is the unpadded input of stage s, `h[stages]` the
// output.
struct Geometry {
  const tdpass_chain* chain;
  int stages;
  int h[MAX_STAGES + 1], w[MAX_STAGES + 1];

  const tdpass_stage& stage(int s) const { return chain->stage[s]; }
  int channels(int s) const { return s < stages ? stage(s).in : stage(s - 1).out; }
  int padded_width(int s) const { return w[s] + stage(s).before[1] + stage(s).after[1]; }
  bool padded(int s) const {
    const tdpass_stage& t = stage(s);
    return t.before[0] || t.before[1] || t.after[0] || t.after[1];
  }
  // Rows of the padded input that rows `out` of the output read.
  Range reads(int s, Range out) const {
    const tdpass_stage& t = stage(s);
    if (out.empty()) return {};
    return {out.low * t.stride[0], (out.high - 1) * t.stride[0] + (t.kernel[0] - 1) * t.dilation[0] + 1};
  }
  // How many rows of buffer s are held at once for `rows` rows of the result.
  int capacity(int s, int rows) const {
    for (int k = stages - 1; k >= s; k--) rows = reads(k, {0, rows}).high;
    return rows;
  }
};

inline Geometry trace_sizes(const tdpass_chain* chain, int h, int w) {
  Geometry g;
  g.chain = chain;
  g.stages = chain->stages;
  g.h[0] = h;
  g.w[0] = w;
  for (int s = 0; s < g.stages; s++) {
    const tdpass_stage& t = g.stage(s);
    int reach_h = (t.kernel[0] - 1) * t.dilation[0] + 1, reach_w = (t.kernel[1] - 1) * t.dilation[1] + 1;
    g.h[s + 1] = (g.h[s] + t.before[0] + t.after[0] - reach_h) / t.stride[0] + 1;
    g.w[s + 1] = (g.w[s] + t.before[1] + t.after[1] - reach_w) / t.stride[1] + 1;
  }
  return g;
}

// Produces rows `rows` of image n.  `Engine` has: `first` (0 where x is copied into buffer 0, 1 where stage 0
// reads x itself), `shift(s, from, count)`, `clear(s, row)`, `fetch(n, image_row, row)`, `compute(s, n, out,
// in_low, row)`.
template <class Engine> void roll(Engine& engine, const Geometry& g, int n, Range rows, int step) {
  Range held[MAX_STAGES];
  for (int low = rows.low; low < rows.high; low += step) {
    Range out{low, std::min(low + step, rows.high)};
    Range need[MAX_STAGES], fresh[MAX_STAGES + 1];
    fresh[g.stages] = out;
    for (int s = g.stages - 1; s >= 0; s--) {
      need[s] = g.reads(s, fresh[s + 1]);
      if (s < engine.first) break;
      int begin = need[s].empty() ? 0 : std::max(need[s].low, held[s].high);
      fresh[s] = {begin, need[s].empty() ? begin : need[s].high};
      if (s > 0) {  // padded rows of buffer s are rows of the result of stage s-1
        int before = g.stage(s).before[0];
        Range made{std::max(fresh[s].low - before, 0), std::min(fresh[s].high - before, g.h[s])};
        if (made.empty()) made = {0, 0};
        Range padded = fresh[s];
        fresh[s] = made;
        place(engine, g, s, need[s], padded, held[s]);
      } else {
        Range padded = fresh[0];
        place(engine, g, 0, need[0], padded, held[0]);
        for (int r = padded.low; r < padded.high; r++) {
          int row = r - g.stage(0).before[0];
          if (row >= 0 && row < g.h[0]) engine.fetch(n, row, r - need[0].low);
        }
      }
    }
    for (int s = 0; s < g.stages; s++) {
      Range made = fresh[s + 1];
      if (made.empty()) continue;
      int in_row = made.low * g.stage(s).stride[0] - (s >= engine.first ? need[s].low : 0);
      int out_row =
          s + 1 < g.stages ? made.low + g.stage(s + 1).before[0] - need[s + 1].low : made.low - out.low;
      engine.compute(s, n, made, in_row, out_row);
    }
    engine.finish(n, out);
  }
}

// Moves what buffer s still needs to its front, and clears the rows that only padding fills.
template <class Engine>
void place(Engine& engine, const Geometry& g, int s, Range need, Range padded, Range& held) {
  if (need.empty()) return;
  int keep = std::max(0, held.high - need.low);
  if (keep > 0 && need.low > held.low) engine.shift(s, need.low - held.low, keep);
  for (int r = padded.low; r < padded.high; r++) {
    int row = r - g.stage(s).before[0];
    if (row < 0 || row >= g.h[s]) engine.clear(s, r - need.low);
  }
  held = need;
}

}  // namespace tdpass
