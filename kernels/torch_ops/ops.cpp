// The operators in C++: loaded into Python they take the place of the Python implementations for the CPU, and
// in a program without Python they are the operators.  To add one: a function in a file of its own, declared
// in operators.h, and a line in OPERATORS.
#include "operators.h"

#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <limits>
#include <locale>
#include <sstream>

// Only from torch 2.13 on; null before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace torch_ops {
namespace {

std::atomic<bool> forced{false};
bool references = false;  // whether Python is there, with a reference of every operator

void run(StableIValue* stack, const char* name, Result (*kernel)(Arguments&)) {
  Arguments in(stack);
  Result result = kernel(in);
  if (result.count) {
    for (int k = 0; k < result.count; k++) stack[k] = torch::stable::detail::from(result.tensors[k]);
  } else if (references) {
    in.hand_over(std::string("tdpass::") + name + "_reference");
  } else {
    throw std::runtime_error(std::string("tdpass::") + name +
        " does not serve these arguments: it takes tensors of float32 or bfloat16 on the CPU, all of one "
        "type, or what its int8 form is packed for");
  }
}

struct Operator {
  const char* name;
  void (*boxed)(StableIValue*, uint64_t, uint64_t);
};

#define TDPASS_OPERATOR(op)                                 \
  {#op, [](StableIValue* stack, uint64_t, uint64_t) {       \
     run(stack, #op, [](Arguments& in) { return op(in); }); \
   }}
constexpr Operator OPERATORS[] = {
    TDPASS_OPERATOR(conv_chain),
    TDPASS_OPERATOR(conv_chain_int8),
    TDPASS_OPERATOR(linear_chain),
    TDPASS_OPERATOR(linear_chain_int8),
    TDPASS_OPERATOR(tensor_chain),
    TDPASS_OPERATOR(sparse_conv2d),
    TDPASS_OPERATOR(sparse_linear),
    TDPASS_OPERATOR(level_conv2d),
    TDPASS_OPERATOR(low_rank_lstm),
    TDPASS_OPERATOR(low_rank_gru),
    TDPASS_OPERATOR(low_rank_lstm_int8),
    TDPASS_OPERATOR(low_rank_gru_int8),
    TDPASS_OPERATOR(weight_only_linear),
};

constexpr const char* SCHEMAS[] = {
#include "schemas.inc"  // written by the build: one string per operator known to Python
};

void run_torch(void*, int32_t tasks, void (*task)(void*, int32_t), void* argument) {
  struct Work {
    void (*task)(void*, int32_t);
    void* argument;
  } work{task, argument};
  auto chunk = [](int64_t begin, int64_t end, void* context) {
    auto* given = static_cast<Work*>(context);
    for (int64_t k = begin; k < end; k++) given->task(given->argument, int32_t(k));
  };
  check(torch_parallel_for(0, tasks, 1, chunk, &work), "run in parallel");
}

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// The number that all of a text is, in the notation of Python; NaN where it is none.
float number_of(const std::string& text) {
  if (text == "inf") return INFINITE;
  if (text == "-inf") return -INFINITE;
  std::istringstream in(text);
  in.imbue(std::locale::classic());
  double number;
  const bool whole =
      bool(in >> std::noskipws >> number) && in.peek() == std::istringstream::traits_type::eof();
  return whole ? float(number) : std::numeric_limits<float>::quiet_NaN();
}

int32_t find(const std::string& name, const char* what, std::initializer_list<const char*> known) {
  int32_t index = 0;
  std::string all;
  for (const char* candidate : known) {
    if (name == candidate) return index;
    all += (index++ ? ", " : "") + std::string(candidate);
  }
  throw std::runtime_error(std::string(what) + " '" + name + "' is not one of " + all);
}

}  // namespace

void Arguments::check_call(AOTITorchError status, const std::string& name) {
  if (!status) return;
  const char* why =
      torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  throw std::runtime_error(why ? std::string(why) : name + " failed");
}

int32_t dtype_of(int32_t type) {
  static const int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16();
  if (forced.load(std::memory_order_relaxed)) return -1;
  return type == float32 ? TDPASS_FLOAT32 : type == bfloat16 ? TDPASS_BFLOAT16 : -1;
}

tdpass_activation activation_of(const std::string& text) {
  static const std::string head = "clamp(";
  const size_t comma = text.find(',');
  if (text.rfind(head, 0) == 0 && comma != std::string::npos && text.back() == ')') {
    const float low = number_of(text.substr(head.size(), comma - head.size())),
                high = number_of(text.substr(comma + 1, text.size() - comma - 2));
    if (low == low && high == high) return {TDPASS_CLAMP, low, high};
  }
  constexpr tdpass_activation known[] = {{TDPASS_IDENTITY, 0, 0}, {TDPASS_CLAMP, 0, INFINITE},
      {TDPASS_CLAMP, 0, 6}, {TDPASS_SILU, 0, 0}, {TDPASS_GELU, 0, 0}};
  return known[find(text, "activation", {"identity", "relu", "relu6", "silu", "gelu"})];
}

int32_t lanes_of(const std::string& name) { return find(name, "lanes", {"channels", "pixels", "pairs"}); }

tdpass_pool pool() {
  uint32_t threads = 1;
  check(torch_get_num_threads(&threads), "count its threads");
  return {nullptr, int32_t(threads), run_torch};
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return strides;
}

namespace {

// Registers on loading.  TDPASS_OPERATORS says what this process has: "PID schemas" with Python's
// definitions, "PID kernels" with a library such as this; in the second case this one does nothing, so that
// several deployed models may each bring their own.
class Registration {
 public:
  Registration() {
    using torch::stable::detail::StableLibrary;
    const std::string process = std::to_string(getpid());
    const char* variable = std::getenv("TDPASS_OPERATORS");
    const std::string here = variable ? variable : "";
    if (here == process + " kernels") return;
    references = here == process + " schemas";
    if (!references) {
      definitions_ = std::make_unique<StableLibrary>(
          StableLibrary::Kind::FRAGMENT, "tdpass", nullptr, __FILE__, __LINE__);
      for (const char* schema : SCHEMAS) definitions_->def(schema);
    }
    kernels_ =
        std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "tdpass", "CPU", __FILE__, __LINE__);
    for (const Operator& op : OPERATORS) kernels_->impl(op.name, op.boxed);
    setenv("TDPASS_OPERATORS", (process + " kernels").c_str(), 1);
  }

 private:
  std::unique_ptr<torch::stable::detail::StableLibrary> definitions_, kernels_;
} registration;

}  // namespace
}  // namespace torch_ops

extern "C" __attribute__((visibility("default"))) const char* tdpass_operators(void) {
  static const std::string names = [] {
    std::string all;
    for (const auto& op : torch_ops::OPERATORS) all += (all.empty() ? "" : " ") + std::string(op.name);
    return all;
  }();
  return names.c_str();
}

// While set, every operator is answered by its reference.
extern "C" __attribute__((visibility("default"))) void tdpass_use_reference(int32_t use) {
  torch_ops::forced = use != 0;
}
