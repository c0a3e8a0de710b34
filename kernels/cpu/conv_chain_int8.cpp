// The fused chain of convolutions in whole numbers, compiled once per instruction set.
#include "isa.h"

#include "chain_runner.h"
#include "quad_lanes.h"

extern "C" int32_t TDPASS_SYMBOL(tdpass_conv_chain_int8)(
    const tdpass_int8_chain* chain, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool) {
  using namespace tdpass;
  const int stages = chain->chain.stages;
  const Grid grid(chain->grids[stages]), residual_grid(chain->grids[stages + 1]);
  const int floats = chain->chain.dtype == TDPASS_BFLOAT16 ? 2 : 4;
  const ItemSizes sizes{
      chain->chain.dtype == TDPASS_UINT8 ? 1 : floats, grid ? 1 : floats, residual_grid ? 1 : floats};
  return in_pieces(chain->chain, *x, *y, pool, sizes,
      [&](const tdpass_image& xs, const tdpass_image& ys, const tdpass_image* residual) {
        tdpass_int8_chain part = *chain;
        part.chain.residual = residual;
        const Int8Geometry geometry(part, xs);
        OutputTo<true> output(part.chain, ys, grid, residual_grid);
        return run<QuadLanes>(geometry, xs, output, pool, 1);
      });
}
