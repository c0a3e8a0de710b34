// The C interface of the kernels: plain pointers and sizes, no tensor class; what torch, ONNX Runtime and
// ctypes call.
//
// Every function returns 0, or -1 for arguments that it does not serve, having touched no memory but the
// arguments: sizes that do not fit each other or are beyond its limits, numbers out of range, blocks of a
// sparse weight that lie outside of it (see checks.h), or more working memory than there is.  The caller then
// takes the plain chain.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum tdpass_dtype { TDPASS_FLOAT32 = 0, TDPASS_BFLOAT16 = 1, TDPASS_UINT8 = 2 };
enum tdpass_lanes {
  TDPASS_CHANNEL_LANES = 0,
  TDPASS_PIXEL_LANES = 1,
  TDPASS_PAIR_LANES = 2,
  TDPASS_QUAD_LANES = 3
};

// What a layer ends with; a clamp is `min(max(x, low), high)`, whose ends may be infinite, and no other
// function reads them.
enum tdpass_function { TDPASS_IDENTITY = 0, TDPASS_CLAMP = 1, TDPASS_SILU = 2, TDPASS_GELU = 3 };
typedef struct {
  int32_t function;
  float low, high;
} tdpass_activation;

// Runs `task(argument, k)` for k = 0 .. tasks-1, in any order, on at most `threads` threads.  A null pool
// means OpenMP.
typedef struct {
  void* context;
  int32_t threads;
  void (*run)(void* context, int32_t tasks, void (*task)(void* argument, int32_t index), void* argument);
} tdpass_pool;

// One convolution of a chain; a linear layer is one with a 1x1 kernel.  `out % groups == 0`, `in % groups ==
// 0`.
typedef struct {
  int32_t in, out, groups;
  int32_t kernel[2], stride[2], before[2], after[2],
      dilation[2];  // (height, width); padding before and after
} tdpass_stage;

// A view of `[n, c, h, w]`; strides in elements.
typedef struct {
  void* data;
  int64_t size[4], stride[4];
} tdpass_image;

// Convolutions in a row, then y = activation(result + bias + residual).
// `weights[s]` is packed: channel lanes `[groups][ceil(out/g / 16)][h w][in/g][16]`, or `[ceil(out / 16)][h
// w][16]` where in/g == 1 and out == in > 1; pixel lanes `[groups][ceil(out/g / 8)][in/g][h w][8]`; pair
// lanes, to which x is rounded, of weights of bfloat16,
// `[groups][ceil(out/g / 16)][h w][ceil(in/g / 2)][16][2]`, where in/g == 1 and out == in as channel lanes.
// Missing channels are zero.
typedef struct {
  int32_t dtype, lanes, stages;
  tdpass_activation activation;
  const tdpass_stage* stage;
  const void* const* weights;    // float32 or bfloat16
  const float* bias;             // [out] or null
  const tdpass_image* residual;  // shape of y, or null
} tdpass_chain;

__attribute__((visibility("default"))) int32_t tdpass_conv_chain(
    const tdpass_chain* chain, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool);

// A grid of bytes: a number is `(code - zero) scale`, codes 0 to 255.  A scale of 0 is no grid.
typedef struct {
  float scale;
  int32_t zero;
} tdpass_grid;

// The same in whole numbers: `chain.dtype` is that of x, bytes on the grid of the first stage if it is
// TDPASS_UINT8; `chain.lanes` are quads and weights int8, `[groups][ceil(out/g / 16)][h w][ceil(in/g /
// 4)][16][4]`, or `[ceil(out / 16)][h w][16]` where in/g == 1 and out == in > 1.  `scales[s]` and `totals[s]`
// are `[out]`: of a weight, and the sum of its whole numbers.  `grids` are what the stages read, y and the
// residual: `chain.stages + 2` of them.  A stage that reads no grid takes every position on one of its own,
// with scale max |x| / 127, NaN where one of x is, and zero point 128; it has a 1 x 1 kernel and no padding.
// Without a grid y and the residual are of the floating-point type of x, float32 if x is bytes.  Every
// floating-point operation is rounded by itself, codes to nearest, ties to even.
typedef struct {
  tdpass_chain chain;
  const float* const* scales;
  const int32_t* const* totals;
  const tdpass_grid* grids;
} tdpass_int8_chain;

__attribute__((visibility("default"))) int32_t tdpass_conv_chain_int8(
    const tdpass_int8_chain* chain, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool);

// Rows (tokens) of channels that lie together; `stride` in elements.
typedef struct {
  void* data;
  int64_t rows, channels, stride;
} tdpass_rows;

// A step of a tensor chain: the block `[a][k][b]` of a token, times a matrix on its middle axis, gives
// `[a][o][r][b]`.
typedef struct {
  int32_t a, k, b, o, r;
  int32_t batched;   // whether every a has a matrix of its own
  int32_t order[4];  // in which order the axes 0 a, 1 o, 2 r, 3 b of the result are stored, slowest first
} tdpass_step;

// Steps in a row, then y = activation(result + bias + residual); `weights[s]` is `[a if batched][ceil(o r /
// 8)][k][8]`, its rows (o r), missing ones zero.
typedef struct {
  int32_t dtype, steps;
  tdpass_activation activation;
  const tdpass_step* step;
  const float* const* weights;
  const float* bias;            // [channels of y] or null
  const tdpass_rows* residual;  // shape of y, or null
} tdpass_program;

__attribute__((visibility("default"))) int32_t tdpass_tensor_chain(
    const tdpass_program* program, const tdpass_rows* x, const tdpass_rows* y, const tdpass_pool* pool);

