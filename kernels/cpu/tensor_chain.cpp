// Chains of small tensor products (tensor train, tensor ring, block term), compiled once per instruction set.
//
// Sixteen tokens lie in the lanes of a vector, so every value is a block of vectors, and a step is a product
// of scalars with vectors: which axis it contracts costs nothing and nothing is ever permuted.  Where a step
// makes a part `o` of the output that later steps carry along, the chain runs depth first: a few `o` at a
// time through all later steps, out of the cache.
#include "isa.h"

#include "token_lanes.h"
#include "scratch.h"

#include <numeric>
#include <vector>

namespace tdpass {
namespace {

constexpr int PANEL = 8;  // rows of a matrix that lie together, and that a tile has at most
constexpr int MAX_COLUMNS = 6;
constexpr long PART =
    512;  // vectors that the result of a step should not exceed: two thirds of the first-level cache

typedef std::vector<int32_t> Offsets;

// out[row[i] + to[j]] = sum over k of w[8 k + i] * in[from[j] + k stride], for `tiles` times NR columns j.
template <int MR, int NR>
__attribute__((noinline)) void sweep(int tiles, const float* w, int depth, const float* in,
    const int32_t* from, Index stride, float* out, const int32_t* row, const int32_t* to) {
  float* place[MR];
  TDPASS_UNROLL for (int i = 0; i < MR; i++) place[i] = out + Index(row[i]) * LANES;
  for (int tile = 0; tile < tiles; tile++, from += NR, to += NR) {
    Lanes sum[MR][NR];
    const float* at[NR];
    TDPASS_UNROLL for (int j = 0; j < NR; j++) at[j] = in + Index(from[j]) * LANES;
    TDPASS_UNROLL for (int i = 0; i < MR; i++) TDPASS_UNROLL for (int j = 0; j < NR; j++) sum[i][j] = zero();
    const float* a = w;
    for (Index k = 0, offset = 0; k < depth; k++, offset += stride, a += PANEL) {
      Lanes v[NR];
      TDPASS_UNROLL for (int j = 0; j < NR; j++) v[j] = load(at[j] + offset);
      TDPASS_UNROLL for (int i = 0; i < MR; i++) {
        Lanes b = broadcast(a[i]);
        TDPASS_UNROLL for (int j = 0; j < NR; j++) sum[i][j] += b * v[j];
      }
    }
    Index column[NR];
    TDPASS_UNROLL for (int j = 0; j < NR; j++) column[j] = Index(to[j]) * LANES;
    TDPASS_UNROLL for (int i = 0; i < MR; i++) TDPASS_UNROLL for (int j = 0; j < NR; j++)
        store(place[i] + column[j], sum[i][j]);
  }
}

typedef void (*Tile)(
    int, const float*, int, const float*, const int32_t*, Index, float*, const int32_t*, const int32_t*);

template <int MR, int NR> constexpr Tile tile_or_null() {
  if constexpr (MR * NR <= ACCUMULATORS) return &sweep<MR, NR>;
  else return nullptr;
}
template <int MR> struct TileRow {
  static constexpr Tile by_columns[MAX_COLUMNS] = {tile_or_null<MR, 1>(), tile_or_null<MR, 2>(),
      tile_or_null<MR, 3>(), tile_or_null<MR, 4>(), tile_or_null<MR, 5>(), tile_or_null<MR, 6>()};
};
constexpr const Tile* TILES[PANEL + 1] = {nullptr, TileRow<1>::by_columns, TileRow<2>::by_columns,
    TileRow<3>::by_columns, TileRow<4>::by_columns, TileRow<5>::by_columns, TileRow<6>::by_columns,
    TileRow<7>::by_columns, TileRow<8>::by_columns};

// How many columns a tile of that many rows has, for the fewest cycles: two multiply-adds or two loads each,
// four cycles latency. Where the registers do not hold a tile of one column, its rows are done in parts.
static int tile_columns(int rows, int columns) {
  double best = 1e30;
  int found = 1;
  for (int nr = 1; nr <= std::min(MAX_COLUMNS, columns) && rows * nr <= ACCUMULATORS; nr++) {
    auto cycles = [&](int n) { return std::max({rows * n / 2.0, (rows + n) / 2.0, 4.0}); };
    double all = cycles(nr) * (columns / nr) + (columns % nr ? cycles(columns % nr) : 0);
    if (all < best * 0.999) best = all, found = nr;
  }
  return found;
}

// A step as it runs: on `b` of its columns, `o` at a time.
struct Work {
  const tdpass_step* step;
  const float* weights;
  int chunk;         // how many o at a time
  float* out;        // of one chunk; the last step writes the whole result
  int o = 0, b = 0;  // what the tables below were made for
  Offsets from, to, row;

