// [Bfloat16|Int8|WeightOnly]LowRankLstm[Reverse], [...]LowRankGru[Reverse]: a sequence through a cell whose
// hidden-to-hidden matrix is a product.
//
// Inputs: pre `[t, n, gates hidden]`, what the input adds to the gates, in torch's order; v `[hidden, r]` and
// u `[r, gates hidden]`, of which the hidden state is multiplied with one after the other, with Bfloat16
// of that, with Int8 and WeightOnly each of int8 and followed by its scales, one per column; a bias `[gates
// hidden]`, added to that product; the states h and, of an LSTM, c, `[n, hidden]`.  Outputs: all hidden
// states, and the last of every state.  Int8 rounds what the factors read as well; Reverse goes from the last
// step to the first. Factors and bias are constants.
#include "../cpu/checks.h"
#include "operator.h"
#include "packed.h"

namespace tdpass_ort {
namespace {

constexpr int64_t PANEL = 16, QUAD = 4;

enum Numbers { FLOATS, HALVES, WEIGHT_ONLY, WHOLE };

// Whether every factor is followed by its scales.
constexpr bool scaled(Numbers numbers) { return numbers == WEIGHT_ONLY || numbers == WHOLE; }

struct CellOperator : Operator {
  Numbers numbers;
  int gates;
  bool reverse;
};

struct Factor {
  Panels packed;
  std::vector<float> scale;
  std::vector<int32_t> total;
};

class Recurrent : public Node {
 public:
  Recurrent(const CellOperator& op, const ort::Api* api, const ort::KernelInfo* info)
      : Node(op, api), cell_(op) {
    const bool scales = scaled(op.numbers);
    const Tensor v = required(info, 1), u = required(info, scales ? 3 : 2),
                 bias = required(info, scales ? 5 : 3);
    if (v.sizes.size() != 2 || u.sizes.size() != 2 || v.count() == 0) refuse(op, "the factors are matrices");
    hidden_ = v.sizes[0], rank_ = v.sizes[1];
    const bool fits = u.sizes == Sizes{rank_, op.gates * hidden_} && bias.sizes == Sizes{op.gates * hidden_};
    if (!fits || std::max(hidden_, rank_) > tdpass::MOST_CHANNELS / op.gates)
      refuse(op, "the factors and the bias do not fit each other");
    bias_.assign(bias.as<float>(), bias.as<float>() + bias.count());
    const tdpass_stage in = product_of(hidden_, rank_);
    if (op.numbers == WHOLE) {
      v_.packed = pack<int8_t>(in, TDPASS_QUAD_LANES, v.as<int8_t>(), true, as_it_is);
      u_.packed = by_gate<int8_t, QUAD>(u.as<int8_t>());
      summed(v_, v, required(info, 2)), summed(u_, u, required(info, 4));
      return;
    }
    if (op.numbers == HALVES) {
      v_.packed = pack<uint16_t>(in, TDPASS_CHANNEL_LANES, v.as<uint16_t>(), true, as_it_is);
      u_.packed = by_gate<uint16_t, 1>(u.as<uint16_t>());
      return;
    }
    const std::vector<float> left = floats(v, info, 2), right = floats(u, info, 4);
    v_.packed = pack<float>(in, TDPASS_CHANNEL_LANES, left.data(), true, as_it_is);
    u_.packed = by_gate<float, 1>(right.data());
  }

  void compute(ort::KernelContext* context) {
    const Tensor pre = input(context, 0);
    const size_t states = cell_.gates == 4 ? 2 : 1;
    if (pre.sizes.size() != 3 || pre.sizes[2] != cell_.gates * hidden_)
      refuse(op_, "pre is of " + std::to_string(cell_.gates * hidden_) + " gates");
    const int64_t steps = pre.sizes[0], batch = pre.sizes[1];
    if (std::max(steps, batch) > tdpass::MOST_CHANNELS)
      refuse(op_, "that many steps or samples are not served");
    const Tensor y = output(context, 0, {steps, batch, hidden_});
    float* last[2] = {};
    for (size_t k = 0; k < states; k++) {
      const Tensor given = input(context, op_.reads.size() - states + k);
      if (given.sizes != Sizes{batch, hidden_})
        refuse(op_, "a state has not the size of the samples and of the cell");
      last[k] = output(context, 1 + k, given.sizes).as<float>();
      std::copy_n(given.as<float>(), given.count(), last[k]);
    }
    if (y.count() == 0) return;
    const int64_t back = cell_.reverse ? steps - 1 : 0, sign = cell_.reverse ? -1 : 1, step = batch * hidden_,
                  wide = cell_.gates * hidden_;
    const tdpass_cell cell = {cell_.gates, int32_t(steps), int32_t(batch), int32_t(hidden_), int32_t(rank_),
        cell_.numbers == HALVES ? TDPASS_BFLOAT16 : TDPASS_FLOAT32, pre.as<float>() + back * batch * wide,
        sign * batch * wide, wide, v_.packed.get(), u_.packed.get(), bias_.data(), last[0], last[1],
        y.as<float>() + back * step, sign * step, hidden_};
    Pool pool(
        api_, context, threads_, tasks_worth(double(rank_) * hidden_ * (1 + cell_.gates) * steps * batch));
    if (run(cell, &pool.pool) != 0) refuse(op_, "the kernel does not serve these sizes");
  }

