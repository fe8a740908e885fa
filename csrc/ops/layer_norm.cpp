#include "ops/layer_norm.h"

#include <ATen/ops/empty.h>

#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/layer_norm_node.h"

namespace liger {

namespace {
const auto& layer_norm_operator() {
  static const auto op = find_operator("liger::layer_norm", layer_norm);
  return op;
}
}  // namespace

TensorTriple layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps) {
  return layer_norm_operator().call(x, weight, bias, eps);
}

TensorTriple layer_norm_backward(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& mean, const at::Tensor& rstd,
    at::ScalarType bias_dtype, bool need_dx, bool need_dweight, bool need_dbias) {
  static const auto op = find_operator("liger::layer_norm_backward", layer_norm_backward);
  return op.call(dy, x, weight, mean, rstd, bias_dtype, need_dx, need_dweight, need_dbias);
}

namespace {

void check_input(const Argument& x) {
  check_floating(x);
  check_dim_at_least(x, 1);
}

void check_affine(const Argument& arg, const Argument& x) {
  check_same_device(arg, x);
  check_same_dtype_or_float32(arg, x);
  check_vector(arg, x.tensor.sym_size(-1), "last dimension of ", x.name);
}

}  // namespace

void check_layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps) {
  constexpr auto op = "layer_norm";
  const Argument x_arg{op, "x", x};
  check_input(x_arg);
  if (weight) check_affine({op, "weight", *weight}, x_arg);
  if (bias) check_affine({op, "bias", *bias}, x_arg);
  TORCH_CHECK_VALUE(eps >= 0, "liger::", op, ": eps must not be negative, got ", eps);
}

void check_layer_norm_backward(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& mean, const at::Tensor& rstd,
    at::ScalarType bias_dtype, bool need_dweight) {
  constexpr auto op = "layer_norm_backward";
  const Argument x_arg{op, "x", x};
  check_input(x_arg);
  if (weight) check_affine({op, "weight", *weight}, x_arg);
  const Argument dy_arg{op, "dy", dy};
  check_same_device(dy_arg, x_arg);
  check_same_dtype(dy_arg, x_arg);
  check_same_shape(dy_arg, x_arg);
  check_row_statistic({op, "mean", mean}, x_arg);
  check_row_statistic({op, "rstd", rstd}, x_arg);
  TORCH_CHECK_TYPE(bias_dtype == x.scalar_type() || bias_dtype == accumulate_type(x.scalar_type()),
      "liger::", op, ": bias_dtype must be ", dtype_name(x.scalar_type()),
      " (dtype of x) or float32 beside a 16-bit x", ", got ", dtype_name(bias_dtype));
  TORCH_CHECK_VALUE(
      weight.has_value() || !need_dweight, "liger::", op, ": need_dweight requires a weight, got none");
}

LayerNormAffine::LayerNormAffine(
    const at::Tensor& x, const std::optional<at::Tensor>& weight_, const std::optional<at::Tensor>& bias_)
    : dtype(x.scalar_type()) {
  for (const auto* parameter : {&weight_, &bias_}) {
    if (*parameter && (*parameter)->scalar_type() != x.scalar_type()) dtype = (*parameter)->scalar_type();
  }
  if (weight_) weight = weight_->to(dtype).contiguous();
  if (bias_) bias = bias_->to(dtype).contiguous();
}

TensorTriple layer_norm_meta(const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps) {
  check_layer_norm(x, weight, bias, eps);
  const auto leading = x.sym_sizes().slice(0, x.dim() - 1);
  const auto statistics = x.options().dtype(accumulate_type(x.scalar_type()));
  return {at::empty_symint(x.sym_sizes(), x.options()), at::empty_symint(leading, statistics),
      at::empty_symint(leading, statistics)};
}

TensorTriple layer_norm_backward_meta(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& mean, const at::Tensor& rstd,
    at::ScalarType bias_dtype, bool need_dx, bool need_dweight, bool need_dbias) {
  check_layer_norm_backward(dy, x, weight, mean, rstd, bias_dtype, need_dweight);
  const auto nothing = [&] { return at::empty({0}, x.options()); };
  return {need_dx ? at::empty_symint(x.sym_sizes(), x.options()) : nothing(),
      need_dweight ? at::empty_symint(weight->sym_sizes(), weight->options()) : nothing(),
      need_dbias ? at::empty_symint({x.sym_size(-1)}, x.options().dtype(bias_dtype)) : nothing()};
}

variable_list LayerNormBackward::backward(const variable_list& grads, Wanted wanted, const at::Tensor& x,
    const at::Tensor& weight, const at::Tensor& mean, const at::Tensor& rstd, at::ScalarType bias_dtype) {
  auto [dx, dweight, dbias] = layer_norm_backward(
      grads[0], x, optional_tensor(weight), mean, rstd, bias_dtype, wanted[0], wanted[1], wanted[2]);
  return {
      wanted[0] ? dx : at::Tensor(), wanted[1] ? dweight : at::Tensor(), wanted[2] ? dbias : at::Tensor()};
}

at::Tensor LayerNormBackward::rebuild() {
  return std::get<0>(layer_norm(x.unpack(), unpack_parameter(weight), unpack_parameter(bias), eps));
}

TensorTriple layer_norm_autograd(c10::DispatchKeySet keys, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps) {
  const auto node = make_node<LayerNormBackward>("layer_norm", x, weight, bias);
  auto result = redispatch_below_autograd(layer_norm_operator(), keys, x, weight, bias, eps);
  if (node) {
    const auto& [y, mean, rstd] = result;
    node->x = SavedVariable(x, /*is_output=*/false);
    node->weight = SavedVariable(weight, /*is_output=*/false);
    node->mean = SavedVariable(mean, /*is_output=*/false);
    node->rstd = SavedVariable(rstd, /*is_output=*/false);
    node->bias = SavedVariable(bias, /*is_output=*/false);
    node->eps = eps;
    node->bias_dtype = bias ? bias->scalar_type() : x.scalar_type();
    torch::autograd::set_history(y, node);
    node->watch(y);
  }
  return result;
}

}  // namespace liger
