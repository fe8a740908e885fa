#include "cpu/x86.h"
#ifdef LIGER_CPU_X86

#include "cpu/baseline_includes.h"

// Functions that the compiler makes up, such as the pointer form of a lambda, do not get the target. They
// hold no vector code here: everything that passes vectors is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// GCC's C++ front end compiles for this target but does not define the macros that announce it, which sleef.h
// and at::vec read.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#ifndef __AVX__
#define __AVX__ 1
#endif
#ifndef __AVX2__
#define __AVX2__ 1
#endif
#ifndef __FMA__
#define __FMA__ 1
#endif
#ifndef __F16C__
#define __F16C__ 1
#endif
#ifndef __AVX512F__
#define __AVX512F__ 1
#endif
#ifndef __AVX512BW__
#define __AVX512BW__ 1
#endif
#ifndef __AVX512VL__
#define __AVX512VL__ 1
#endif
#ifndef __AVX512DQ__
#define __AVX512DQ__ 1
#endif
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512

#include "cpu/kernel_table.h"

namespace liger::cpu {

extern const Kernels kKernelsAvx512;
const Kernels kKernelsAvx512 = kKernelTable;

}  // namespace liger::cpu

#endif  // LIGER_CPU_X86
