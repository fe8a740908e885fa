#include "cuda/rms_norm.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "cuda/launch.h"
#include "ops/checks.h"
#include "ops/rms_norm.h"
#include "ops/rows.h"

namespace liger {

namespace {

constexpr int kAnyThreads = 512;

// Shapes of the register-resident kernels: NV vectors a thread, TPR threads a row, RPB rows a block.
template <int NV, int TPR, int RPB, int BLOCKS_PER_SM = 1>
struct Config {
  static constexpr int nv = NV, tpr = TPR, rpb = RPB, blocks_per_sm = BLOCKS_PER_SM;
  static constexpr int threads = TPR * RPB;
};

// f(Config) with the narrowest forward kernel that holds a row of `vectors` 16-byte vectors; false if none
// does.
template <typename F>
bool with_forward_config(int64_t vectors, const F& f) {
  if (vectors <= 32) return f(Config<1, 32, 4>{}), true;
  if (vectors <= 64) return f(Config<2, 32, 4>{}), true;
  if (vectors <= 128) return f(Config<4, 32, 4>{}), true;
  if (vectors <= 256) return f(Config<2, 128, 1>{}), true;
  if (vectors <= 512) return f(Config<4, 128, 1>{}), true;
  if (vectors <= 1024) return f(Config<4, 256, 1>{}), true;
  if (vectors <= 2048) return f(Config<4, 512, 1>{}), true;
  if (vectors <= 4096) return f(Config<4, 1024, 1>{}), true;
  return false;
}

template <typename F>
bool with_backward_config(int64_t vectors, const F& f) {
  if (vectors <= 32) return f(Config<1, 32, 8, 4>{}), true;
  if (vectors <= 64) return f(Config<2, 32, 8, 3>{}), true;
  if (vectors <= 128) return f(Config<1, 128, 1, 8>{}), true;
  if (vectors <= 256) return f(Config<2, 128, 1, 6>{}), true;
  if (vectors <= 512) return f(Config<2, 256, 1, 3>{}), true;
  if (vectors <= 1024) return f(Config<2, 512, 1, 1>{}), true;
  if (vectors <= 2048) return f(Config<4, 512, 1, 1>{}), true;
  return false;
}

}  // namespace

TensorPair rms_norm_cuda(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps,
    double offset, std::string_view casting_mode) {
  const bool round_normalized = check_rms_norm(x, weight, eps, casting_mode);
  const c10::cuda::CUDAGuard device_guard(x.device());
  auto y = at::empty(x.sizes(), x.options());
  auto rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(accumulate_type(x.scalar_type())));
  if (rstd.numel() == 0) return {y, rstd};
  const auto x_rows = as_rows(x);
  const auto dense_weight = weight ? weight->contiguous() : at::Tensor();
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto weight_dtype = weight ? weight->scalar_type() : x.scalar_type();

