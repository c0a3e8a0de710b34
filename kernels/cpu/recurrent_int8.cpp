// Recurrent cells whose hidden-to-hidden matrix is a product U V of int8 factors, compiled once per
// instruction set.
//
// Both factors stay in the cache as bytes.  The state of a sample is put on a grid at every step, and so is V
// h.
#include "isa.h"

#include "cell.h"
#include "quads.h"
#include "scratch.h"

namespace tdpass {
namespace {

// How many sums of every n-th term hide the latency of a multiply-add.
constexpr int split(int sums) { return sums >= 8 || ACCUMULATORS < 8 ? 1 : sums >= 4 ? 2 : 4; }

// sum[i][g] = sum over quads k of in[i row + 4 k ..] * w[k][g][16][4].
template <int MR, int N>
static TDPASS_INLINE void products(
    const uint8_t* in, Index row, int quads, const int8_t* w, Words (&sum)[MR][N]) {
  constexpr int SPLIT = split(MR * N), QUAD = LANES * Quads::TOGETHER;
  Block part[SPLIT][MR][N];
  auto term = [&](Block(&to)[MR][N], int k) __attribute__((always_inline)) {
    Block b[N];
    TDPASS_UNROLL for (int g = 0; g < N; g++) b[g] = Quads::weights(w + (Index(k) * N + g) * QUAD);
    TDPASS_UNROLL for (int i = 0; i < MR; i++) {
      const Block a = Quads::input(in + i * row + k * Quads::TOGETHER);
      TDPASS_UNROLL for (int g = 0; g < N; g++) to[i][g] = add_products(a, b[g], to[i][g]);
    }
  };
  int k = 0;
  for (; k + SPLIT <= quads; k += SPLIT) TDPASS_UNROLL for (int s = 0; s < SPLIT; s++) term(part[s], k + s);
  for (; k < quads; k++) term(part[0], k);
  TDPASS_UNROLL for (int i = 0; i < MR; i++) TDPASS_UNROLL for (int g = 0; g < N; g++) {
    sum[i][g] = part[0][i][g].words();
    TDPASS_UNROLL for (int s = 1; s < SPLIT; s++) sum[i][g] += part[s][i][g].words();
  }
}

static TDPASS_INLINE Words words_of(const int32_t* p, int count) {
  Words v{};
  std::memcpy(&v, p, sizeof(int32_t) * std::min(count, LANES));
  return v;
}

// Sums as numbers: of outputs with these scales and totals, from codes with zero point 128 and scale `own`.
static TDPASS_INLINE Lanes numbers(
    Words sum, const float* scale, const int32_t* total, int count, float own) {
  const Words whole = sum - MIDDLE_CODE * words_of(total, count);
  return __builtin_convertvector(whole, Lanes) * load_some(scale, count) * own;
}

// Buffers of some samples.
struct Rows {
  float *h, *c, *q;
  uint8_t *h_codes, *q_codes;
  Index hidden, rank;  // a sample to the next, in numbers
  Index h_bytes, q_bytes;
};

template <int GATES> class Cell {
 public:
  Cell(const tdpass_int8_cell& given, int samples) : whole_(given), cell_(given.cell) {
    Rows& r = rows_;
    r.hidden = round_up(cell_.hidden, LANES), r.rank = round_up(cell_.rank, LANES);
    r.h_bytes = round_up(cell_.hidden, 64), r.q_bytes = round_up(cell_.rank, 64);
    const size_t floats = size_t(samples) * (2 * r.hidden + r.rank),
                 bytes = size_t(samples) * (r.h_bytes + r.q_bytes);
    r.h = thread_scratch(floats + bytes / sizeof(float));
    r.c = r.h + samples * r.hidden, r.q = r.c + samples * r.hidden;
    r.h_codes = reinterpret_cast<uint8_t*>(r.q + samples * r.rank),
    r.q_codes = r.h_codes + samples * r.h_bytes;
    std::memset(r.h, 0, sizeof(float) * floats + bytes);
  }

  void run(int first, int samples) {
    constexpr int MOST = std::max(1, std::min(4, ACCUMULATORS / GATES));
    copy(first, samples, [](float* own, float* given, size_t bytes) { std::memcpy(own, given, bytes); });
    for (int t = 0; t < cell_.steps; t++)
      for (int i = 0; i < samples;) {
        const int left = samples - i;
        if constexpr (MOST >= 4)
          if (left >= 4) {
            step<4>(t, first, i), i += 4;
            continue;
          }
        if constexpr (MOST >= 2)
          if (left >= 2) {
            step<2>(t, first, i), i += 2;
            continue;
          }
        step<1>(t, first, i), i += 1;
      }
    copy(first, samples, [](float* own, float* given, size_t bytes) { std::memcpy(given, own, bytes); });
  }

 private:
  template <class Copy> void copy(int first, int samples, const Copy& move) {
    for (int i = 0; i < samples; i++) {
      const Index at = Index(first + i) * cell_.hidden;
      move(rows_.h + i * rows_.hidden, cell_.h + at, sizeof(float) * cell_.hidden);
      if (GATES == 4) move(rows_.c + i * rows_.hidden, cell_.c + at, sizeof(float) * cell_.hidden);
    }
  }

  // q = V h, then gates, state and output of 16 units after another, for MR samples from `i` on.
  template <int MR> __attribute__((noinline)) void step(int t, int first, int i) {
    constexpr int QUAD = LANES * Quads::TOGETHER;
    const Rows& r = rows_;
    const int hidden = cell_.hidden, rank = cell_.rank, deep = (hidden + 3) / 4, thin = (rank + 3) / 4;
    float *h = r.h + i * r.hidden, *c = r.c + i * r.hidden, *q = r.q + i * r.rank;
    uint8_t *h_codes = r.h_codes + i * r.h_bytes, *q_codes = r.q_codes + i * r.q_bytes;
    float own[MR];
    for (int m = 0; m < MR; m++) own[m] = own_grid(h + m * r.hidden, hidden, h_codes + m * r.h_bytes);
    for (int at = 0; at < rank; at += LANES) {
      Words sum[MR][1];
      products<MR, 1>(h_codes, r.h_bytes, deep, whole_.v + Index(at / LANES) * deep * QUAD, sum);
      const int count = std::min(LANES, rank - at);
      TDPASS_UNROLL for (int m = 0; m < MR; m++) store(
          q + m * r.rank + at, numbers(sum[m][0], whole_.v_scale + at, whole_.v_total + at, count, own[m]));
    }
    for (int m = 0; m < MR; m++) own[m] = own_grid(q + m * r.rank, rank, q_codes + m * r.q_bytes);
    const float* pre = cell_.pre + t * cell_.pre_step + (first + i) * cell_.pre_sample;
    float* y = cell_.y + t * cell_.y_step + (first + i) * cell_.y_sample;
    for (int at = 0; at < hidden; at += LANES) {
      Words sum[MR][GATES];
      products<MR, GATES>(q_codes, r.q_bytes, thin, whole_.u + Index(at / LANES) * thin * GATES * QUAD, sum);
      const int count = std::min(LANES, hidden - at);
      TDPASS_UNROLL for (int m = 0; m < MR; m++) {
        Lanes gates[GATES], before[GATES];
        TDPASS_UNROLL for (int g = 0; g < GATES; g++) {
          const int place = g * hidden + at;
          before[g] = load_some(pre + m * cell_.pre_sample + place, count);
          gates[g] = numbers(sum[m][g], whole_.u_scale + place, whole_.u_total + place, count, own[m]);
          if (cell_.bias) gates[g] += load_some(cell_.bias + place, count);
        }
        float* state = h + m * r.hidden + at;
        update(gates, before, state, c + m * r.hidden + at);
        store_some(y + m * cell_.y_sample + at, load(state), count);
      }
    }
  }

  const tdpass_int8_cell& whole_;
  const tdpass_cell& cell_;
  Rows rows_;
};

}  // namespace
}  // namespace tdpass

extern "C" int32_t TDPASS_SYMBOL(tdpass_recurrent_int8)(
    const tdpass_int8_cell* cell, const tdpass_pool* pool) {
  using namespace tdpass;
  const int batch = cell->cell.batch, tasks = std::min(pool->threads, batch);
  auto task = [&](int k) {
    const int low = int(long(batch) * k / tasks), high = int(long(batch) * (k + 1) / tasks);
    if (cell->cell.gates == 4) Cell<4>(*cell, high - low).run(low, high - low);
    else Cell<3>(*cell, high - low).run(low, high - low);
  };
  return run_tasks(pool, tasks, task);
}
