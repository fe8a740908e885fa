#pragma once

// The launches that rms_norm and add_rms_norm (RESIDUAL) share.

#include "cuda/norm_launch.h"
#include "cuda/rms_norm.cuh"

namespace liger::cuda {

template <bool RESIDUAL, typename T, typename W>
void launch_rms_norm_forward(const char* op, const RmsNormArguments<T, W>& args, cudaStream_t stream) {
  constexpr int kVec = kVecSize<T>;
  const bool vectorizable = args.cols % kVec == 0 &&
      aligned_pointers(args.x, args.residual, args.sum, args.y, args.weight) &&
      aligned_strides(sizeof(T), args.x_stride, args.residual_stride);
  const bool launched = vectorizable && with_forward_config<RESIDUAL>(args.cols / kVec, [&](auto config) {
    using C = decltype(config);
    rms_norm_forward_kernel<T, W, kVec, C::nv, C::tpr, C::rpb, RESIDUAL>
        <<<grid_size(op, args.rows, C::rpb), C::threads, 0, stream>>>(args);
  });
  if (!launched) {
    with_vector_size<T>(vectorizable, [&](auto vec) {
      rms_norm_forward_loop_kernel<T, W, decltype(vec)::value, kLoopThreads, RESIDUAL>
          <<<grid_size(op, args.rows, 1), kLoopThreads, 0, stream>>>(args);
    });
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// f(BackwardConfig) with the narrowest backward kernel that holds a row of `vectors` 16-byte vectors; false
// where there is none, or f is false because the device has too little shared memory for it.
template <bool RESIDUAL, typename F>
bool with_rms_norm_backward_config(int64_t vectors, const F& f) {
  if (vectors <= 16) return f(BackwardConfig<1, 16, 32, 2, 1>{});
  if (vectors <= 32) return f(BackwardConfig<1, 32, 16, 2, 1>{});
  if (vectors <= 64) return f(BackwardConfig<2, 32, 8, 2, 2>{});
  if (vectors <= 128) return f(BackwardConfig<1, 128, 1, 4, 2>{});
  if (vectors <= 256) return f(BackwardConfig<1, 256, 1, 3, 2>{});
  if (vectors <= 512) return f(BackwardConfig<1, 512, 1, RESIDUAL ? 2 : 3, 1>{});
  if (vectors <= 1024) return f(BackwardConfig<2, 512, 1, 2, 1>{}) || f(BackwardConfig<2, 512, 1, 1, 1>{});
  if (vectors <= 2048) return f(BackwardConfig<4, 512, 1, 1, 1>{});
  return false;
}

// Everything but args.partial is set; dweight is defined where it is wanted.
template <bool RESIDUAL, typename T, typename W>
void launch_rms_norm_backward(const char* op, RmsNormBackwardArguments<T, W> args, const at::Tensor& dweight,
    const at::TensorOptions& accumulate_options, cudaStream_t stream) {
  using A = Accumulate<T>;
  constexpr int kVec = kVecSize<T>;
  at::Tensor partial;
  const auto allocate_partial = [&](int64_t blocks) {
    partial = empty_partial_sums(dweight.defined(), blocks, args.cols, accumulate_options);
    if (partial.defined()) args.partial = static_cast<A*>(partial.mutable_data_ptr());
  };
  const bool vectorizable = args.cols % kVec == 0 &&
      aligned_pointers(args.dy, args.dsum, args.x, args.dx, args.weight) &&
      aligned_strides(sizeof(T), args.x_stride, args.dy_stride, args.dsum_stride);
  const bool launched =
      vectorizable && with_rms_norm_backward_config<RESIDUAL>(args.cols / kVec, [&](auto config) {
        using C = decltype(config);
        constexpr int kShared = RmsNormRing<T, C::nv, C::tpr, C::rpb, C::rows, RESIDUAL>::kBytes;
        constexpr auto kKernel =
            rms_norm_backward_kernel<T, W, C::nv, C::tpr, C::rpb, C::rows, C::blocks_per_sm, RESIDUAL>;
        if (!fits_shared_memory(kShared)) return false;
        static SharedMemoryLimit limit;
        limit.raise(kKernel, kShared);
        const int blocks = C::blocks(args.rows);
        allocate_partial(blocks);
        kKernel<<<blocks, C::threads, kShared, stream>>>(args);
        return true;
      });
  if (!launched) {
    with_vector_size<T>(vectorizable, [&](auto vec) {
      constexpr int kSize = decltype(vec)::value;
      at::Tensor mean_mn;
      A* mean_mn_data = nullptr;
      if (args.dx != nullptr) {
        mean_mn = at::empty({args.rows}, accumulate_options);
        mean_mn_data = static_cast<A*>(mean_mn.mutable_data_ptr());
        rms_norm_backward_rows_kernel<T, W, kSize, kLoopThreads>
            <<<grid_size(op, args.rows, 1), kLoopThreads, 0, stream>>>(args, mean_mn_data);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      }
      const dim3 grid = column_grid(op, args.rows, args.cols, kSize);
      allocate_partial(grid.y);
      rms_norm_backward_columns_kernel<T, W, kSize, kColumnThreads, RESIDUAL>
          <<<grid, kColumnThreads, 0, stream>>>(args, mean_mn_data);
    });
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const at::Tensor nothing;
  sum_partial_sums(op, {partial, dweight}, {nothing, nothing}, stream);
}

}  // namespace liger::cuda
