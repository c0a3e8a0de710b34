// What arguments have to be before a kernel touches memory; the entries refuse everything else.
//
// Limits keep every size that a kernel computes within 32 bits, and every distance within 64.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "limits.h"
#include "tdpass.h"

namespace tdpass {

enum Verdict : int32_t { REFUSED = -1, NOTHING_TO_DO = 0, SERVED = 1 };

constexpr int64_t MOST_POSITIONS = (int64_t(1) << 31) - 1, MOST_CHANNELS = 1 << 24, MOST_REACH = 1 << 20;

inline bool within(int64_t value, int64_t low, int64_t high) { return low <= value && value <= high; }

inline bool has_type(int32_t dtype, const tdpass_activation& activation) {
  return within(dtype, TDPASS_FLOAT32, TDPASS_BFLOAT16) &&
      within(activation.function, TDPASS_IDENTITY, TDPASS_GELU) && activation.low == activation.low &&
      activation.high == activation.high;
}

// The product of sizes; -1 for a negative one, or more than a kernel counts.
inline int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t all = 1;
  for (int64_t size : sizes) {
    if (size < 0) return -1;
    if (all > 0 && size > (int64_t(1) << 62) / all) return -1;
    all *= size;
  }
  return all;
}

inline bool is_image(const tdpass_image* v) {
  if (!v || !within(product({v->size[0], v->size[2], v->size[3]}), 0, MOST_POSITIONS) ||
      !within(v->size[1], 0, MOST_CHANNELS))
    return false;
  return v->data || product({v->size[0], v->size[1], v->size[2], v->size[3]}) == 0;
}

inline bool same_sizes(const tdpass_image& a, const tdpass_image& b) {
  return std::equal(a.size, a.size + 4, b.size);
}

inline bool is_stage(const tdpass_stage& t, int64_t most_taps) {
  if (!within(t.in, 1, MOST_CHANNELS) || !within(t.out, 1, MOST_CHANNELS) ||
      !within(t.groups, 1, std::min(t.in, t.out)))
    return false;
  if (t.in % t.groups || t.out % t.groups || !within(int64_t(t.kernel[0]) * t.kernel[1], 1, most_taps))
    return false;
  for (int a = 0; a < 2; a++) {
    if (!within(t.kernel[a], 1, most_taps) || !within(t.stride[a], 1, MOST_REACH) ||
        !within(t.dilation[a], 1, MOST_REACH))
      return false;
    if (!within(t.before[a], 0, MOST_REACH) || !within(t.after[a], 0, MOST_REACH)) return false;
    if (int64_t(t.kernel[a] - 1) * t.dilation[a] >= MOST_REACH) return false;
  }
  return true;
}

// Sizes (height, width) behind a convolution; false where its kernel does not fit in.
inline bool convolve(const tdpass_stage& t, int64_t (&size)[2]) {
  for (int a = 0; a < 2; a++) {
    const int64_t padded = size[a] + t.before[a] + t.after[a],
                  room = padded - int64_t(t.kernel[a] - 1) * t.dilation[a] - 1;
    if (room < 0 || padded > MOST_POSITIONS / 2) return false;
    size[a] = room / t.stride[a] + 1;
  }
  return true;
}

// What becomes of an image that these stages turn into another.
inline Verdict check_images(const tdpass_image& x, const tdpass_image& y, const tdpass_image* residual,
    const tdpass_stage* stages, int count) {
  if (x.size[1] != stages[0].in || y.size[1] != stages[count - 1].out || y.size[0] != x.size[0])
    return REFUSED;
  if (residual && (!is_image(residual) || !same_sizes(*residual, y))) return REFUSED;
  if (product({y.size[0], y.size[2], y.size[3]}) == 0) return NOTHING_TO_DO;
  int64_t size[2] = {x.size[2], x.size[3]};
  for (int s = 0; s < count; s++)
    if (!convolve(stages[s], size)) return REFUSED;
  return x.size[2] > 0 && x.size[3] > 0 && y.size[2] == size[0] && y.size[3] == size[1] ? SERVED : REFUSED;
}

inline Verdict check_chain(const tdpass_chain* chain, const tdpass_image* x, const tdpass_image* y) {
  if (!is_image(x) || !is_image(y) || !within(chain->stages, 1, MAX_STAGES) || !chain->stage ||
      !chain->weights)
    return REFUSED;
  int64_t steps[2] = {1, 1};
  for (int s = 0; s < chain->stages; s++) {
    const tdpass_stage& t = chain->stage[s];
    if (!is_stage(t, MAX_TAPS) || !chain->weights[s] || (s > 0 && chain->stage[s - 1].out != t.in))
      return REFUSED;
    for (int a = 0; a < 2; a++)
      if ((steps[a] *= t.stride[a]) > MOST_REACH) return REFUSED;
  }
  return check_images(*x, *y, chain->residual, chain->stage, chain->stages);
}

