// Panels of blocks of weights applied to vectors of positions: what a sparse kernel spends its time in.
#pragma once
#include "lanes.h"

namespace tdpass {

constexpr int MAX_VECTORS = 8;

// Panels of blocks and where they are applied.
struct Walk {
  const float* values;
  const int32_t *index, *start;
  int panels;
  const int32_t* offset;
  const float* in;
  float* out;
  Index pitch;
  bool add;
  bool full = false;  // whether every panel has a block for each input, whose indices are then given once
};

// out[(panel WIDTH + i) pitch + p] = or, if `add`, += sum over blocks e of values[e WIDTH + i] *
// in[offset[index[e]] + p] (of a full panel, index[e - start[panel]]), MB outputs i and NV vectors of p at a
// time.
template <int WIDTH, int MB, int NV> static __attribute__((noinline)) void walk(const Walk& given) {
  const Walk w = given;
  for (int panel = 0; panel < w.panels; panel++) {
    const int32_t begin = w.start[panel], end = w.start[panel + 1];
    if (w.add && begin == end) continue;
    for (int first = 0; first < WIDTH; first += MB) {
      float* out = w.out + (Index(panel) * WIDTH + first) * w.pitch;
      const float* value = w.values + Index(begin) * WIDTH + first;
      Lanes sum[MB][NV];
      if (w.add) {
        TDPASS_UNROLL for (int i = 0; i < MB; i++) TDPASS_UNROLL for (int j = 0; j < NV; j++) sum[i][j] =
            load(out + i * w.pitch + j * LANES);
      } else {
        TDPASS_UNROLL for (int i = 0; i < MB; i++) TDPASS_UNROLL for (int j = 0; j < NV; j++) sum[i][j] =
            zero();
      }
      const int32_t* index = w.full ? w.index : w.index + begin;
      for (int32_t e = begin; e < end; e++, index++, value += WIDTH) {
        const float* from = w.in + w.offset[*index];
        Lanes v[NV];
        TDPASS_UNROLL for (int j = 0; j < NV; j++) v[j] = load(from + j * LANES);
        TDPASS_UNROLL for (int i = 0; i < MB; i++) {
          Lanes a = broadcast(value[i]);
          TDPASS_UNROLL for (int j = 0; j < NV; j++) sum[i][j] += a * v[j];
        }
      }
      TDPASS_UNROLL for (int i = 0; i < MB; i++) TDPASS_UNROLL for (int j = 0; j < NV; j++)
          store(out + i * w.pitch + j * LANES, sum[i][j]);
    }
  }
}

typedef void (*Walker)(const Walk&);

// How many outputs and vectors the registers hold for blocks of that width, and the walk for every number of
// vectors.
template <int WIDTH> struct Walks {
  static constexpr int FULL = WIDTH < 8 ? WIDTH : 8;
  static constexpr int MB = ACCUMULATORS >= 3 * FULL ? FULL : WIDTH < 2 ? 1 : ACCUMULATORS >= 6 ? 2 : 1;
  static constexpr int MOST = ACCUMULATORS / MB < MAX_VECTORS ? ACCUMULATORS / MB : MAX_VECTORS;
  template <int NV> static constexpr Walker walk_or_null() {
    if constexpr (NV <= MOST) return &walk<WIDTH, MB, NV>;
    else return nullptr;
  }
  static constexpr Walker by_vectors[MAX_VECTORS] = {walk_or_null<1>(), walk_or_null<2>(), walk_or_null<3>(),
      walk_or_null<4>(), walk_or_null<5>(), walk_or_null<6>(), walk_or_null<7>(), walk_or_null<8>()};
};

// The walk of blocks of one width, for every number of vectors.
struct Kernel {
  const Walker* by_vectors;
  int most;
};

inline bool choose(int width, Kernel& kernel) {
  switch (width) {
    case 1: kernel = {Walks<1>::by_vectors, Walks<1>::MOST}; return true;
    case 4: kernel = {Walks<4>::by_vectors, Walks<4>::MOST}; return true;
    case 8: kernel = {Walks<8>::by_vectors, Walks<8>::MOST}; return true;
    case 16: kernel = {Walks<16>::by_vectors, Walks<16>::MOST}; return true;
    default: return false;
  }
}

}  // namespace tdpass
