#include "cuda/layer_norm.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cuda/norm_launch.h"
#include "ops/checks.h"
#include "ops/layer_norm.h"
#include "ops/rows.h"

namespace liger {

namespace {

// As with_rms_norm_backward_config; two sums for each column take more of a thread's registers.
template <typename F>
bool with_backward_config(int64_t vectors, const F& f) {
  using cuda::BackwardConfig;
  if (vectors <= 16) return f(BackwardConfig<1, 16, 32, 2, 1>{});
  if (vectors <= 32) return f(BackwardConfig<1, 32, 16, 2, 1>{});
  if (vectors <= 64) return f(BackwardConfig<2, 32, 8, 1, 2>{});
  if (vectors <= 128) return f(BackwardConfig<1, 128, 1, 3, 3>{});
  if (vectors <= 256) return f(BackwardConfig<1, 256, 1, 3, 2>{});
  if (vectors <= 512) return f(BackwardConfig<2, 256, 1, 3, 1>{});
  if (vectors <= 1024) return f(BackwardConfig<2, 512, 1, 2, 1>{}) || f(BackwardConfig<2, 512, 1, 1, 1>{});
  if (vectors <= 2048) return f(BackwardConfig<4, 512, 1, 1, 1>{});
  return false;
}

}  // namespace

TensorTriple layer_norm_cuda(const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps) {
  constexpr auto op = "layer_norm";
  check_layer_norm(x, weight, bias, eps);
  const c10::cuda::CUDAGuard device_guard(x.device());
  const auto leading = x.sizes().slice(0, x.dim() - 1);
  const auto statistics = x.options().dtype(accumulate_type(x.scalar_type()));
  auto y = at::empty(x.sizes(), x.options());
  auto mean = at::empty(leading, statistics);
  auto rstd = at::empty(leading, statistics);
  if (rstd.numel() == 0) return {y, mean, rstd};
  const auto x_rows = as_rows(x);
  const LayerNormAffine affine(x, weight, bias);
  const auto stream = at::cuda::getCurrentCUDAStream();

  cuda::dispatch_floating_pair(x.scalar_type(), affine.dtype, [&](auto element, auto affine_element) {
    using T = decltype(element);
    using W = decltype(affine_element);
    using A = cuda::Accumulate<T>;
    constexpr int kVec = cuda::kVecSize<T>;
    const cuda::LayerNormArguments<T, W> args = {static_cast<const T*>(x_rows.data()),
        weight ? static_cast<const W*>(affine.weight.const_data_ptr()) : nullptr,
        bias ? static_cast<const W*>(affine.bias.const_data_ptr()) : nullptr,
        static_cast<T*>(y.mutable_data_ptr()), static_cast<A*>(mean.mutable_data_ptr()),
        static_cast<A*>(rstd.mutable_data_ptr()), x_rows.rows, x_rows.stride,
        cuda::size_int32(op, "the last dimension of x", x_rows.cols), static_cast<A>(eps)};
    const bool vectorizable = x_rows.cols % kVec == 0 &&
        cuda::aligned_pointers(args.x, args.y, args.weight, args.bias) &&
        cuda::aligned_strides(sizeof(T), x_rows.stride);
    const bool launched = vectorizable && cuda::with_forward_config(x_rows.cols / kVec, [&](auto config) {
      using C = decltype(config);
      cuda::layer_norm_forward_kernel<T, W, kVec, C::nv, C::tpr, C::rpb>
          <<<cuda::grid_size(op, args.rows, C::rpb), C::threads, 0, stream>>>(args);
    });
    if (!launched) {
      cuda::with_vector_size<T>(vectorizable, [&](auto vec) {
        cuda::layer_norm_forward_loop_kernel<T, W, decltype(vec)::value, cuda::kLoopThreads>
            <<<cuda::grid_size(op, args.rows, 1), cuda::kLoopThreads, 0, stream>>>(args);
      });
    }
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, mean, rstd};
}

TensorTriple layer_norm_backward_cuda(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& mean, const at::Tensor& rstd,
    at::ScalarType bias_dtype, bool need_dx, bool need_dweight, bool need_dbias) {
  constexpr auto op = "layer_norm_backward";
  check_layer_norm_backward(dy, x, weight, mean, rstd, bias_dtype, need_dweight);
  const c10::cuda::CUDAGuard device_guard(x.device());
  const auto nothing = [&] { return at::empty({0}, x.options()); };
  const auto bias_options = x.options().dtype(bias_dtype);
  auto dx = need_dx ? at::empty(x.sizes(), x.options()) : nothing();
  if (x.numel() == 0) {
    return {dx, need_dweight ? at::zeros(weight->sizes(), weight->options()) : nothing(),
        need_dbias ? at::zeros({x.size(-1)}, bias_options) : nothing()};
  }
  auto dweight = need_dweight ? at::empty(weight->sizes(), weight->options()) : nothing();
  auto dbias = need_dbias ? at::empty({x.size(-1)}, bias_options) : nothing();
  const auto x_rows = as_rows(x), dy_rows = as_rows(dy);
  const auto dense_weight = weight ? weight->contiguous() : at::Tensor();
  const auto dense_mean = mean.contiguous(), dense_rstd = rstd.contiguous();
  const auto weight_dtype = weight ? weight->scalar_type() : x.scalar_type();
  const auto stream = at::cuda::getCurrentCUDAStream();
  at::Tensor partial_weight, partial_bias;

  cuda::dispatch_floating_pair(x.scalar_type(), weight_dtype, [&](auto element, auto weight_element) {
    using T = decltype(element);
    using W = decltype(weight_element);
    using A = cuda::Accumulate<T>;
    constexpr int kVec = cuda::kVecSize<T>;
    cuda::LayerNormBackwardArguments<T, W> args = {static_cast<const T*>(dy_rows.data()),
        static_cast<const T*>(x_rows.data()),
        weight ? static_cast<const W*>(dense_weight.const_data_ptr()) : nullptr,
        static_cast<const A*>(dense_mean.const_data_ptr()),
        static_cast<const A*>(dense_rstd.const_data_ptr()),
        need_dx ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr, nullptr, nullptr, x_rows.rows,
        dy_rows.stride, x_rows.stride, cuda::size_int32(op, "the last dimension of x", x_rows.cols)};
    const auto allocate_partials = [&](int64_t blocks) {
      partial_weight = cuda::empty_partial_sums(need_dweight, blocks, args.cols, dense_rstd.options());
      partial_bias = cuda::empty_partial_sums(need_dbias, blocks, args.cols, dense_rstd.options());
      if (need_dweight) args.partial_weight = static_cast<A*>(partial_weight.mutable_data_ptr());
      if (need_dbias) args.partial_bias = static_cast<A*>(partial_bias.mutable_data_ptr());
    };
    const bool vectorizable = args.cols % kVec == 0 &&
        cuda::aligned_pointers(args.dy, args.x, args.dx, args.weight) &&
        cuda::aligned_strides(sizeof(T), x_rows.stride, dy_rows.stride);
    const bool launched = vectorizable && with_backward_config(args.cols / kVec, [&](auto config) {
      using C = decltype(config);
      constexpr int kShared = cuda::LayerNormRing<T, C::nv, C::tpr, C::rpb, C::rows>::kBytes;
      constexpr auto kKernel =
          cuda::layer_norm_backward_kernel<T, W, C::nv, C::tpr, C::rpb, C::rows, C::blocks_per_sm>;
      if (!cuda::fits_shared_memory(kShared)) return false;
      static cuda::SharedMemoryLimit limit;
      limit.raise(kKernel, kShared);
      const int blocks = C::blocks(args.rows);
      allocate_partials(blocks);
      kKernel<<<blocks, C::threads, kShared, stream>>>(args);
      return true;
    });
    if (!launched) {
      cuda::with_vector_size<T>(vectorizable, [&](auto vec) {
        constexpr int kSize = decltype(vec)::value;
        at::Tensor means;
        cuda::RowMeans<A>* means_data = nullptr;
        if (need_dx || need_dweight) {
          means = at::empty({args.rows, 3}, dense_rstd.options());
          means_data = static_cast<cuda::RowMeans<A>*>(means.mutable_data_ptr());
          cuda::layer_norm_backward_rows_kernel<T, W, kSize, cuda::kLoopThreads>
              <<<cuda::grid_size(op, args.rows, 1), cuda::kLoopThreads, 0, stream>>>(args, means_data);
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        }
        const dim3 grid = cuda::column_grid(op, args.rows, args.cols, kSize);
        allocate_partials(grid.y);
        cuda::layer_norm_backward_columns_kernel<T, W, kSize, cuda::kColumnThreads>
            <<<grid, cuda::kColumnThreads, 0, stream>>>(args, means_data);
      });
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  cuda::sum_partial_sums(op, {partial_weight, dweight}, {partial_bias, dbias}, stream);
  return {dx, dweight, dbias};
}

}  // namespace liger