inline Verdict check(const tdpass_chain* chain, const tdpass_image* x, const tdpass_image* y) {
  if (!chain || !has_type(chain->dtype, chain->activation) ||
      !within(chain->lanes, TDPASS_CHANNEL_LANES, TDPASS_PAIR_LANES))
    return REFUSED;
  return check_chain(chain, x, y);
}

inline bool is_grid(const tdpass_grid& grid) {
  return grid.scale >= 0 && grid.scale <= FLT_MAX && within(grid.zero, 0, 255);
}

// Whether a stage may read positions on grids of their own.
inline bool is_pointwise(const tdpass_stage& t) {
  return t.kernel[0] == 1 && t.kernel[1] == 1 && !t.before[0] && !t.before[1] && !t.after[0] && !t.after[1];
}

inline Verdict check(const tdpass_int8_chain* given, const tdpass_image* x, const tdpass_image* y) {
  if (!given || !given->scales || !given->totals || !given->grids) return REFUSED;
  const tdpass_chain* chain = &given->chain;
  const int32_t floats = chain->dtype == TDPASS_UINT8 ? int32_t(TDPASS_FLOAT32) : chain->dtype;
  if (!has_type(floats, chain->activation) || chain->lanes != TDPASS_QUAD_LANES) return REFUSED;
  const Verdict verdict = check_chain(chain, x, y);
  if (verdict == REFUSED || (chain->dtype == TDPASS_UINT8 && !(given->grids[0].scale > 0))) return REFUSED;
  for (int s = 0; s < chain->stages + 2; s++)
    if (!is_grid(given->grids[s])) return REFUSED;
  for (int s = 0; s < chain->stages; s++) {
    const tdpass_stage& t = chain->stage[s];
    if (!given->scales[s] || !given->totals[s] || !(given->grids[s].scale > 0 || is_pointwise(t)))
      return REFUSED;
    if (product({t.in / t.groups, t.kernel[0], t.kernel[1]}) > MOST_PRODUCTS) return REFUSED;
  }
  return verdict;
}

inline bool is_rows(const tdpass_rows* v) {
  if (!v || !within(v->rows, 0, MOST_POSITIONS) || !within(v->channels, 1, MOST_CHANNELS) ||
      (v->rows > 1 && v->stride < v->channels))
    return false;
  return v->data || v->rows == 0;
}

inline Verdict check(const tdpass_program* program, const tdpass_rows* x, const tdpass_rows* y) {
  if (!program || !is_rows(x) || !is_rows(y) || x->rows != y->rows ||
      !has_type(program->dtype, program->activation))
    return REFUSED;
  if (!within(program->steps, 1, MAX_STEPS) || !program->step || !program->weights) return REFUSED;
  int64_t size = x->channels;
  for (int s = 0; s < program->steps; s++) {
    const tdpass_step& t = program->step[s];
    if (std::min({t.a, t.k, t.b, t.o, t.r}) < 1 || !within(t.batched, 0, 1) || !program->weights[s] ||
        size != product({t.a, t.k, t.b}))
      return REFUSED;
    int seen = 0;
    for (int axis : t.order) seen |= within(axis, 0, 3) ? 1 << axis : 0;
    size = product({t.a, t.o, t.r, t.b});
    if (seen != 15 || !within(size, 1, MOST_CHANNELS)) return REFUSED;
  }
  const tdpass_rows* residual = program->residual;
  if (size != y->channels ||
      (residual && (!is_rows(residual) || residual->rows != y->rows || residual->channels != y->channels)))
    return REFUSED;
  return y->rows ? SERVED : NOTHING_TO_DO;
}

inline bool is_matrix(const tdpass_matrix& m) {
  if (!m.codes || !within(m.kind, TDPASS_FLOATS, TDPASS_FLOAT8) || !within(m.in, 1, MOST_CHANNELS) ||
      !within(m.out, 1, MOST_CHANNELS))
    return false;
  if (m.kind <= TDPASS_HALVES) return m.groups == 0;
  return m.scales && (m.groups == 1 || (m.groups > 1 && m.in % (int64_t(m.groups) * 8) == 0));
}

inline Verdict check(const tdpass_weight_only* layer, const tdpass_rows* x, const tdpass_rows* y) {
  if (!layer || !is_rows(x) || !is_rows(y) || x->rows != y->rows ||
      !has_type(layer->dtype, layer->activation))
    return REFUSED;
  if ((layer->matrices != 1 && layer->matrices != 3) || !layer->matrix) return REFUSED;
  const tdpass_matrix* m = layer->matrix;
  for (int k = 0; k < layer->matrices; k++)
    if (!is_matrix(m[k])) return REFUSED;
  if (m[0].in != x->channels || m[0].out != y->channels) return REFUSED;
  if (layer->matrices == 3 && (m[1].in != x->channels || m[2].in != m[1].out || m[2].out != y->channels))
    return REFUSED;
  const tdpass_rows* residual = layer->residual;
  if (residual && (!is_rows(residual) || residual->rows != y->rows || residual->channels != y->channels))
    return REFUSED;
  return y->rows ? SERVED : NOTHING_TO_DO;
}

