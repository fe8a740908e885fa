#include "cpu/kernels.h"
#include "cpu/x86.h"

#include <ATen/Version.h>

namespace liger::cpu {

extern const Kernels kKernelsDefault;
#ifdef LIGER_CPU_X86
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#ifdef LIGER_CPU_X86
    const auto capability = at::get_cpu_capability();
    if (capability == "AVX512") return kKernelsAvx512;
    if (capability == "AVX2") return kKernelsAvx2;
#endif
    return kKernelsDefault;
  }();
  return chosen;
}

}  // namespace liger::cpu
