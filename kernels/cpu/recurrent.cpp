// Recurrent cells whose hidden-to-hidden matrix is a product U V, compiled once per instruction set.
//
// A step reads every weight once, so its speed is that of the cache the weights lie in: they are read as one
// stream, and where they outgrow the second-level cache odd steps read it backwards, to begin with what the
// step before used last.  The gates of 16 hidden units are made together: the cell never leaves registers.
#include "isa.h"

#include "cache.h"
#include "cell.h"
#include "scratch.h"

#include <algorithm>

namespace tdpass {
namespace {

constexpr int MAX_SAMPLES = 6;

static TDPASS_INLINE int panels_of(int n) { return (n + LANES - 1) / LANES; }

// How many sums of every n-th term hide the latency of a multiply-add, which would wait for the one before.
constexpr int split(int sums) {
  return sums >= 8 || ACCUMULATORS < 8 ? 1 : sums >= 4 ? 2 : sums >= 2 ? 4 : 8;
}

// sum[i][g] = sum over k of in[i row + k] * w[(k N + g) 16 ..] for MR samples and N vectors.
template <int MR, int N, class W>
static TDPASS_INLINE void products(const float* in, Index row, int depth, const W* w, Lanes (&sum)[MR][N]) {
  constexpr int SPLIT = split(MR * N);
  Lanes part[SPLIT][MR][N];
  TDPASS_UNROLL for (int s = 0; s < SPLIT; s++) TDPASS_UNROLL for (int i = 0; i < MR; i++)
      TDPASS_UNROLL for (int g = 0; g < N; g++) part[s][i][g] = zero();
  auto term = [&](Lanes(&to)[MR][N], int k) __attribute__((always_inline)) {
    Lanes b[N];
    TDPASS_UNROLL for (int g = 0; g < N; g++) b[g] = read_some(w + (Index(k) * N + g) * LANES, LANES);
    TDPASS_UNROLL for (int i = 0; i < MR; i++) {
      Lanes a = broadcast(in[i * row + k]);
      TDPASS_UNROLL for (int g = 0; g < N; g++) to[i][g] += a * b[g];
    }
  };
  int k = 0;
  for (; k + SPLIT <= depth; k += SPLIT) TDPASS_UNROLL for (int s = 0; s < SPLIT; s++) term(part[s], k + s);
  for (; k < depth; k++) term(part[0], k);
  TDPASS_UNROLL for (int i = 0; i < MR; i++) TDPASS_UNROLL for (int g = 0; g < N; g++) {
    sum[i][g] = part[0][i][g];
    TDPASS_UNROLL for (int s = 1; s < SPLIT; s++) sum[i][g] += part[s][i][g];
  }
}

// Some samples at one step; pointers to the first sample.
struct Step {
  const tdpass_cell& cell;
  const float* pre;
  float *q, *h, *c, *y;
  Index q_row, state_row;
  bool backwards;

  // q = V h, then gates, state and output of 16 units after another, for MR samples.
  template <int GATES, class W, int MR> __attribute__((noinline)) void run() const {
    const int hidden = cell.hidden, rank = cell.rank, thin = panels_of(rank), wide = panels_of(hidden);
    for (int j = 0; j < thin; j++) {
      const int p = backwards ? thin - 1 - j : j;
      Lanes sum[MR][1];
      products<MR, 1>(h, state_row, hidden, static_cast<const W*>(cell.v) + Index(p) * hidden * LANES, sum);
      TDPASS_UNROLL for (int i = 0; i < MR; i++) store(q + i * q_row + p * LANES, sum[i][0]);
    }
    for (int j = 0; j < wide; j++) {
      const int p = backwards ? wide - 1 - j : j, at = p * LANES, count = std::min(LANES, hidden - at);
      Lanes own[MR][GATES];
      products<MR, GATES>(
          q, q_row, rank, static_cast<const W*>(cell.u) + Index(p) * rank * GATES * LANES, own);
      TDPASS_UNROLL for (int i = 0; i < MR; i++) {
        Lanes before[GATES];
        TDPASS_UNROLL for (int g = 0; g < GATES; g++) {
          before[g] = load_some(pre + i * cell.pre_sample + g * hidden + at, count);
          if (cell.bias) own[i][g] += load_some(cell.bias + g * hidden + at, count);
        }
        float* state = h + i * state_row + at;
        update(own[i], before, state, c + i * state_row + at);
        store_some(y + i * cell.y_sample + at, load(state), count);
      }
    }
  }
};

template <int GATES, class W> void run_samples(const tdpass_cell& cell, int first, int samples) {
  constexpr int MOST = std::max(1, std::min(MAX_SAMPLES, ACCUMULATORS / GATES));
  const int hidden = panels_of(cell.hidden) * LANES, rank = panels_of(cell.rank) * LANES,
            groups = (samples + MOST - 1) / MOST;
  float* h = thread_scratch(size_t(samples) * (2 * hidden + rank));
  float *c = h + Index(samples) * hidden, *q = c + Index(samples) * hidden;
  std::memset(h, 0, sizeof(float) * samples * 2 * hidden);
  auto each_state = [&](auto copy) {
    for (int i = 0; i < samples; i++) {
      copy(h + Index(i) * hidden, cell.h + Index(first + i) * cell.hidden);
      if (GATES == 4) copy(c + Index(i) * hidden, cell.c + Index(first + i) * cell.hidden);
    }
  };
  const bool turns =
      samples == 1 && size_t(hidden) * rank * (GATES + 1) * sizeof(W) > second_level_bytes() / 4 * 3;
  each_state([&](float* own, float* given) { std::memcpy(own, given, sizeof(float) * cell.hidden); });
  for (int t = 0; t < cell.steps; t++)
    for (int group = 0, i = 0; group < groups; group++) {
      const int mr = (samples - i) / (groups - group);
      const float* pre = cell.pre + t * cell.pre_step + (first + i) * cell.pre_sample;
      float* y = cell.y + t * cell.y_step + (first + i) * cell.y_sample;
      const Step step{cell, pre, q + Index(i) * rank, h + Index(i) * hidden, c + Index(i) * hidden, y, rank,
          hidden, turns && t % 2 == 1};
      if constexpr (MOST >= 6) {
        if (mr == 6) step.run<GATES, W, 6>();
        if (mr == 5) step.run<GATES, W, 5>();
      }
      if constexpr (MOST >= 4) {
        if (mr == 4) step.run<GATES, W, 4>();
        if (mr == 3) step.run<GATES, W, 3>();
      }
      if constexpr (MOST >= 2)
        if (mr == 2) step.run<GATES, W, 2>();
      if (mr == 1) step.run<GATES, W, 1>();
      i += mr;
    }
  each_state([&](float* own, float* given) { std::memcpy(given, own, sizeof(float) * cell.hidden); });
}

template <class W> void run_gates(const tdpass_cell& cell, int first, int samples) {
  if (cell.gates == 4) run_samples<4, W>(cell, first, samples);
  else run_samples<3, W>(cell, first, samples);
}

}  // namespace
}  // namespace tdpass

extern "C" int32_t TDPASS_SYMBOL(tdpass_recurrent)(const tdpass_cell* cell, const tdpass_pool* pool) {
  using namespace tdpass;
  const int tasks = std::min(pool->threads, cell->batch);
  auto task = [&](int k) {
    int low = int(long(cell->batch) * k / tasks), high = int(long(cell->batch) * (k + 1) / tasks);
    if (cell->dtype == TDPASS_BFLOAT16) run_gates<Half>(*cell, low, high - low);
    else run_gates<float>(*cell, low, high - low);
  };
  return run_tasks(pool, tasks, task);
}