// Whether blocks lie where the panels and segments say, and every output is made exactly once.
inline bool are_blocks(const tdpass_sparse& w) {
  const int64_t places = int64_t(w.panels) * w.segments,
                inputs = int64_t(w.shape.in) * w.shape.kernel[0] * w.shape.kernel[1],
                rows = int64_t(w.panels) * w.width;
  if (!w.start || !w.rows || (w.blocks && (!w.index || !w.values)) || w.start[0] != 0 ||
      w.start[places] != w.blocks)
    return false;
  bool right = true;
  for (int64_t k = 0; k < places; k++) right &= w.start[k] <= w.start[k + 1];
  for (int64_t e = 0; e < w.blocks; e++) right &= w.index[e] >= 0 && w.index[e] < inputs;
  std::vector<char> made(size_t(w.shape.out));
  int64_t count = 0;
  for (int64_t k = 0; k < rows && right; k++) {
    const int32_t row = w.rows[k];
    if (row == -1) continue;
    right = within(row, 0, w.shape.out - 1) && !made[size_t(row)];
    if (right) made[size_t(row)] = 1, count++;
  }
  return right && count == w.shape.out;
}

// Whether there is no thin product, or one whose panels can be counted.
inline bool is_thin(const tdpass_sparse& w) {
  const int64_t inputs = product({w.shape.in, w.shape.kernel[0], w.shape.kernel[1]}),
                rows = product({w.panels, w.width});
  return w.rank == 0 ||
      (within(w.rank, 1, MOST_CHANNELS) && w.v && w.u &&
          product({w.rank + 8, std::max(inputs, rows) + 8}) <= MOST_POSITIONS);
}

inline Verdict check(const tdpass_sparse* w, const tdpass_image* x, const tdpass_image* y) {
  if (!w || !is_image(x) || !is_image(y) || !has_type(w->dtype, w->activation)) return REFUSED;
  if (!within(w->width, 1, 16) || !within(w->panels, 1, MOST_CHANNELS) ||
      !within(w->segments, 1, MOST_CHANNELS) || w->blocks < 0)
    return REFUSED;
  if (!is_stage(w->shape, MOST_REACH) || w->shape.groups != 1 ||
      int64_t(w->shape.stride[0]) * w->shape.stride[1] > MAX_PHASES || !is_thin(*w) || !are_blocks(*w))
    return REFUSED;
  return check_images(*x, *y, w->residual, &w->shape, 1);
}

inline Verdict check(const tdpass_levels* layer, const tdpass_image* x, const tdpass_image* y) {
  if (!layer || !is_image(x) || !is_image(y) || !has_type(layer->dtype, layer->activation) ||
      !within(layer->levels, 1, 256) || !layer->codes || !layer->table)
    return REFUSED;
  if (!is_stage(layer->shape, MAX_TAPS) || layer->shape.groups != 1) return REFUSED;
  return check_images(*x, *y, layer->residual, &layer->shape, 1);
}

inline Verdict check_cell(const tdpass_cell* cell) {
  if (!cell || !within(cell->gates, 3, 4) || cell->steps < 0 || cell->batch < 0 ||
      !within(cell->hidden, 1, MOST_CHANNELS) || !within(cell->rank, 1, MOST_CHANNELS))
    return REFUSED;
  if (cell->steps == 0 || cell->batch == 0) return NOTHING_TO_DO;
  return cell->pre && cell->h && cell->y && (cell->c || cell->gates == 3) ? SERVED : REFUSED;
}

inline Verdict check(const tdpass_cell* cell) {
  const Verdict verdict = check_cell(cell);
  if (verdict == REFUSED || !within(cell->dtype, TDPASS_FLOAT32, TDPASS_BFLOAT16)) return REFUSED;
  return verdict == NOTHING_TO_DO || (cell->v && cell->u) ? verdict : REFUSED;
}

inline Verdict check(const tdpass_int8_cell* whole) {
  const Verdict verdict = whole ? check_cell(&whole->cell) : REFUSED;
  if (verdict == REFUSED || std::max(whole->cell.hidden, whole->cell.rank) > MOST_PRODUCTS) return REFUSED;
  return whole->v && whole->u && whole->v_scale && whole->u_scale && whole->v_total && whole->u_total
      ? verdict
      : REFUSED;
}

}  // namespace tdpass
