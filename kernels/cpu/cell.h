// What a recurrent cell does with the gates of 16 hidden units: the state and the output never leave
// registers between.
#pragma once
#include "lanes.h"

namespace tdpass {

// LSTM: c = sigmoid(f) c + sigmoid(i) tanh(g), h = sigmoid(o) tanh(c).
static TDPASS_INLINE void update(const Lanes (&own)[4], const Lanes (&pre)[4], float* h, float* c) {
  Lanes state =
      sigmoid(own[1] + pre[1]) * load(c) + sigmoid(own[0] + pre[0]) * hyperbolic_tangent(own[2] + pre[2]);
  store(c, state);
  store(h, sigmoid(own[3] + pre[3]) * hyperbolic_tangent(state));
}
// GRU: h = (1 - z) n + z h with n = tanh(pre_n + sigmoid(r) (U V h + bias)_n).
static TDPASS_INLINE void update(const Lanes (&own)[3], const Lanes (&pre)[3], float* h, float*) {
  Lanes keep = sigmoid(own[1] + pre[1]);
  Lanes fresh = hyperbolic_tangent(pre[2] + sigmoid(own[0] + pre[0]) * own[2]);
  store(h, fresh + keep * (load(h) - fresh));
}

}  // namespace tdpass