  // Distance of neighbours along a, o, r and b in a result of those sizes.
  void strides(int o_size, int b_size, Index (&stride)[4]) const {
    const int size[4] = {step->a, o_size, step->r, b_size};
    Index next = 1;
    for (int axis = 3; axis >= 0; axis--) stride[step->order[axis]] = next, next *= size[step->order[axis]];
  }
  bool carries() const { return step->order[2] == 1 && step->order[3] == 3; }
};

class Program {
 public:
  Program(const tdpass_program& program, int inputs, int outputs)
      : count(program.steps), inputs_(inputs), outputs_(outputs), works_(program.steps) {
    for (int s = 0; s < count; s++) works_[s].step = program.step + s, works_[s].weights = program.weights[s];
    split();
  }

  // x and y of 16 tokens as vectors; the memory of all steps is one block.
  float *x, *y;

  void bind() {
    size_t total = inputs_ + outputs_;
    for (const Work& work : works_) total += result(work);
    x = thread_scratch(total * LANES);
    y = x + Index(inputs_) * LANES;
    float* at = y + Index(outputs_) * LANES;
    for (Work& work : works_) work.out = at, at += result(work) * LANES;
    works_.back().out = y;
  }

  void run() {
    Offsets all(works_[0].step->b);
    for (size_t i = 0; i < all.size(); i++) all[i] = int32_t(i);
    run(0, x, all);
  }

  const int count;

 private:
  // Vectors a chunk of that step makes.
  size_t result(const Work& work) const {
    return &work == &works_.back() ? 0 : size_t(work.step->a) * work.step->r * work.chunk * columns(work);
  }
  int columns(const Work& work) const {
    int b = works_[0].step->b;
    for (const Work& before : works_) {
      if (&before == &work) return b;
      b = before.carries() && (&before)[1].step->b == before.step->o * before.step->b ? before.chunk * b
                                                                                      : (&before)[1].step->b;
    }
    return b;
  }

  // A step may be cut along o only where all later ones carry those columns to the end, and between panels of
  // its matrix.
  void split() {
    int free_from = count - 1;
    while (free_from > 0) {
      const Work& work = works_[free_from - 1];
      if (!work.carries() || work.step[1].b != work.step->o * work.step->b) break;
      free_from--;
    }
    for (int s = 0; s < count; s++) {
      Work& work = works_[s];
      const tdpass_step& t = *work.step;
      work.chunk = t.o;
      if (s < free_from || s + 1 == count) continue;
      long per_o = long(t.a) * t.r * columns(work), fewest = PANEL / std::gcd(PANEL, t.r);
      long chunk = std::min<long>(t.o, std::max(fewest, PART / per_o / fewest * fewest)),
           parts = (t.o + chunk - 1) / chunk, even = (t.o + parts - 1) / parts;
      work.chunk = int(std::min<long>(t.o, (even + fewest - 1) / fewest * fewest));
    }
  }

  // `places[b]`: which column of the whole step column b is.
  void run(int s, const float* in, const Offsets& places) {
    Work& work = works_[s];
    const tdpass_step& t = *work.step;
    const int b = int(places.size());
    if (s + 1 == count) {
      Index stride[4];
      work.strides(t.o, t.b, stride);
      tables(work, t.o, b, stride);
      for (int a = 0; a < t.a; a++)
        for (int i = 0; i < b; i++) work.to[a * b + i] = int32_t(a * stride[0] + places[i] * stride[3]);
      multiply(work, in, 0, t.o, b);
      return;
    }
    bool carried = work.carries() && work.step[1].b == t.o * t.b;
    Offsets next;
    for (int low = 0; low < t.o; low += work.chunk) {
      int o = std::min(work.chunk, t.o - low);
      if (work.o != o || work.b != b) {
        Index stride[4];
        work.strides(o, b, stride);
        tables(work, o, b, stride);
      }
      multiply(work, in, low, o, b);
      next.resize(carried ? o * b : work.step[1].b);
      for (size_t i = 0; i < next.size(); i++)
        next[i] = carried ? (low + int32_t(i) / b) * t.b + places[i % b] : int32_t(i);
      run(s + 1, work.out, next);
    }
  }

