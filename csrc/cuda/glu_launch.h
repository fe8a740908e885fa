#pragma once

// The launches of gated linear units, for the activations of cuda/glu.cuh. The caller guards the device.

#include "cuda/glu.cuh"
#include "cuda/launch.h"
#include "ops/glu.h"

namespace liger::cuda {

namespace detail {

inline std::uintptr_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

// The addresses that rows start at, as far as alignment goes: the lowest bit set in any of them.
inline std::uintptr_t row_addresses(const GluRows& call, int64_t element_size) {
  const std::uintptr_t starts = address(call.gate) | address(call.up) | address(call.dout) |
      address(call.out) | address(call.dgate) | address(call.dup);
  const int64_t steps =
      call.rows > 1 ? call.gate_stride | call.up_stride | call.dout_stride | call.grad_stride : 0;
  return starts | static_cast<std::uintptr_t>((steps | call.cols) * element_size);
}

}  // namespace detail

template <typename Activation>
void launch_glu_forward(const char* op, const GluRows& call) {
  const auto stream = at::cuda::getCurrentCUDAStream();
  dispatch_floating(call.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_vector<T>(detail::row_addresses(call, sizeof(T)), [&](auto vec) {
      const auto blocks = grid_size(op, call.rows * (call.cols / vec()), kGluThreads);
      glu_forward_kernel<Activation, T, vec()><<<blocks, kGluThreads, 0, stream>>>(
          static_cast<const T*>(call.gate), static_cast<const T*>(call.up), static_cast<T*>(call.out),
          call.rows, call.cols, call.gate_stride, call.up_stride);
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Activation>
void launch_glu_backward(const char* op, const GluRows& call) {
  const auto stream = at::cuda::getCurrentCUDAStream();
  dispatch_floating(call.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_vector<T>(detail::row_addresses(call, sizeof(T)), [&](auto vec) {
      const auto blocks = grid_size(op, call.rows * (call.cols / vec()), kGluThreads);
      glu_backward_kernel<Activation, T, vec()><<<blocks, kGluThreads, 0, stream>>>(
          static_cast<const T*>(call.dout), static_cast<const T*>(call.gate), static_cast<const T*>(call.up),
          static_cast<T*>(call.dgate), static_cast<T*>(call.dup), call.rows, call.cols, call.dout_stride,
          call.gate_stride, call.up_stride, call.grad_stride);
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace liger::cuda