 private:
  int32_t run(const tdpass_cell& cell, const tdpass_pool* pool) const {
    if (cell_.numbers != WHOLE) return tdpass_recurrent(&cell, pool);
    const tdpass_int8_cell whole = {cell, static_cast<const int8_t*>(v_.packed.get()),
        static_cast<const int8_t*>(u_.packed.get()), v_.scale.data(), u_.scale.data(), v_.total.data(),
        u_.total.data()};
    return tdpass_recurrent_int8(&whole, pool);
  }

  // U `[r, gates hidden]` as `[ceil(hidden / 16)][ceil(r / together)][gates][16][together]`.
  template <class T, int64_t TOGETHER> Panels by_gate(const T* u) const {
    const int64_t panels = (hidden_ + PANEL - 1) / PANEL, deep = (rank_ + TOGETHER - 1) / TOGETHER,
                  gates = cell_.gates;
    Panels packed = zeros(size_t(panels * deep * gates * PANEL * TOGETHER) * sizeof(T));
    for (int64_t r = 0; r < rank_; r++)
      for (int64_t g = 0; g < gates; g++)
        for (int64_t h = 0; h < hidden_; h++) {
          const int64_t row = ((h / PANEL * deep + r / TOGETHER) * gates + g) * PANEL + h % PANEL;
          static_cast<T*>(packed.get())[row * TOGETHER + r % TOGETHER] = u[(r * gates + g) * hidden_ + h];
        }
    return packed;
  }

  // The numbers of a factor, whose scales, where it is of int8, are that input.
  std::vector<float> floats(const Tensor& factor, const ort::KernelInfo* info, size_t scales) const {
    std::vector<float> values(size_t(factor.count()));
    const size_t columns = size_t(factor.sizes[1]);
    if (cell_.numbers == FLOATS) {
      std::copy_n(factor.as<float>(), values.size(), values.begin());
      return values;
    }
    const Tensor scale = required(info, scales);
    if (size_t(scale.count()) != columns) refuse(op_, "a factor has one scale per column");
    for (size_t k = 0; k < values.size(); k++)
      values[k] = float(factor.as<int8_t>()[k]) * scale.as<float>()[k % columns];
    return values;
  }

  void summed(Factor& factor, const Tensor& codes, const Tensor& scale) const {
    const int64_t columns = codes.sizes[1];
    if (scale.count() != columns) refuse(op_, "a factor has one scale per column");
    factor.scale.assign(scale.as<float>(), scale.as<float>() + columns);
    factor.total.resize(size_t(columns));
    for (int64_t k = 0; k < codes.count(); k++) factor.total[size_t(k % columns)] += codes.as<int8_t>()[k];
  }

  const CellOperator& cell_;
  int64_t hidden_, rank_;
  Factor v_, u_;
  std::vector<float> bias_;
};

CellOperator make(Numbers numbers, int gates, bool reverse) {
  static const char* const prefixes[] = {"", "Bfloat16", "WeightOnly", "Int8"};
  CellOperator op{};
  op.numbers = numbers, op.gates = gates, op.reverse = reverse;
  op.title = std::string(prefixes[numbers]) + (gates == 4 ? "LowRankLstm" : "LowRankGru") +
      (reverse ? "Reverse" : "");
  const size_t states = gates == 4 ? 2 : 1;
  op.reads = {ort::FLOAT};
  if (scaled(numbers)) op.reads.insert(op.reads.end(), {ort::INT8, ort::FLOAT, ort::INT8, ort::FLOAT});
  else op.reads.insert(op.reads.end(), 2, numbers == HALVES ? ort::BFLOAT16 : ort::FLOAT);
  op.reads.insert(op.reads.end(), 1 + states, ort::FLOAT);
  op.makes.assign(1 + states, ort::FLOAT);
  serve<Recurrent>(op);
  return op;
}

}  // namespace

void add_recurrent(Operators& all) {
  static const std::deque<CellOperator> ops = [] {
    std::deque<CellOperator> made;
    for (Numbers numbers : {FLOATS, HALVES, WEIGHT_ONLY, WHOLE})
      for (int gates : {3, 4})
        for (int reverse = 0; reverse < 2; reverse++) made.push_back(make(numbers, gates, reverse));
    return made;
  }();
  list(all, ops);
}

}  // namespace tdpass_ort
