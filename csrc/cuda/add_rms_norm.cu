#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cuda/rms_norm_launch.h"
#include "ops/add_rms_norm.h"
#include "ops/checks.h"
#include "ops/rows.h"

namespace liger {

TensorTriple add_rms_norm_cuda(const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight, double eps, double offset, std::string_view casting_mode) {
  const bool round_normalized = check_add_rms_norm(x, residual, weight, eps, casting_mode);
  const c10::cuda::CUDAGuard device_guard(x.device());
  auto y = at::empty(x.sizes(), x.options());
  auto sum = at::empty(x.sizes(), x.options());
  auto rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(accumulate_type(x.scalar_type())));
  if (rstd.numel() == 0) return {y, sum, rstd};
  const auto x_rows = as_rows(x), residual_rows = as_rows(residual);
  const auto dense_weight = weight ? weight->contiguous() : at::Tensor();
  const auto weight_dtype = weight ? weight->scalar_type() : x.scalar_type();

  cuda::dispatch_floating_pair(x.scalar_type(), weight_dtype, [&](auto element, auto weight_element) {
    using T = decltype(element);
    using W = decltype(weight_element);
    using A = cuda::Accumulate<T>;
    cuda::RmsNormArguments<T, W> args = {};
    args.x = static_cast<const T*>(x_rows.data());
    args.residual = static_cast<const T*>(residual_rows.data());
    args.weight = weight ? static_cast<const W*>(dense_weight.const_data_ptr()) : nullptr;
    args.sum = static_cast<T*>(sum.mutable_data_ptr());
    args.y = static_cast<T*>(y.mutable_data_ptr());
    args.rstd = static_cast<A*>(rstd.mutable_data_ptr());
    args.rows = x_rows.rows;
    args.x_stride = x_rows.stride;
    args.residual_stride = residual_rows.stride;
    args.cols = cuda::size_int32("add_rms_norm", "the last dimension of x", x_rows.cols);
    args.eps = static_cast<A>(eps);
    args.offset = static_cast<A>(offset);
    args.round_normalized = round_normalized;
    cuda::launch_rms_norm_forward<true>("add_rms_norm", args, at::cuda::getCurrentCUDAStream());
  });
  return {y, sum, rstd};
}

TensorPair add_rms_norm_backward_cuda(const at::Tensor& dy, const std::optional<at::Tensor>& dsum,
    const at::Tensor& sum, const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    std::string_view casting_mode, bool need_dx, bool need_dweight) {
  constexpr auto op = "add_rms_norm_backward";
  const bool round_normalized =
      check_add_rms_norm_backward(dy, dsum, sum, weight, rstd, casting_mode, need_dweight);
  const c10::cuda::CUDAGuard device_guard(sum.device());
  auto dx = at::empty(need_dx ? sum.sizes() : at::IntArrayRef{0}, sum.options());
  if (sum.numel() == 0) {
    return {dx, need_dweight ? at::zeros(weight->sizes(), weight->options()) : at::empty({0}, sum.options())};
  }
  auto dweight = need_dweight ? at::empty(weight->sizes(), weight->options()) : at::Tensor();
  const auto sum_rows = as_rows(sum), dy_rows = as_rows(dy);
  const auto dsum_rows = dsum ? as_rows(*dsum) : Rows{};
  const auto dense_weight = weight ? weight->contiguous() : at::Tensor();
  const auto dense_rstd = rstd.contiguous();
  const auto weight_dtype = weight ? weight->scalar_type() : sum.scalar_type();

  cuda::dispatch_floating_pair(sum.scalar_type(), weight_dtype, [&](auto element, auto weight_element) {
    using T = decltype(element);
    using W = decltype(weight_element);
    using A = cuda::Accumulate<T>;
    cuda::RmsNormBackwardArguments<T, W> args = {};
    args.dy = static_cast<const T*>(dy_rows.data());
    args.dsum = dsum ? static_cast<const T*>(dsum_rows.data()) : nullptr;
    args.x = static_cast<const T*>(sum_rows.data());
    args.weight = weight ? static_cast<const W*>(dense_weight.const_data_ptr()) : nullptr;
    args.rstd = static_cast<const A*>(dense_rstd.const_data_ptr());
    args.dx = need_dx ? static_cast<T*>(dx.mutable_data_ptr()) : nullptr;
    args.rows = sum_rows.rows;
    args.dy_stride = dy_rows.stride;
    args.dsum_stride = dsum_rows.stride;
    args.x_stride = sum_rows.stride;
    args.cols = cuda::size_int32(op, "the last dimension of sum", sum_rows.cols);
    args.offset = static_cast<A>(offset);
    args.round_normalized = round_normalized;
    cuda::launch_rms_norm_backward<true>(
        op, args, dweight, dense_rstd.options(), at::cuda::getCurrentCUDAStream());
  });
  return {dx, need_dweight ? dweight : at::empty({0}, sum.options())};
}

}  // namespace liger
