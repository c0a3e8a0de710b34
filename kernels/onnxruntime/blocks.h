// A weight of mostly zeros as the kernels take it, in blocks of the width that is fastest: what
// kernels/blocks.py does.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "../cpu/tdpass.h"

namespace tdpass_ort {

struct Blocks {
  int width = 1, segments = 1;
  std::vector<float> values;
  std::vector<int32_t> index, start, rows;

  int panels() const { return int(rows.size()) / width; }
};

// A matrix `[outputs][inputs]` with blocks of that width; `taps` of its inputs are one channel.
inline Blocks blocks_of(const float* weight, int outputs, int inputs, int taps, int width) {
  constexpr int SEGMENT = 64, FEWEST = 8;
  Blocks made;
  made.width = width;
  auto empty = [&](int row) {
    return std::all_of(
        weight + size_t(row) * inputs, weight + size_t(row + 1) * inputs, [](float w) { return w == 0; });
  };
  for (int row = 0; row < outputs; row++) made.rows.push_back(row);
  if (width > 1)
    std::stable_partition(made.rows.begin(), made.rows.end(), [&](int row) { return !empty(row); });
  made.rows.resize(size_t((outputs + width - 1) / width) * width, -1);
  int size = inputs;
  if (width == 1) {
    const double zeros = double(std::count(weight, weight + size_t(outputs) * inputs, 0.0f)),
                 share = 1 - zeros / (double(outputs) * inputs);
    size = std::max(SEGMENT * std::min(taps, 3), int(std::min<double>(inputs, std::ceil(FEWEST / share))));
  }
  made.segments = (inputs + size - 1) / size;
  made.start.push_back(0);
  for (int segment = 0; segment < made.segments; segment++)
    for (int panel = 0; panel < made.panels(); panel++) {
      for (int k = segment * size; k < std::min(inputs, (segment + 1) * size); k++) {
        float block[16];
        bool any = false;
        for (int i = 0; i < width; i++) {
          const int row = made.rows[size_t(panel) * width + i];
          block[i] = row < 0 ? 0 : weight[size_t(row) * inputs + k];
          any |= block[i] != 0;
        }
        if (!any) continue;
        made.values.insert(made.values.end(), block, block + width);
        made.index.push_back(k);
      }
      made.start.push_back(int32_t(made.index.size()));
    }
  return made;
}

// The weight of a stage in the blocks that take the fewest cycles.
inline Blocks fastest_blocks(const float* weight, const tdpass_stage& t) {
  constexpr struct {
    int width;
    double cycles;  // of a block and 16 positions
  } WIDTHS[] = {{16, 8.8}, {8, 4.6}, {4, 2.5}, {1, 1.1}};
  const int taps = t.kernel[0] * t.kernel[1];
  Blocks best;
  double least = 0;
  for (const auto& each : WIDTHS) {
    Blocks made = blocks_of(weight, t.out, t.in * taps, taps, each.width);
    const double cycles = double(made.index.size()) * each.cycles;
    if (each.width == WIDTHS[0].width || cycles < least) best = std::move(made), least = cycles;
  }
  return best;
}

}  // namespace tdpass_ort
