// The C interface of the kernels: plain pointers and sizes, no tensor class; what torch, ONNX Runtime and ctypes call.
//
// Every function returns 0, or -1 for arguments that it does not serve, having touched no memory but the arguments: sizes that do not
// fit each other or are beyond its limits, numbers out of range, blocks of a sparse weight that lie outside of it (see checks.h), or
// more working memory than there is.  The caller then takes the plain chain.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum tdpass_dtype { TDPASS_FLOAT32 = 0, TDPASS_BFLOAT16 = 1 };
enum tdpass_activation { TDPASS_IDENTITY = 0, TDPASS_RELU = 1, TDPASS_SILU = 2, TDPASS_GELU = 3 };
enum tdpass_lanes { TDPASS_CHANNEL_LANES = 0, TDPASS_PIXEL_LANES = 1, TDPASS_PAIR_LANES = 2 };

// Runs `task(argument, k)` for k = 0 .. tasks-1, in any order, on at most `threads` threads.  A null pool means OpenMP.
typedef struct {
  void* context;
  int32_t threads;
  void (*run)(void* context, int32_t tasks, void (*task)(void* argument, int32_t index), void* argument);
} tdpass_pool;

// One convolution of a chain; a linear layer is one with a 1x1 kernel.  `out % groups == 0`, `in % groups == 0`.
typedef struct {
  int32_t in, out, groups;
  int32_t kernel[2], stride[2], before[2], after[2], dilation[2];  // (height, width); padding before and after
} tdpass_stage;

// A view of `[n, c, h, w]`; strides in elements.
typedef struct {
  void* data;
  int64_t size[4], stride[4];
} tdpass_image;

// Convolutions in a row, then y = activation(result + bias + residual).
// `weights[s]` is packed: channel lanes `[groups][ceil(out/g / 16)][h w][in/g][16]`, or `[ceil(out / 16)][h w][16]` where in/g == 1
// and out == in > 1; pixel lanes `[groups][ceil(out/g / 8)][in/g][h w][8]`; pair lanes, for bfloat16 alone and weights of that type,
// `[groups][ceil(out/g / 16)][h w][ceil(in/g / 2)][16][2]`, where in/g == 1 and out == in as channel lanes.  Missing channels are zero.
typedef struct {
  int32_t dtype, lanes, activation, stages;
  const tdpass_stage* stage;
  const void* const* weights;    // float32 or bfloat16
  const float* bias;             // [out] or null
  const tdpass_image* residual;  // shape of y, or null
} tdpass_chain;

__attribute__((visibility("default"))) int32_t tdpass_conv_chain(const tdpass_chain* chain, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool);

// Rows (tokens) of channels that lie together; `stride` in elements.
typedef struct {
  void* data;
  int64_t rows, channels, stride;
} tdpass_rows;

// A step of a tensor chain: the block `[a][k][b]` of a token, times a matrix on its middle axis, gives `[a][o][r][b]`.
typedef struct {
  int32_t a, k, b, o, r;
  int32_t batched;   // whether every a has a matrix of its own
  int32_t order[4];  // in which order the axes 0 a, 1 o, 2 r, 3 b of the result are stored, slowest first
} tdpass_step;

// Steps in a row, then y = activation(result + bias + residual); `weights[s]` is `[a if batched][ceil(o r / 8)][k][8]`,
// its rows (o r), missing ones zero.
typedef struct {
  int32_t dtype, activation, steps;
  const tdpass_step* step;
  const float* const* weights;
  const float* bias;            // [channels of y] or null
  const tdpass_rows* residual;  // shape of y, or null
} tdpass_program;

__attribute__((visibility("default"))) int32_t tdpass_tensor_chain(const tdpass_program* program, const tdpass_rows* x, const tdpass_rows* y, const tdpass_pool* pool);

// A convolution with a sparse weight, then y = activation(result + bias + residual); `shape.groups == 1`.
// Panel p makes the outputs `rows[p width] ..` (-1: none), every output in one of them.  Block e holds `width` weights for the input `index[e] = channel * taps +
// tap`; the blocks of panel p in segment s, a range of inputs, are `start[k] .. start[k + 1]` with k = s panels + p.
typedef struct {
  int32_t dtype, activation, width, panels, segments, blocks;
  tdpass_stage shape;
  const int32_t *start, *index, *rows;
  const float* values;           // [blocks][width]
  const float* bias;             // [out] or null
  const tdpass_image* residual;  // shape of y, or null
} tdpass_sparse;

__attribute__((visibility("default"))) int32_t tdpass_sparse_conv(const tdpass_sparse* weight, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool);

// A sequence through a recurrent cell whose hidden-to-hidden matrix is U V, in torch's order of gates: 4 for LSTM (i f g o), 3 for
// GRU (r z n).  `v` is `[ceil(rank / 16)][hidden][16]`, `u` is `[ceil(hidden / 16)][rank][gates][16]`; strides in elements.
typedef struct {
  int32_t gates, steps, batch, hidden, rank;
  const float* pre;  // [t][n][gates hidden], what the input adds to the gates
  int64_t pre_step, pre_sample;
  const float *v, *u;
  const float* bias;          // [gates hidden], added to U V h, or null
  float *h, *c;               // [n][hidden]: the state, read and written; c of an LSTM only
  float* y;                   // [t][n][hidden]
  int64_t y_step, y_sample;   // a negative step runs backwards in time
} tdpass_cell;

__attribute__((visibility("default"))) int32_t tdpass_recurrent(const tdpass_cell* cell, const tdpass_pool* pool);

// The instruction set in use: "avx512bf16", "avx512", "avx2" or "generic"; TDPASS_ISA chooses a lower one than the machine has.
__attribute__((visibility("default"))) const char* tdpass_isa(void);

#ifdef __cplusplus
}
#endif
