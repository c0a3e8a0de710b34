// Chooses the instruction set once, and gives kernels a pool of threads where the caller has none.
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "checks.h"

namespace {

void run_openmp(void*, int32_t tasks, void (*task)(void*, int32_t), void* argument) {
#pragma omp parallel for schedule(static, 1)
  for (int32_t k = 0; k < tasks; k++) task(argument, k);
}

bool runs(const char* isa) {
#if defined(__x86_64__)
  if (!std::strcmp(isa, "avx512bf16")) return runs("avx512") && __builtin_cpu_supports("avx512bf16");
  if (!std::strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

// Of the variants that were compiled in, the best that the machine runs and TDPASS_ISA allows; a missing one is null.
template <class Kernel> struct Choice {
  const char* isa;
  Kernel kernel;
};
template <class Kernel> Choice<Kernel> choose(Kernel avx512bf16, Kernel avx512, Kernel avx2, Kernel generic) {
  const Choice<Kernel> order[] = {{"avx512bf16", avx512bf16}, {"avx512", avx512}, {"avx2", avx2}, {"generic", generic}};
  const char* asked = std::getenv("TDPASS_ISA");
  bool reached = !asked || !*asked;
  for (const Choice<Kernel>& choice : order) {
    reached = reached || !std::strcmp(asked, choice.isa);
    if (reached && choice.kernel && runs(choice.isa)) return choice;
  }
  return {"none", nullptr};
}

}  // namespace

#define TDPASS_CHOOSE(name) choose(&name##_avx512bf16, &name##_avx512, &name##_avx2, &name##_generic)
#define TDPASS_ENTRY(name, parameters, arguments, checked)                   \
  __attribute__((weak)) int32_t name##_avx512bf16 parameters;                \
  __attribute__((weak)) int32_t name##_avx512 parameters;                    \
  __attribute__((weak)) int32_t name##_avx2 parameters;                      \
  __attribute__((weak)) int32_t name##_generic parameters;                   \
  int32_t name parameters {                                                  \
    static const auto kernel = TDPASS_CHOOSE(name).kernel;                   \
    if (!kernel) return -1;                                                  \
    const tdpass_pool openmp = {nullptr, omp_get_max_threads(), run_openmp}; \
    if (!pool) pool = &openmp;                                               \
    try {                                                                    \
      const tdpass::Verdict verdict = tdpass::check checked;                 \
      return verdict == tdpass::SERVED ? kernel arguments : int32_t(verdict); \
    } catch (const std::bad_alloc&) {                                        \
      return -1;                                                             \
    }                                                                        \
  }

extern "C" {
TDPASS_ENTRY(tdpass_conv_chain, (const tdpass_chain* chain, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool), (chain, x, y, pool), (chain, x, y))
TDPASS_ENTRY(tdpass_tensor_chain, (const tdpass_program* program, const tdpass_rows* x, const tdpass_rows* y, const tdpass_pool* pool), (program, x, y, pool), (program, x, y))
TDPASS_ENTRY(tdpass_sparse_conv, (const tdpass_sparse* weight, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool), (weight, x, y, pool), (weight, x, y))
TDPASS_ENTRY(tdpass_recurrent, (const tdpass_cell* cell, const tdpass_pool* pool), (cell, pool), (cell))

const char* tdpass_isa(void) {
  static const char* const isa = TDPASS_CHOOSE(tdpass_conv_chain).isa;
  return isa;
}
}
