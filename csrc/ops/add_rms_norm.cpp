#include "ops/add_rms_norm.h"

#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/rms_norm_checks.h"

namespace liger {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

TensorTriple add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight, double eps, double offset, std::string_view casting_mode) {
  static const auto op = find_operator("liger::add_rms_norm", add_rms_norm);
  return op.call(x, residual, weight, eps, offset, casting_mode);
}

TensorTriple add_rms_norm_backward(const at::Tensor& dy, const std::optional<at::Tensor>& dsum,
    const at::Tensor& sum, const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    std::string_view casting_mode, bool need_dx, bool need_dresidual, bool need_dweight) {
  static const auto op = find_operator("liger::add_rms_norm_backward", add_rms_norm_backward);
  return op.call(dy, dsum, sum, weight, rstd, offset, casting_mode, need_dx, need_dresidual, need_dweight);
}

bool check_add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight, double eps, std::string_view casting_mode) {
  constexpr auto op = "add_rms_norm";
  const Argument x_arg{op, "x", x};
  const bool round_normalized = check_rms_norm_arguments(x_arg, weight, eps, casting_mode);
  const Argument residual_arg{op, "residual", residual};
  check_same_device(residual_arg, x_arg);
  check_same_dtype(residual_arg, x_arg);
  check_same_shape(residual_arg, x_arg);
  return round_normalized;
}

bool check_add_rms_norm_backward(const at::Tensor& dy, const std::optional<at::Tensor>& dsum,
    const at::Tensor& sum, const std::optional<at::Tensor>& weight, const at::Tensor& rstd,
    std::string_view casting_mode, bool need_dweight) {
  constexpr auto op = "add_rms_norm_backward";
  const Argument sum_arg{op, "sum", sum};
  const bool round_normalized =
      check_rms_norm_backward_arguments(dy, sum_arg, weight, rstd, casting_mode, need_dweight);
  if (dsum) {
    const Argument dsum_arg{op, "dsum", *dsum};
    check_same_device(dsum_arg, sum_arg);
    check_same_dtype(dsum_arg, sum_arg);
    check_same_shape(dsum_arg, sum_arg);
  }
  return round_normalized;
}

TensorTriple add_rms_norm_meta(const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight, double eps, double /*offset*/, std::string_view casting_mode) {
  check_add_rms_norm(x, residual, weight, eps, casting_mode);
  const auto leading = x.sym_sizes().slice(0, x.dim() - 1);
  return {at::empty_symint(x.sym_sizes(), x.options()), at::empty_symint(x.sym_sizes(), x.options()),
      at::empty_symint(leading, x.options().dtype(accumulate_type(x.scalar_type())))};
}

TensorTriple add_rms_norm_backward_meta(const at::Tensor& dy, const std::optional<at::Tensor>& dsum,
    const at::Tensor& sum, const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double /*offset*/,
    std::string_view casting_mode, bool need_dx, bool need_dresidual, bool need_dweight) {
  check_add_rms_norm_backward(dy, dsum, sum, weight, rstd, casting_mode, need_dweight);
  const auto like_sum = [&](bool needed) {
    return needed ? at::empty_symint(sum.sym_sizes(), sum.options()) : at::empty({0}, sum.options());
  };
  return {like_sum(need_dx), like_sum(need_dresidual),
      need_dweight ? at::empty_symint(weight->sym_sizes(), weight->options())
                   : at::empty({0}, sum.options())};
}

namespace {

class AddRmsNormFunction : public torch::autograd::Function<AddRmsNormFunction> {
 public:
  static constexpr bool is_traceable = true;

  // rstd leaves through a pointer, as in RmsNormFunction.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& residual,
      double eps, double offset, std::string_view casting_mode, at::Tensor* rstd_out,
      const std::optional<at::Tensor>& weight) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [y, sum, rstd] = add_rms_norm(x, residual, weight, eps, offset, casting_mode);
    ctx->save_for_backward({sum, weight.value_or(at::Tensor()), rstd});
    ctx->saved_data["offset"] = offset;
    ctx->saved_data["casting_mode"] = std::string(casting_mode);
    ctx->set_materialize_grads(false);
    *rstd_out = rstd;
    return {y, sum};
  }

  // dx = dresidual = dsum + the gradient of RMSNorm, added in float32 and rounded once.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(7);
    const auto &dy = grads[0], &dsum = grads[1];
    const bool need_dx = ctx->needs_input_grad(0);
    const bool need_dresidual = ctx->needs_input_grad(1);
    if (!dy.defined()) {
      // Only the sum was used.
      if (dsum.defined() && need_dx) result[0] = dsum.clone();
      if (dsum.defined() && need_dresidual) result[1] = dsum.clone();
      return result;
    }
    const auto saved = ctx->get_saved_variables();
    const auto weight = saved[1].defined() ? std::optional<at::Tensor>(saved[1]) : std::nullopt;
    const bool need_dweight = weight && ctx->needs_input_grad(2);
    auto [dx, dresidual, dweight] =
        add_rms_norm_backward(dy, dsum.defined() ? std::optional<at::Tensor>(dsum) : std::nullopt, saved[0],
            weight, saved[2], ctx->saved_data["offset"].toDouble(),
            ctx->saved_data["casting_mode"].toStringRef(), need_dx, need_dresidual, need_dweight);
    if (need_dx) result[0] = dx;
    if (need_dresidual) result[1] = dresidual;
    if (need_dweight) result[6] = dweight;
    return result;
  }
};

}  // namespace

TensorTriple add_rms_norm_autograd(const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight, double eps, double offset, std::string_view casting_mode) {
  at::Tensor rstd;
  auto out = AddRmsNormFunction::apply(x, residual, eps, offset, casting_mode, &rstd, weight);
  return {out[0], out[1], rstd};
}

}  // namespace liger
