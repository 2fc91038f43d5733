// Chooses the build of kernels.cpp for this machine.
#include <cstdlib>
#include <string_view>

#include "kernels.h"

namespace gptailor {

extern const Kernels kernels_portable;
#ifdef GPTAILOR_X86_SIMD
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

const Kernels& choose() {
  const char* wanted_env = std::getenv("GPTAILOR_SIMD");
  const std::string_view wanted = wanted_env ? wanted_env : "";
  if (wanted == "portable") return kernels_portable;
#ifdef GPTAILOR_X86_SIMD
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && wanted != "avx2") return kernels_avx512;
  if (avx2) return kernels_avx2;
#endif
  return kernels_portable;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace gptailor
