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
  const bool launched = vectorizable && with_forward_config(args.cols / kVec, [&](auto config) {
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

template <bool RESIDUAL, typename F>
bool with_rms_norm_backward_config(int64_t vectors, const F& f) {
  // A thread that also holds dsum takes more registers, and moves more bytes.
  constexpr auto blocks = [](int alone, int residual) { return RESIDUAL ? residual : alone; };
  if (vectors <= 16) return f(RowConfig<1, 16, 16, 4>{}), true;
  if (vectors <= 32) return f(RowConfig<1, 32, 8, 4>{}), true;
  if (vectors <= 64) return f(RowConfig<2, 32, 8, blocks(3, 2)>{}), true;
  if (vectors <= 128) return f(RowConfig<1, 128, 1, 8>{}), true;
  if (vectors <= 256) return f(RowConfig<2, 128, 1, blocks(6, 4)>{}), true;
  if (vectors <= 512) return f(RowConfig<2, 256, 1, blocks(3, 2)>{}), true;
  if (vectors <= 1024) return f(RowConfig<2, 512, 1, 1>{}), true;
  if (vectors <= 2048) return f(RowConfig<4, 512, 1, 1>{}), true;
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
      aligned_pointers(args.dy, args.dsum, args.x, args.dx, args.dresidual, args.weight) &&
      aligned_strides(sizeof(T), args.x_stride, args.dy_stride, args.dsum_stride);
  const bool launched =
      vectorizable && with_rms_norm_backward_config<RESIDUAL>(args.cols / kVec, [&](auto config) {
        using C = decltype(config);
        const int blocks = persistent_blocks((args.rows + C::rpb - 1) / C::rpb, C::blocks_per_sm);
        allocate_partial(blocks);
        rms_norm_backward_kernel<T, W, kVec, C::nv, C::tpr, C::rpb, C::blocks_per_sm, RESIDUAL>
            <<<blocks, C::threads, 0, stream>>>(args);
      });
  if (!launched) {
    with_vector_size<T>(vectorizable, [&](auto vec) {
      constexpr int kSize = decltype(vec)::value;
      at::Tensor mean_mn;
      A* mean_mn_data = nullptr;
      if (args.dx != nullptr || args.dresidual != nullptr) {
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
  sum_partial_sums(op, partial, dweight, stream);
}

}  // namespace liger::cuda
