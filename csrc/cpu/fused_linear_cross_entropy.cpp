#include "ops/fused_linear_cross_entropy.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "ops/fused_linear_cross_entropy_chunks.h"

namespace liger {

namespace {

double read(const at::Tensor& scale) {
  return scale.scalar_type() == at::kDouble ? *scale.const_data_ptr<double>()
                                            : *scale.const_data_ptr<float>();
}

// grad and out are contiguous; out may be grad.
void scale_into(const at::Tensor& grad, double factor, const at::Tensor& out) {
  cpu::kernels().scale({.dtype = grad.scalar_type(),
      .in = grad.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .size = grad.numel(),
      .factor = factor});
}

void scale_cpu(at::Tensor& grad, const at::Tensor& scale) {
  const double factor = read(scale);
  if (factor == 1) return;
  const auto dense = grad.contiguous();
  scale_into(dense, factor, dense);
  if (!dense.is_same(grad)) grad.copy_(dense);
}

// Enough rows that reading and writing the weight's gradient once a chunk costs little beside the products.
int64_t default_workspace(const at::Tensor& weight) {
  constexpr int64_t kLeast = int64_t{64} << 20;
  return std::max<int64_t>(kLeast, static_cast<int64_t>(weight.nbytes()) / 4);
}

const FusedLinearCrossEntropyDevice kCpu = {
    .rows = kCrossEntropyCpu,
    .addmm_float32 = addmm_float32_by_blocks,
    .scale = scale_cpu,
    .default_workspace = default_workspace,
    .row_alignment_bytes = 1,
};

}  // namespace

TensorTriple fused_linear_cross_entropy_cpu(const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, std::optional<at::ScalarType> compute_dtype) {
  auto [loss, z_loss, lse, dinput, dweight, dbias, grad_scale] = fused_linear_cross_entropy_forward_cpu(input,
      weight, target, bias, ce_weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction,
      num_items, accum_dtype, workspace_bytes, compute_dtype, false, false, false);
  return {loss, z_loss, lse};
}

FusedLinearCrossEntropyForward fused_linear_cross_entropy_forward_cpu(const at::Tensor& input,
    const at::Tensor& weight, const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, std::optional<at::ScalarType> compute_dtype, bool need_dinput,
    bool need_dweight, bool need_dbias) {
  constexpr auto op = "fused_linear_cross_entropy";
  const auto options = check_fused_linear_cross_entropy(op, input, weight, target, bias, ce_weight,
      ignore_index, label_smoothing, lse_square_scale, softcap, reduction, num_items, accum_dtype,
      workspace_bytes, compute_dtype);
  check_wanted_gradients(op, bias, need_dbias);
  return fused_linear_cross_entropy_forward_chunks(kCpu,
      {op, input, weight, target, bias, ce_weight, num_items, options, need_dinput, need_dweight,
          need_dbias});
}

TensorTriple fused_linear_cross_entropy_backward_cpu(const at::Tensor& dloss, const at::Tensor& input,
    const at::Tensor& weight, const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, std::optional<at::ScalarType> compute_dtype, bool need_dinput,
    bool need_dweight, bool need_dbias) {
  constexpr auto op = "fused_linear_cross_entropy_backward";
  const auto options =
      check_fused_linear_cross_entropy_backward(dloss, input, weight, target, bias, ce_weight, ignore_index,
          label_smoothing, lse_square_scale, softcap, accum_dtype, workspace_bytes, compute_dtype);
  check_wanted_gradients(op, bias, need_dbias);
  const std::optional<at::Tensor> no_num_items;
  return fused_linear_cross_entropy_backward_chunks(kCpu,
      {op, input, weight, target, bias, ce_weight, no_num_items, options, need_dinput, need_dweight,
          need_dbias},
      dloss);
}

at::Tensor fused_linear_cross_entropy_scale_cpu(const at::Tensor& grad, const at::Tensor& scale) {
  check_fused_linear_cross_entropy_scale(grad, scale);
  auto out = at::empty(grad.sizes(), grad.options());
  scale_into(grad.contiguous(), read(scale), out);
  return out;
}

void fused_linear_cross_entropy_scale_inplace_cpu(at::Tensor& grad, const at::Tensor& scale) {
  check_fused_linear_cross_entropy_scale(grad, scale);
  scale_cpu(grad, scale);
}

}  // namespace liger
