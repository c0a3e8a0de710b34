// Chooses the instruction set once, and gives kernels a pool of threads where the caller has none.
#include <omp.h>

#include <cstdlib>
#include <cstring>

#include "tdpass.h"

namespace {

bool has(const char* isa) {
#if defined(__x86_64__)
  if (!std::strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(isa, "generic");
}

const char* choose() {
  static const char* const order[] = {"avx512", "avx2", "generic"};
  const char* asked = std::getenv("TDPASS_ISA");
  bool reached = !asked || !*asked;
  for (const char* isa : order) {
    reached = reached || !std::strcmp(asked, isa);
    if (reached && has(isa)) return isa;
  }
  return "generic";
}

void run_openmp(void*, int32_t tasks, void (*task)(void*, int32_t), void* argument) {
#pragma omp parallel for schedule(static, 1)
  for (int32_t k = 0; k < tasks; k++) task(argument, k);
}

}  // namespace

extern "C" const char* tdpass_isa(void) {
  static const char* const isa = choose();
  return isa;
}

#if defined(__x86_64__)
#define TDPASS_CHOOSE(name) (tdpass_isa()[0] == 'g' ? name##_generic : tdpass_isa()[3] == '5' ? name##_avx512 : name##_avx2)
#define TDPASS_DECLARE(name, ...) int32_t name##_generic(__VA_ARGS__), name##_avx2(__VA_ARGS__), name##_avx512(__VA_ARGS__);
#else
#define TDPASS_CHOOSE(name) name##_generic
#define TDPASS_DECLARE(name, ...) int32_t name##_generic(__VA_ARGS__);
#endif

extern "C" {
TDPASS_DECLARE(tdpass_conv_chain, const tdpass_chain*, const tdpass_image*, const tdpass_image*, const tdpass_pool*)
TDPASS_DECLARE(tdpass_tensor_chain, const tdpass_program*, const tdpass_rows*, const tdpass_rows*, const tdpass_pool*)
TDPASS_DECLARE(tdpass_sparse_conv, const tdpass_sparse*, const tdpass_image*, const tdpass_image*, const tdpass_pool*)
TDPASS_DECLARE(tdpass_recurrent, const tdpass_cell*, const tdpass_pool*)

int32_t tdpass_conv_chain(const tdpass_chain* chain, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool) {
  static const auto kernel = TDPASS_CHOOSE(tdpass_conv_chain);
  const tdpass_pool openmp = {nullptr, omp_get_max_threads(), run_openmp};
  return kernel(chain, x, y, pool ? pool : &openmp);
}

int32_t tdpass_tensor_chain(const tdpass_program* program, const tdpass_rows* x, const tdpass_rows* y, const tdpass_pool* pool) {
  static const auto kernel = TDPASS_CHOOSE(tdpass_tensor_chain);
  const tdpass_pool openmp = {nullptr, omp_get_max_threads(), run_openmp};
  return kernel(program, x, y, pool ? pool : &openmp);
}

int32_t tdpass_sparse_conv(const tdpass_sparse* weight, const tdpass_image* x, const tdpass_image* y, const tdpass_pool* pool) {
  static const auto kernel = TDPASS_CHOOSE(tdpass_sparse_conv);
  const tdpass_pool openmp = {nullptr, omp_get_max_threads(), run_openmp};
  return kernel(weight, x, y, pool ? pool : &openmp);
}

int32_t tdpass_recurrent(const tdpass_cell* cell, const tdpass_pool* pool) {
  static const auto kernel = TDPASS_CHOOSE(tdpass_recurrent);
  const tdpass_pool openmp = {nullptr, omp_get_max_threads(), run_openmp};
  return kernel(cell, pool ? pool : &openmp);
}
}
