#include "ops/add_rms_norm.h"

#include <ATen/ops/empty.h>

#include "ops/add_rms_norm_node.h"
#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/rms_norm.h"
#include "ops/rms_norm_checks.h"

namespace liger {

namespace {
const auto& add_rms_norm_operator() {
  static const auto op = find_operator("liger::add_rms_norm", add_rms_norm);
  return op;
}
}  // namespace

TensorTriple add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight, double eps, double offset, std::string_view casting_mode) {
  return add_rms_norm_operator().call(x, residual, weight, eps, offset, casting_mode);
}

TensorPair add_rms_norm_backward(const at::Tensor& dy, const std::optional<at::Tensor>& dsum,
    const at::Tensor& sum, const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    std::string_view casting_mode, bool need_dx, bool need_dweight) {
  static const auto op = find_operator("liger::add_rms_norm_backward", add_rms_norm_backward);
  return op.call(dy, dsum, sum, weight, rstd, offset, casting_mode, need_dx, need_dweight);
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

TensorPair add_rms_norm_backward_meta(const at::Tensor& dy, const std::optional<at::Tensor>& dsum,
    const at::Tensor& sum, const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double /*offset*/,
    std::string_view casting_mode, bool need_dx, bool need_dweight) {
  check_add_rms_norm_backward(dy, dsum, sum, weight, rstd, casting_mode, need_dweight);
  return {need_dx ? at::empty_symint(sum.sym_sizes(), sum.options()) : at::empty({0}, sum.options()),
      need_dweight ? at::empty_symint(weight->sym_sizes(), weight->options())
                   : at::empty({0}, sum.options())};
}

variable_list AddRmsNormBackward::backward(const variable_list& grads, Wanted wanted, const at::Tensor& sum,
    const at::Tensor& weight, const at::Tensor& rstd, double offset, const std::string& casting_mode) {
  const auto &dy = grads[0], &dsum = grads[1];
  at::Tensor dx = dsum, dweight;  // where only the sum was used
  if (dy.defined()) {
    std::tie(dx, dweight) = add_rms_norm_backward(dy, optional_tensor(dsum), sum, optional_tensor(weight),
        rstd, offset, casting_mode, wanted[0] || wanted[1], wanted[2]);
  }
  return {wanted[0] ? dx : at::Tensor(), wanted[1] ? dx : at::Tensor(), wanted[2] ? dweight : at::Tensor()};
}

at::Tensor AddRmsNormBackward::rebuild() {
  return std::get<0>(rms_norm(sum.unpack(getptr()), unpack_parameter(weight), eps, offset, casting_mode));
}

TensorTriple add_rms_norm_autograd(c10::DispatchKeySet keys, const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight, double eps, double offset, std::string_view casting_mode) {
  const auto node = make_node<AddRmsNormBackward>("add_rms_norm", x, residual, weight);
  auto result = redispatch_below_autograd(
      add_rms_norm_operator(), keys, x, residual, weight, eps, offset, casting_mode);
  if (node) {
    const auto& [y, sum, rstd] = result;
    torch::autograd::set_history(y, node);
    node->watch(y);
    torch::autograd::set_history(sum, node);
    // After it has its history: saved before, the sum would keep its own node alive.
    node->sum = SavedVariable(sum, /*is_output=*/true);
    node->weight = SavedVariable(weight, /*is_output=*/false);
    node->rstd = SavedVariable(rstd, /*is_output=*/false);
    node->offset = offset;
    node->casting_mode = casting_mode;
    node->eps = eps;
  }
  return result;
}

}  // namespace liger