  void tables(Work& work, int o, int b, const Index (&stride)[4]) {
    const tdpass_step& t = *work.step;
    work.o = o, work.b = b;
    work.from.resize(t.a * b), work.to.resize(t.a * b), work.row.resize(o * t.r);
    for (int a = 0; a < t.a; a++)
      for (int i = 0; i < b; i++) {
        work.from[a * b + i] = int32_t(Index(a) * t.k * b + i);
        work.to[a * b + i] = int32_t(a * stride[0] + i * stride[3]);
      }
    for (int p = 0; p < o; p++)
      for (int q = 0; q < t.r; q++) work.row[p * t.r + q] = int32_t(p * stride[1] + q * stride[2]);
  }

  // Rows `low r` .. `(low + o) r` of the matrix times all columns.
  void multiply(const Work& work, const float* in, int low, int o, int b) {
    const tdpass_step& t = *work.step;
    const int batches = t.batched ? t.a : 1, columns = t.a / batches * b, rows = o * t.r,
              panels = (t.o * t.r + PANEL - 1) / PANEL;
    const Index stride = Index(b) * LANES, panel = Index(t.k) * PANEL;
    for (int batch = 0; batch < batches; batch++) {
      const float* w = work.weights + (Index(batch) * panels + low * t.r / PANEL) * panel;
      const int32_t *from = work.from.data() + batch * columns, *to = work.to.data() + batch * columns;
      for (int i = 0; i < rows; i += PANEL, w += panel) {
        const int height = std::min(PANEL, rows - i), most = std::min(height, ACCUMULATORS);
        for (int part = 0; part < height; part += most) {
          const int mr = std::min(most, height - part), nr = tile_columns(mr, columns), rest = columns % nr;
          const int32_t* row = work.row.data() + i + part;
          TILES[mr][nr - 1](columns / nr, w + part, t.k, in, from, stride, work.out, row, to);
          if (rest)
            TILES[mr][rest - 1](
                1, w + part, t.k, in, from + columns - rest, stride, work.out, row, to + columns - rest);
        }
      }
    }
  }

  const int inputs_, outputs_;
  std::vector<Work> works_;
};

template <class T>
int run_tokens(
    const tdpass_program& program, const tdpass_rows& x, const tdpass_rows& y, const tdpass_pool* pool) {
  const long blocks = (x.rows + LANES - 1) / LANES;
  const int tasks = int(std::min<long>(pool->threads, blocks));
  const tdpass_rows* residual = program.residual;
  auto task = [&](int k) {
    Program engine(program, int(x.channels), int(y.channels));
    engine.bind();
    for (long block = blocks * k / tasks; block < blocks * (k + 1) / tasks; block++) {
      const long first = block * LANES;
      const int tokens = int(std::min<long>(LANES, x.rows - first));
      turn_in(static_cast<const T*>(x.data) + first * x.stride, x.stride, tokens, int(x.channels), engine.x,
          LANES, true);
      engine.run();
      for (int c = 0; c < y.channels; c += LANES) {
        Epilogue end{program.bias ? program.bias + c : nullptr, program.activation};
        const T* rest =
            residual ? static_cast<const T*>(residual->data) + first * residual->stride + c : nullptr;
        turn_out(engine.y + Index(c) * LANES, LANES, tokens, int(std::min<long>(LANES, y.channels - c)), end,
            static_cast<T*>(y.data) + first * y.stride + c, y.stride, rest, residual ? residual->stride : 0);
      }
    }
  };
  return run_tasks(pool, tasks, task);
}

}  // namespace
}  // namespace tdpass

extern "C" int32_t TDPASS_SYMBOL(tdpass_tensor_chain)(
    const tdpass_program* program, const tdpass_rows* x, const tdpass_rows* y, const tdpass_pool* pool) {
  using namespace tdpass;
  return program->dtype == TDPASS_BFLOAT16 ? run_tokens<Half>(*program, *x, *y, pool)
                                           : run_tokens<float>(*program, *x, *y, pool);
}
