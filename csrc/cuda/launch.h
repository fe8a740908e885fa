#pragma once

// What launchers share: dtype dispatch from tensors to element types, alignment, and grid sizes. Launchers
// are the last place that knows torch; kernels (.cuh) take pointers.

#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda/common/vec.cuh"

namespace liger::cuda {

// f(T{}) with T the CUDA element type of the dtype, one of those that checks.h admits.
template <typename F>
void dispatch_floating(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kBFloat16:
      return f(__nv_bfloat16{});
    case at::kHalf:
      return f(__half{});
    case at::kDouble:
      return f(double{});
    default:
      TORCH_INTERNAL_ASSERT(false, "unexpected dtype ", dtype);
  }
}

// f(T{}, S{}) where S is T or the accumulate type of T (a float32 weight beside 16-bit activations).
template <typename F>
void dispatch_floating_pair(at::ScalarType dtype, at::ScalarType side_dtype, const F& f) {
  dispatch_floating(dtype, [&](auto element) {
    using T = decltype(element);
    if (side_dtype == dtype) {
      f(T{}, T{});
    } else {
      f(T{}, Accumulate<T>{});
    }
  });
}

// Whether 16-byte accesses may start at every pointer.
template <typename... T>
bool aligned_pointers(const T*... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % 16 == 0) && ...);
}

// Whether steps of these many elements keep 16-byte alignment.
template <typename... Strides>
bool aligned_strides(int64_t element_size, Strides... strides) {
  return ((strides * element_size % 16 == 0) && ...);
}

// f(std::integral_constant<int, N>{}) with N the most elements that one access may take where accesses start
// at these addresses (or'd together, strides in bytes included): 16 bytes' worth at most, a power of two.
template <typename T, int N = kVecSize<T>, typename F>
void dispatch_vector(std::uintptr_t addresses, const F& f) {
  if constexpr (N == 1) {
    f(std::integral_constant<int, 1>{});
  } else if (addresses % (N * sizeof(T)) == 0) {
    f(std::integral_constant<int, N>{});
  } else {
    dispatch_vector<T, N / 2>(addresses, f);
  }
}

inline int multiprocessors() { return at::cuda::getCurrentDeviceProperties()->multiProcessorCount; }

// Blocks for `work` items, as gridDim.x takes them.
inline unsigned int grid_size(const char* op, int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  TORCH_CHECK_VALUE(blocks <= std::numeric_limits<int32_t>::max(), "liger::", op,
      ": the input is too large for one launch (", blocks, " blocks)");
  return static_cast<unsigned int>(blocks);
}

// A size that kernels count in 32 bits.
inline int size_int32(const char* op, const char* what, int64_t size) {
  TORCH_CHECK_VALUE(size <= std::numeric_limits<int32_t>::max() / 2, "liger::", op, ": ", what,
      " must be below 2**30 on CUDA, got ", size);
  return static_cast<int>(size);
}

}  // namespace liger::cuda
