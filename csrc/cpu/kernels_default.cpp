#include "cpu/baseline_includes.h"

#define CPU_CAPABILITY DEFAULT
#define CPU_CAPABILITY_DEFAULT

#include "cpu/kernel_table.h"

namespace liger::cpu {

extern const Kernels kKernelsDefault;
const Kernels kKernelsDefault = kKernelTable;

}  // namespace liger::cpu
