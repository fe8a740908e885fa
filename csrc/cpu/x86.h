#pragma once

// Set where one file can be compiled for a wider instruction set than the rest (#pragma GCC target).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LIGER_CPU_X86 1
#endif
