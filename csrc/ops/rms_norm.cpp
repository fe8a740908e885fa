#include "ops/rms_norm.h"

#include <ATen/ops/empty.h>

#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/rms_norm_checks.h"
#include "ops/rms_norm_node.h"

namespace liger {

namespace {
const auto& rms_norm_operator() {
  static const auto op = find_operator("liger::rms_norm", rms_norm);
  return op;
}
}  // namespace

TensorPair rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps, double offset,
    std::string_view casting_mode) {
  return rms_norm_operator().call(x, weight, eps, offset, casting_mode);
}

TensorPair rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    std::string_view casting_mode, bool need_dx, bool need_dweight) {
  static const auto op = find_operator("liger::rms_norm_backward", rms_norm_backward);
  return op.call(dy, x, weight, rstd, offset, casting_mode, need_dx, need_dweight);
}

namespace {

bool rounds_normalized(const char* op, std::string_view casting_mode) {
  TORCH_CHECK_VALUE(casting_mode == "llama" || casting_mode == "gemma" || casting_mode == "none",
      "liger::", op, ": casting_mode must be \"llama\", \"gemma\" or \"none\", got \"",
      std::string(casting_mode), "\"");
  return casting_mode == "llama";
}

void check_input_and_weight(const Argument& x, const std::optional<at::Tensor>& weight) {
  check_floating(x);
  check_dim_at_least(x, 1);
  if (weight) {
    const Argument weight_arg{x.op, "weight", *weight};
    check_same_device(weight_arg, x);
    check_same_dtype_or_float32(weight_arg, x);
    check_vector(weight_arg, x.tensor.sym_size(-1), "last dimension of ", x.name);
  }
}

}  // namespace

bool check_rms_norm_arguments(
    const Argument& x, const std::optional<at::Tensor>& weight, double eps, std::string_view casting_mode) {
  check_input_and_weight(x, weight);
  TORCH_CHECK_VALUE(eps >= 0, "liger::", x.op, ": eps must not be negative, got ", eps);
  return rounds_normalized(x.op, casting_mode);
}

bool check_rms_norm_backward_arguments(const at::Tensor& dy, const Argument& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& rstd, std::string_view casting_mode,
    bool need_dweight) {
  check_input_and_weight(x, weight);
  const Argument dy_arg{x.op, "dy", dy};
  check_same_device(dy_arg, x);
  check_same_dtype(dy_arg, x);
  check_same_shape(dy_arg, x);
  check_row_statistic({x.op, "rstd", rstd}, x);
  TORCH_CHECK_VALUE(
      weight.has_value() || !need_dweight, "liger::", x.op, ": need_dweight requires a weight, got none");
  return rounds_normalized(x.op, casting_mode);
}

bool check_rms_norm(
    const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps, std::string_view casting_mode) {
  return check_rms_norm_arguments({"rms_norm", "x", x}, weight, eps, casting_mode);
}

bool check_rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& rstd, std::string_view casting_mode,
    bool need_dweight) {
  return check_rms_norm_backward_arguments(
      dy, {"rms_norm_backward", "x", x}, weight, rstd, casting_mode, need_dweight);
}

TensorPair rms_norm_meta(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps,
    double /*offset*/, std::string_view casting_mode) {
  check_rms_norm(x, weight, eps, casting_mode);
  const auto leading = x.sym_sizes().slice(0, x.dim() - 1);
  return {at::empty_symint(x.sym_sizes(), x.options()),
      at::empty_symint(leading, x.options().dtype(accumulate_type(x.scalar_type())))};
}

TensorPair rms_norm_backward_meta(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double /*offset*/,
    std::string_view casting_mode, bool need_dx, bool need_dweight) {
  check_rms_norm_backward(dy, x, weight, rstd, casting_mode, need_dweight);
  return {need_dx ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty({0}, x.options()),
      need_dweight ? at::empty_symint(weight->sym_sizes(), weight->options()) : at::empty({0}, x.options())};
}

variable_list RmsNormBackward::backward(const variable_list& grads, Wanted wanted, const at::Tensor& x,
    const at::Tensor& weight, const at::Tensor& rstd, double offset, const std::string& casting_mode) {
  auto [dx, dweight] = rms_norm_backward(
      grads[0], x, optional_tensor(weight), rstd, offset, casting_mode, wanted[0], wanted[1]);
  return {wanted[0] ? dx : at::Tensor(), wanted[1] ? dweight : at::Tensor()};
}

at::Tensor RmsNormBackward::rebuild() {
  return std::get<0>(rms_norm(x.unpack(), unpack_parameter(weight), eps, offset, casting_mode));
}

TensorPair rms_norm_autograd(c10::DispatchKeySet keys, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, double eps, double offset, std::string_view casting_mode) {
  const auto node = make_node<RmsNormBackward>("rms_norm", x, weight);
  auto result = redispatch_below_autograd(rms_norm_operator(), keys, x, weight, eps, offset, casting_mode);
  if (node) {
    const auto& [y, rstd] = result;
    node->x = SavedVariable(x, /*is_output=*/false);
    node->weight = SavedVariable(weight, /*is_output=*/false);
    node->rstd = SavedVariable(rstd, /*is_output=*/false);
    node->offset = offset;
    node->casting_mode = casting_mode;
    node->eps = eps;
    torch::autograd::set_history(y, node);
    node->watch(y);
  }
  return result;
}

}  // namespace liger
