#include "ops/layer_norm.h"

#include <ATen/ops/empty.h>

#include "cpu/kernels.h"
#include "cpu/row_blocks.h"
#include "ops/checks.h"
#include "ops/rows.h"

namespace liger {

TensorTriple layer_norm_cpu(const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps) {
  check_layer_norm(x, weight, bias, eps);
  const auto leading = x.sizes().slice(0, x.dim() - 1);
  const auto statistics = x.options().dtype(accumulate_type(x.scalar_type()));
  auto y = at::empty(x.sizes(), x.options());
  auto mean = at::empty(leading, statistics);
  auto rstd = at::empty(leading, statistics);
  const auto x_rows = as_rows(x);
  const LayerNormAffine affine(x, weight, bias);
  cpu::kernels().layer_norm_forward(cpu::LayerNormForward{.dtype = x.scalar_type(),
      .affine_dtype = affine.dtype,
      .x = x_rows.data(),
      .weight = weight ? affine.weight.const_data_ptr() : nullptr,
      .bias = bias ? affine.bias.const_data_ptr() : nullptr,
      .y = y.mutable_data_ptr(),
      .mean = mean.mutable_data_ptr(),
      .rstd = rstd.mutable_data_ptr(),
      .rows = x_rows.rows,
      .cols = x_rows.cols,
      .x_stride = x_rows.stride,
      .eps = eps});
  return {y, mean, rstd};
}

TensorTriple layer_norm_backward_cpu(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& mean, const at::Tensor& rstd,
    at::ScalarType bias_dtype, bool need_dx, bool need_dweight, bool need_dbias) {
  check_layer_norm_backward(dy, x, weight, mean, rstd, bias_dtype, need_dweight);
  const auto x_rows = as_rows(x), dy_rows = as_rows(dy);
  const int64_t cols = x_rows.cols;
  auto dx = at::empty(need_dx ? x.sizes() : at::IntArrayRef{0}, x.options());
  auto dweight = need_dweight ? at::empty({cols}, weight->options()) : at::empty({0}, x.options());
  auto dbias = need_dbias ? at::empty({cols}, x.options().dtype(bias_dtype)) : at::empty({0}, x.options());
  const auto dense_weight = weight ? weight->contiguous() : at::Tensor();
  const auto dense_mean = mean.contiguous(), dense_rstd = rstd.contiguous();
  const int64_t blocks = cpu::row_blocks(x_rows.rows);
  const auto partial_for = [&](bool needed) {
    return needed ? at::empty({blocks, cols}, rstd.options()) : at::Tensor();
  };
  const auto partial_weight = partial_for(need_dweight), partial_bias = partial_for(need_dbias);
  cpu::kernels().layer_norm_backward(cpu::LayerNormBackward{.dtype = x.scalar_type(),
      .weight_dtype = weight ? weight->scalar_type() : x.scalar_type(),
      .bias_dtype = bias_dtype,
      .dy = dy_rows.data(),
      .x = x_rows.data(),
      .weight = weight ? dense_weight.const_data_ptr() : nullptr,
      .mean = dense_mean.const_data_ptr(),
      .rstd = dense_rstd.const_data_ptr(),
      .dx = need_dx ? dx.mutable_data_ptr() : nullptr,
      .partial_weight = need_dweight ? partial_weight.mutable_data_ptr() : nullptr,
      .partial_bias = need_dbias ? partial_bias.mutable_data_ptr() : nullptr,
      .dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr,
      .dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr,
      .rows = x_rows.rows,
      .cols = cols,
      .dy_stride = dy_rows.stride,
      .x_stride = x_rows.stride,
      .row_blocks = blocks});
  return {dx, dweight, dbias};
}

}  // namespace liger
