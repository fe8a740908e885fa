#include "ops/add_rms_norm.h"

#include <ATen/ops/empty.h>

#include "cpu/kernels.h"
#include "cpu/row_blocks.h"
#include "ops/checks.h"
#include "ops/rows.h"

namespace liger {

TensorTriple add_rms_norm_cpu(const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight, double eps, double offset, std::string_view casting_mode) {
  const bool round_normalized = check_add_rms_norm(x, residual, weight, eps, casting_mode);
  auto y = at::empty(x.sizes(), x.options());
  auto sum = at::empty(x.sizes(), x.options());
  auto rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(accumulate_type(x.scalar_type())));
  const auto x_rows = as_rows(x), residual_rows = as_rows(residual);
  const auto dense_weight = weight ? weight->contiguous() : at::Tensor();
  cpu::kernels().rms_norm_forward(cpu::RmsNormForward{.dtype = x.scalar_type(),
      .weight_dtype = weight ? weight->scalar_type() : x.scalar_type(),
      .x = x_rows.data(),
      .residual = residual_rows.data(),
      .weight = weight ? dense_weight.const_data_ptr() : nullptr,
      .sum = sum.mutable_data_ptr(),
      .y = y.mutable_data_ptr(),
      .rstd = rstd.mutable_data_ptr(),
      .rows = x_rows.rows,
      .cols = x_rows.cols,
      .x_stride = x_rows.stride,
      .residual_stride = residual_rows.stride,
      .eps = eps,
      .offset = offset,
      .round_normalized = round_normalized});
  return {y, sum, rstd};
}

TensorPair add_rms_norm_backward_cpu(const at::Tensor& dy, const std::optional<at::Tensor>& dsum,
    const at::Tensor& sum, const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    std::string_view casting_mode, bool need_dx, bool need_dweight) {
  const bool round_normalized =
      check_add_rms_norm_backward(dy, dsum, sum, weight, rstd, casting_mode, need_dweight);
  auto dx = at::empty(need_dx ? sum.sizes() : at::IntArrayRef{0}, sum.options());
  auto dweight = need_dweight ? at::empty(weight->sizes(), weight->options()) : at::empty({0}, sum.options());
  const auto sum_rows = as_rows(sum), dy_rows = as_rows(dy);
  const auto dsum_rows = dsum ? as_rows(*dsum) : Rows{};
  const auto dense_weight = weight ? weight->contiguous() : at::Tensor();
  const auto dense_rstd = rstd.contiguous();
  const int64_t blocks = cpu::row_blocks(sum_rows.rows);
  const auto partial = need_dweight ? at::empty({blocks, sum_rows.cols}, dense_rstd.options()) : at::Tensor();
  cpu::kernels().rms_norm_backward(cpu::RmsNormBackward{.dtype = sum.scalar_type(),
      .weight_dtype = weight ? weight->scalar_type() : sum.scalar_type(),
      .dy = dy_rows.data(),
      .dsum = dsum ? dsum_rows.data() : nullptr,
      .x = sum_rows.data(),
      .weight = weight ? dense_weight.const_data_ptr() : nullptr,
      .rstd = dense_rstd.const_data_ptr(),
      .dx = need_dx ? dx.mutable_data_ptr() : nullptr,
      .partial = need_dweight ? partial.mutable_data_ptr() : nullptr,
      .dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr,
      .rows = sum_rows.rows,
      .cols = sum_rows.cols,
      .dy_stride = dy_rows.stride,
      .dsum_stride = dsum_rows.stride,
      .x_stride = sum_rows.stride,
      .row_blocks = blocks,
      .offset = offset,
      .round_normalized = round_normalized});
  return {dx, dweight};
}

}  // namespace liger