// A convolution with a sparse weight S, and the product U V of two thin ones where there is a rank, then
// y = activation((S + U V) x + bias + residual); `shape.groups == 1`.
// Panel p makes the outputs `rows[p width] ..` (-1: none), every output in one of them.  Block e holds
// `width` weights for the input `index[e] = channel * taps + tap`; the blocks of panel p in segment s, a
// range of inputs, are `start[k] .. start[k + 1]` with k = s panels + p.  V is `[ceil(rank / 8)][in
// taps][8]`, U is `[ceil(panels width / 8)][rank][8]`, its rows as `rows` has them, missing ones zero.
typedef struct {
  int32_t dtype, width, panels, segments, blocks;
  tdpass_activation activation;
  tdpass_stage shape;
  const int32_t *start, *index, *rows;
  const float* values;  // [blocks][width]
  int32_t rank;
  const float *v, *u;            // null without a rank
  const float* bias;             // [out] or null
  const tdpass_image* residual;  // shape of y, or null
} tdpass_sparse;

__attribute__((visibility("default"))) int32_t tdpass_sparse_conv(
    const tdpass_sparse* weight, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool);

// A convolution whose weight is `levels` numbers, up to 256, then y = activation(result + bias + residual);
// `shape.groups == 1`.  Codes say which number a weight is, `[ceil(out / 16)][h w in][16]`; of no more than
// 16 levels two to a byte, rows 2 k (the low half) and 2 k + 1 in row k.  Codes beyond the table stand for
// zero.
typedef struct {
  int32_t dtype, levels;
  tdpass_activation activation;
  tdpass_stage shape;
  const uint8_t* codes;
  const float* table;
  const float* bias;             // [out] or null
  const tdpass_image* residual;  // shape of y, or null
} tdpass_levels;

__attribute__((visibility("default"))) int32_t tdpass_level_conv(
    const tdpass_levels* layer, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool);

// A matrix in panels of 16 outputs, missing ones zero.  `codes` are float32, bfloat16, int8 or float8
// (e4m3fn)
// `[ceil(out / 16)][in][16]`, or four bits each,
// `[ceil(out / 16)][ceil(in / 8)][16]` words of 32 bits: input 8 k + j of word k at bits 4 j, in two's
// complement.  `scales` of int8, float8 and four bits are `[ceil(out / 16)][groups][16]`; groups are of one
// size, of a multiple of 8 inputs where there are several. `zeros`, where there are any, lie as the scales do
// and are what codes are counted from: `(code - zero) scale`.
enum tdpass_codes {
  TDPASS_FLOATS = 0,
  TDPASS_HALVES = 1,
  TDPASS_BYTES = 2,
  TDPASS_NIBBLES = 3,
  TDPASS_FLOAT8 = 4
};
typedef struct {
  const void* codes;
  const float* scales;
  int32_t kind, groups, in, out;
  const float* zeros;  // or null; of the first matrix of a layer alone
} tdpass_matrix;

// y = activation(Q x + U V x + bias + residual): matrices Q, or Q, V and U.
typedef struct {
  int32_t dtype, matrices;
  tdpass_activation activation;
  const tdpass_matrix* matrix;
  const float* bias;            // [channels of y] or null
  const tdpass_rows* residual;  // shape of y, or null
} tdpass_weight_only;

__attribute__((visibility("default"))) int32_t tdpass_weight_only_linear(
    const tdpass_weight_only* layer, const tdpass_rows* x, const tdpass_rows* y, const tdpass_pool* pool);

// A sequence through a recurrent cell whose hidden-to-hidden matrix is U V, in torch's order of gates: 4 for
// LSTM (i f g o), 3 for GRU (r z n).  `v` is `[ceil(rank / 16)][hidden][16]`, `u` is `[ceil(hidden /
// 16)][rank][gates][16]`; strides in elements.
typedef struct {
  int32_t gates, steps, batch, hidden, rank;
  int32_t dtype;     // of v and u
  const float* pre;  // [t][n][gates hidden], what the input adds to the gates
  int64_t pre_step, pre_sample;
  const void *v, *u;
  const float* bias;         // [gates hidden], added to U V h, or null
  float *h, *c;              // [n][hidden]: the state, read and written; c of an LSTM only
  float* y;                  // [t][n][hidden]
  int64_t y_step, y_sample;  // a negative step runs backwards in time
} tdpass_cell;

__attribute__((visibility("default"))) int32_t tdpass_recurrent(
    const tdpass_cell* cell, const tdpass_pool* pool);

// The same with U and V in whole numbers, `(totals of) weight scale`: `v` is `[ceil(rank / 16)][ceil(hidden /
// 4)][16][4]`, `u` is
// `[ceil(hidden / 16)][ceil(rank / 4)][gates][16][4]`, int8; v and u of `cell` are not read.  h, and what
// lies between V and U, is put on a grid per sample and step, as in an int8 chain.
typedef struct {
  tdpass_cell cell;
  const int8_t *v, *u;
  const float *v_scale, *u_scale;  // [rank], [gates hidden]
  const int32_t *v_total, *u_total;
} tdpass_int8_cell;

__attribute__((visibility("default"))) int32_t tdpass_recurrent_int8(
    const tdpass_int8_cell* cell, const tdpass_pool* pool);

// The instruction set in use: "amx", "avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2" or "generic";
// TDPASS_ISA chooses a lower one than the machine has, or "amxemulated", which does in C++ what the matrix
// unit of "amx" does.
__attribute__((visibility("default"))) const char* tdpass_isa(void);

#ifdef __cplusplus
}
#endif
