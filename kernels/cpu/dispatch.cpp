// Chooses the instruction set once, and gives kernels a pool of threads where the caller has none.
#include <omp.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

#include "checks.h"

namespace {

void run_openmp(void*, int32_t tasks, void (*task)(void*, int32_t), void* argument) {
#pragma omp parallel for schedule(static, 1)
  for (int32_t k = 0; k < tasks; k++) task(argument, k);
}

#if defined(__x86_64__)
bool knows(unsigned leaf, unsigned subleaf, int reg, unsigned bits) {
  unsigned found[4] = {};
  return __get_cpuid_count(leaf, subleaf, &found[0], &found[1], &found[2], &found[3]) &&
      (found[reg] & bits) == bits;
}

// The matrix unit may be used by a process that asked for its state to be kept: once, before the first tile.
bool has_matrix_unit() {
  constexpr int EDX = 3, REQUEST = 0x1023, TILE_DATA = 18;
  constexpr unsigned BF16_TILE_INT8 = 1u << 22 | 1u << 24 | 1u << 25;
  static const bool granted =
      knows(7, 0, EDX, BF16_TILE_INT8) && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return granted;
}

bool runs(const char* isa) {
  const auto is = [isa](const char* name) { return !std::strcmp(isa, name); };
  if (is("amx")) return runs("avx512bf16") && has_matrix_unit();
  if (is("avx512bf16")) return runs("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (is("avx512vnni")) return runs("avx512") && __builtin_cpu_supports("avx512vnni");
  if (is("avx512") || is("amxemulated"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (is("avxvnni")) return runs("avx2") && knows(7, 1, 0, 1u << 4);
  if (is("avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return true;
}
#else
bool runs(const char*) { return true; }
#endif

// Of the variants that were compiled in, the best that the machine runs and TDPASS_ISA allows; a missing one
// is null.
template <class Kernel> struct Choice {
  const char* isa;
  Kernel kernel;
  bool on_request;
};
template <class Kernel> Choice<Kernel> choose(std::initializer_list<Choice<Kernel>> best_first) {
  const char* asked = std::getenv("TDPASS_ISA");
  bool reached = !asked || !*asked;
  for (const Choice<Kernel>& choice : best_first) {
    const bool named = asked && !std::strcmp(asked, choice.isa);
    reached = reached || named;
    if (reached && (named || !choice.on_request) && choice.kernel && runs(choice.isa)) return choice;
  }
  return {"none", nullptr, false};
}

}  // namespace

// The instruction sets, best first, and whether one has to be asked for.
#define TDPASS_EACH_ISA(with, ...)                                                                        \
  with(amxemulated, true, __VA_ARGS__) with(amx, false, __VA_ARGS__) with(avx512bf16, false, __VA_ARGS__) \
      with(avx512vnni, false, __VA_ARGS__) with(avx512, false, __VA_ARGS__)                               \
          with(avxvnni, false, __VA_ARGS__) with(avx2, false, __VA_ARGS__) with(generic, false, __VA_ARGS__)
#define TDPASS_DECLARE(isa, on_request, name, ...) __attribute__((weak)) int32_t name##_##isa(__VA_ARGS__);
#define TDPASS_CHOICE(isa, on_request, name) {#isa, &name##_##isa, on_request},
#define TDPASS_CHOOSE(name) choose<decltype(&name##_generic)>({TDPASS_EACH_ISA(TDPASS_CHOICE, name)})
#define TDPASS_UNWRAP(...) __VA_ARGS__
#define TDPASS_ENTRY(name, parameters, arguments, checked)                    \
  TDPASS_EACH_ISA(TDPASS_DECLARE, name, TDPASS_UNWRAP parameters)             \
  int32_t name parameters {                                                   \
    static const auto kernel = TDPASS_CHOOSE(name).kernel;                    \
    if (!kernel) return -1;                                                   \
    const tdpass_pool openmp = {nullptr, omp_get_max_threads(), run_openmp};  \
    if (!pool) pool = &openmp;                                                \
    try {                                                                     \
      const tdpass::Verdict verdict = tdpass::check checked;                  \
      return verdict == tdpass::SERVED ? kernel arguments : int32_t(verdict); \
    } catch (const std::bad_alloc&) {                                         \
      return -1;                                                              \
    }                                                                         \
  }

extern "C" {
TDPASS_ENTRY(tdpass_conv_chain,
    (const tdpass_chain* chain, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool),
    (chain, x, y, pool), (chain, x, y))
TDPASS_ENTRY(tdpass_conv_chain_int8,
    (const tdpass_int8_chain* chain, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool),
    (chain, x, y, pool), (chain, x, y))
TDPASS_ENTRY(tdpass_tensor_chain,
    (const tdpass_program* program, const tdpass_rows* x, const tdpass_rows* y, const tdpass_pool* pool),
    (program, x, y, pool), (program, x, y))
TDPASS_ENTRY(tdpass_sparse_conv,
    (const tdpass_sparse* weight, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool),
    (weight, x, y, pool), (weight, x, y))
TDPASS_ENTRY(tdpass_level_conv,
    (const tdpass_levels* layer, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool),
    (layer, x, y, pool), (layer, x, y))
TDPASS_ENTRY(tdpass_weight_only_linear,
    (const tdpass_weight_only* layer, const tdpass_rows* x, const tdpass_rows* y, const tdpass_pool* pool),
    (layer, x, y, pool), (layer, x, y))
TDPASS_ENTRY(tdpass_recurrent, (const tdpass_cell* cell, const tdpass_pool* pool), (cell, pool), (cell))
TDPASS_ENTRY(
    tdpass_recurrent_int8, (const tdpass_int8_cell* cell, const tdpass_pool* pool), (cell, pool), (cell))

const char* tdpass_isa(void) {
  static const char* const isa = TDPASS_CHOOSE(tdpass_conv_chain).isa;
  return isa;
}
}
