// How much of each a kernel takes.
#pragma once

namespace tdpass {

constexpr int MAX_STAGES = 6, MAX_TAPS = 128;  // of a chain of convolutions
constexpr int MOST_PRODUCTS = 1 << 16;         // of a byte and an int8 in a sum of 32 bits
constexpr int MAX_STEPS = 16;                  // of a chain of tensor products
constexpr int MAX_PHASES = 16;                 // of a sparse convolution: product of its strides

}  // namespace tdpass