  cuda::dispatch_floating_pair(x.scalar_type(), weight_dtype, [&](auto element, auto weight_element) {
    using T = decltype(element);
    using W = decltype(weight_element);
    using A = cuda::Accumulate<T>;
    constexpr int kVec = cuda::kVecSize<T>;
    const cuda::RmsNormArguments<T, W> args = {static_cast<const T*>(x_rows.data()),
        weight ? static_cast<const W*>(dense_weight.const_data_ptr()) : nullptr,
        static_cast<T*>(y.mutable_data_ptr()), static_cast<A*>(rstd.mutable_data_ptr()), x_rows.rows,
        x_rows.stride, cuda::size_int32("rms_norm", "the last dimension of x", x_rows.cols),
        static_cast<A>(eps), static_cast<A>(offset), round_normalized};
    const bool vectorizable = x_rows.cols % kVec == 0 &&
        cuda::aligned_pointers(args.x, args.y, args.weight) &&
        cuda::aligned_strides(sizeof(T), x_rows.stride);
    const bool launched = vectorizable && with_forward_config(x_rows.cols / kVec, [&](auto config) {
      using C = decltype(config);
      const auto blocks = cuda::grid_size("rms_norm", args.rows, C::rpb);
      cuda::rms_norm_forward_kernel<T, W, kVec, C::nv, C::tpr, C::rpb>
          <<<blocks, C::threads, 0, stream>>>(args);
    });
    if (!launched) {
      const auto blocks = cuda::grid_size("rms_norm", args.rows, 1);
      cuda::rms_norm_forward_any_kernel<T, W, kAnyThreads><<<blocks, kAnyThreads, 0, stream>>>(args);
    }
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, rstd};
}

TensorPair rms_norm_backward_cuda(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    std::string_view casting_mode, bool need_dx, bool need_dweight) {
  const bool round_normalized = check_rms_norm_backward(dy, x, weight, rstd, casting_mode, need_dweight);
  const c10::cuda::CUDAGuard device_guard(x.device());
  auto dx = at::empty(need_dx ? x.sizes() : at::IntArrayRef{0}, x.options());
  if (x.numel() == 0) {
    return {dx, need_dweight ? at::zeros(weight->sizes(), weight->options()) : at::empty({0}, x.options())};
  }
  auto dweight = need_dweight ? at::empty(weight->sizes(), weight->options()) : at::empty({0}, x.options());
  const auto x_rows = as_rows(x), dy_rows = as_rows(dy);
  const auto dense_weight = weight ? weight->contiguous() : at::Tensor();
  const auto dense_rstd = rstd.contiguous();
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto weight_dtype = weight ? weight->scalar_type() : x.scalar_type();

  cuda::dispatch_floating_pair(x.scalar_type(), weight_dtype, [&](auto element, auto weight_element) {
    using T = decltype(element);
    using W = decltype(weight_element);
    using A = cuda::Accumulate<T>;
    constexpr int kVec = cuda::kVecSize<T>;
    const int cols = cuda::size_int32("rms_norm_backward", "the last dimension of x", x_rows.cols);
    at::Tensor partial;
    cuda::RmsNormBackwardArguments<T, W> args = {static_cast<const T*>(dy_rows.data()),
        static_cast<const T*>(x_rows.data()),
        weight ? static_cast<const W*>(dense_weight.const_data_ptr()) : nullptr,
        static_cast<const A*>(dense_rstd.const_data_ptr()),
        need_dx ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr, nullptr, x_rows.rows, dy_rows.stride,
        x_rows.stride, cols, static_cast<A>(offset), round_normalized};
    // A persistent grid: as many blocks as run at once, each leaving one row of partial sums.
    int blocks = 0;
    const auto allocate = [&](int64_t wanted, int blocks_per_sm) {
      blocks = static_cast<int>(std::min<int64_t>(wanted, cuda::multiprocessors() * blocks_per_sm));
      if (!need_dweight) return;
      partial = at::empty({blocks, cols}, dense_rstd.options());
      args.partial = static_cast<A*>(partial.mutable_data_ptr());
    };
    const bool vectorizable = cols % kVec == 0 &&
        cuda::aligned_pointers(args.dy, args.x, args.dx, args.weight) &&
        cuda::aligned_strides(sizeof(T), x_rows.stride, dy_rows.stride);
    const bool launched = vectorizable && with_backward_config(cols / kVec, [&](auto config) {
      using C = decltype(config);
      allocate((args.rows + C::rpb - 1) / C::rpb, C::blocks_per_sm);
      cuda::rms_norm_backward_kernel<T, W, kVec, C::nv, C::tpr, C::rpb, C::blocks_per_sm>
          <<<blocks, C::threads, 0, stream>>>(args);
    });
    if (!launched) {
      allocate(args.rows, 2048 / kAnyThreads);
      cuda::rms_norm_backward_any_kernel<T, W, kAnyThreads><<<blocks, kAnyThreads, 0, stream>>>(args);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (need_dweight) {
      const dim3 threads(cuda::kColumnSumWidth, cuda::kColumnSumHeight);
      const auto column_blocks = cuda::grid_size("rms_norm_backward", cols, cuda::kColumnSumWidth);
      cuda::column_sum_kernel<A, W><<<column_blocks, threads, 0, stream>>>(
          args.partial, static_cast<W*>(dweight.mutable_data_ptr()), blocks, cols);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return {dx, dweight};
}

}  // namespace liger
