#include "ops/fused_linear_cross_entropy.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>

#include <utility>

#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/node.h"

namespace liger {

CrossEntropyOutputs fused_linear_cross_entropy(const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens, std::optional<at::ScalarType> compute_dtype) {
  static const auto op = find_operator("liger::fused_linear_cross_entropy", fused_linear_cross_entropy);
  return op.call(input, weight, target, bias, ce_weight, ignore_index, label_smoothing, lse_square_scale,
      softcap, reduction, num_items, accum_dtype, workspace_bytes, use_token_scaling, return_token_accuracy,
      return_predicted_tokens, compute_dtype);
}

FusedLinearCrossEntropyForward fused_linear_cross_entropy_forward(const at::Tensor& input,
    const at::Tensor& weight, const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens, std::optional<at::ScalarType> compute_dtype, bool need_dinput,
    bool need_dweight, bool need_dbias) {
  static const auto op =
      find_operator("liger::fused_linear_cross_entropy_forward", fused_linear_cross_entropy_forward);
  return op.call(input, weight, target, bias, ce_weight, ignore_index, label_smoothing, lse_square_scale,
      softcap, reduction, num_items, accum_dtype, workspace_bytes, use_token_scaling, return_token_accuracy,
      return_predicted_tokens, compute_dtype, need_dinput, need_dweight, need_dbias);
}

FusedLinearCrossEntropyGradients fused_linear_cross_entropy_backward(const at::Tensor& dloss,
    const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& ce_weight, int64_t ignore_index,
    double label_smoothing, double lse_square_scale, std::optional<double> softcap,
    std::optional<at::ScalarType> accum_dtype, std::optional<int64_t> workspace_bytes, bool use_token_scaling,
    std::optional<at::ScalarType> compute_dtype, bool need_dinput, bool need_dweight, bool need_dbias) {
  static const auto op =
      find_operator("liger::fused_linear_cross_entropy_backward", fused_linear_cross_entropy_backward);
  return op.call(dloss, input, weight, target, bias, ce_weight, ignore_index, label_smoothing,
      lse_square_scale, softcap, accum_dtype, workspace_bytes, use_token_scaling, compute_dtype, need_dinput,
      need_dweight, need_dbias);
}

namespace {

void check_product_operand(const Argument& arg, const Argument& input, bool mixed_dtypes) {
  check_same_device(arg, input);
  check_floating(arg);
  const auto dtype = arg.tensor.scalar_type();
  const auto expected = input.tensor.scalar_type();
  TORCH_CHECK_TYPE(mixed_dtypes || dtype == expected, "liger::", arg.op, ": ", arg.name, " must have dtype ",
      dtype_name(expected), " (dtype of ", input.name, "), got ", dtype_name(dtype),
      "; cast one of them, or use torch.autocast");
}

}  // namespace

FusedLinearCrossEntropyOptions check_fused_linear_cross_entropy(const char* op, const at::Tensor& input,
    const at::Tensor& weight, const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens, std::optional<at::ScalarType> compute_dtype) {
  const Argument input_arg{op, "input", input};
  const Argument weight_arg{op, "weight", weight};
  check_floating(input_arg);
  check_dim(input_arg, 2);
  check_product_operand(weight_arg, input_arg, compute_dtype.has_value());
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && weight.sym_size(1).sym_eq(input.sym_size(1)).expect_true(__FILE__, __LINE__),
      "liger::", op, ": weight must have shape [classes, ", input.sym_size(1),
      "] (last dimension of input), got ", weight.sym_sizes());
  const auto classes = weight.sym_size(0);
  if (bias) {
    const Argument bias_arg{op, "bias", *bias};
    check_product_operand(bias_arg, input_arg, compute_dtype.has_value());
    check_vector(bias_arg, classes, "rows of weight");
  }
  if (compute_dtype) {
    TORCH_CHECK_TYPE(*compute_dtype == at::kBFloat16 || *compute_dtype == at::kHalf, "liger::", op,
        ": compute_dtype must be bfloat16 or float16, got ", dtype_name(*compute_dtype));
    TORCH_CHECK_TYPE(input.scalar_type() != at::kDouble && weight.scalar_type() != at::kDouble &&
            (!bias || bias->scalar_type() != at::kDouble),
        "liger::", op, ": float64 arguments cannot be computed in ", dtype_name(*compute_dtype));
  }
  check_target_and_class_weight(op, target, ce_weight, "ce_weight", input, "input", classes);

  const auto compute = compute_dtype.value_or(input.scalar_type());
  const auto wide = accumulate_type(compute);
  TORCH_CHECK_TYPE(!accum_dtype || *accum_dtype == at::kFloat || *accum_dtype == wide ||
          *accum_dtype == weight.scalar_type(),
      "liger::", op, ": accum_dtype must be float32 or the weight's dtype ", dtype_name(weight.scalar_type()),
      ", got ", dtype_name(*accum_dtype));
  const auto accumulate = accum_dtype.value_or(weight.scalar_type());
  TORCH_CHECK_VALUE(!workspace_bytes || *workspace_bytes > 0, "liger::", op,
      ": workspace_bytes must be positive, got ", workspace_bytes.value_or(0));

  check_num_items(op, num_items, input, "input", reduction);
  return {.loss = check_cross_entropy_options(op, ignore_index, label_smoothing, lse_square_scale, softcap,
              reduction, use_token_scaling, return_token_accuracy, return_predicted_tokens),
      .compute_dtype = compute,
      // The products come in compute_dtype or wider: no sum of float64 in float32, or of one 16-bit dtype in
      // the other.
      .accum_dtype = accumulate == compute ? compute : wide,
      .workspace_bytes = workspace_bytes};
}

FusedLinearCrossEntropyOptions check_fused_linear_cross_entropy_backward(const at::Tensor& dloss,
    const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& ce_weight, int64_t ignore_index,
    double label_smoothing, double lse_square_scale, std::optional<double> softcap,
    std::optional<at::ScalarType> accum_dtype, std::optional<int64_t> workspace_bytes, bool use_token_scaling,
    std::optional<at::ScalarType> compute_dtype) {
  constexpr auto op = "fused_linear_cross_entropy_backward";
  const auto options = check_fused_linear_cross_entropy(op, input, weight, target, bias, ce_weight,
      ignore_index, label_smoothing, lse_square_scale, softcap, "none", /*num_items=*/{}, accum_dtype,
      workspace_bytes, use_token_scaling, /*return_token_accuracy=*/false, /*return_predicted_tokens=*/false,
      compute_dtype);
  const Argument input_arg{op, "input", input};
  const Argument dloss_arg{op, "dloss", dloss};
  check_same_device(dloss_arg, input_arg);
  const auto wide = accumulate_type(options.compute_dtype);
  TORCH_CHECK_TYPE(dloss.scalar_type() == wide, "liger::", op, ": dloss must have dtype ", dtype_name(wide),
      ", got ", dtype_name(dloss.scalar_type()));
  check_leading_shape(dloss_arg, input_arg, 1);
  return options;
}

void check_wanted_gradients(const char* op, const std::optional<at::Tensor>& bias, bool need_dbias) {
  TORCH_CHECK_VALUE(bias || !need_dbias, "liger::", op, ": need_dbias requires a bias, got none");
}

CrossEntropyOutputs fused_linear_cross_entropy_from_forward(const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens, std::optional<at::ScalarType> compute_dtype) {
  auto [loss, z_loss, lse, token_accuracy, predicted_tokens, dinput, dweight, dbias, grad_scale] =
      fused_linear_cross_entropy_forward(input, weight, target, bias, ce_weight, ignore_index,
          label_smoothing, lse_square_scale, softcap, reduction, num_items, accum_dtype, workspace_bytes,
          use_token_scaling, return_token_accuracy, return_predicted_tokens, compute_dtype,
          /*need_dinput=*/false, /*need_dweight=*/false, /*need_dbias=*/false);
  return {loss, z_loss, lse, token_accuracy, predicted_tokens};
}

namespace {

FusedLinearCrossEntropyGradients empty_gradients(const at::Tensor& input, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, bool need_dinput, bool need_dweight, bool need_dbias) {
  const auto gradient = [](bool needed, const at::Tensor& of) {
    return needed ? at::empty_symint(of.sym_sizes(), of.options()) : at::empty({0}, of.options());
  };
  return {gradient(need_dinput, input), gradient(need_dweight, weight),
      gradient(need_dbias, bias.value_or(input))};
}

}  // namespace

FusedLinearCrossEntropyForward fused_linear_cross_entropy_forward_meta(const at::Tensor& input,
    const at::Tensor& weight, const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens, std::optional<at::ScalarType> compute_dtype, bool need_dinput,
    bool need_dweight, bool need_dbias) {
  constexpr auto op = "fused_linear_cross_entropy";
  const auto options = check_fused_linear_cross_entropy(op, input, weight, target, bias, ce_weight,
      ignore_index, label_smoothing, lse_square_scale, softcap, reduction, num_items, accum_dtype,
      workspace_bytes, use_token_scaling, return_token_accuracy, return_predicted_tokens, compute_dtype);
  check_wanted_gradients(op, bias, need_dbias);
  const auto outputs = empty_cross_entropy_outputs(input, options.compute_dtype, options.loss);
  const bool scaled_later = options.compute_dtype == at::kHalf && (need_dinput || need_dweight || need_dbias);
  return std::tuple_cat(outputs, empty_gradients(input, weight, bias, need_dinput, need_dweight, need_dbias),
      std::make_tuple(at::empty({scaled_later ? 2 : 0}, std::get<0>(outputs).options())));
}

FusedLinearCrossEntropyGradients fused_linear_cross_entropy_backward_meta(const at::Tensor& dloss,
    const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& ce_weight, int64_t ignore_index,
    double label_smoothing, double lse_square_scale, std::optional<double> softcap,
    std::optional<at::ScalarType> accum_dtype, std::optional<int64_t> workspace_bytes, bool use_token_scaling,
    std::optional<at::ScalarType> compute_dtype, bool need_dinput, bool need_dweight, bool need_dbias) {
  check_fused_linear_cross_entropy_backward(dloss, input, weight, target, bias, ce_weight, ignore_index,
      label_smoothing, lse_square_scale, softcap, accum_dtype, workspace_bytes, use_token_scaling,
      compute_dtype);
  check_wanted_gradients("fused_linear_cross_entropy_backward", bias, need_dbias);
  return empty_gradients(input, weight, bias, need_dinput, need_dweight, need_dbias);
}

// The nodes have names outside of this file, which `grad_fn` shows.

// "mean" and "sum": the gradients wait for their factor.
struct FusedLinearCrossEntropyBackward : BackwardNode<FusedLinearCrossEntropyBackward> {
  static constexpr size_t kInputs = 3;  // input, weight, bias
  static constexpr bool kOverwritesSaved = true;

  SavedVariable dinput, dweight, dbias, grad_scale;

  template <typename Self>
  static auto members(Self& self) {
    return std::tie(self.dinput, self.dweight, self.dbias, self.grad_scale);
  }

  static variable_list backward(const variable_list& grads, Wanted /*wanted*/, const at::Tensor& dinput,
      const at::Tensor& dweight, const at::Tensor& dbias, const at::Tensor& grad_scale) {
    const auto gradient = [&](const at::Tensor& saved, int64_t position) {
      if (!saved.defined()) return at::Tensor();
      return scaled_gradient(
          saved, grad_scale.defined() ? grads[0].mul(grad_scale.select(0, position)) : grads[0]);
    };
    return {gradient(dinput, 0), gradient(dweight, 1), gradient(dbias, 1)};
  }
};

// "none".
struct FusedLinearCrossEntropyUnreducedBackward : BackwardNode<FusedLinearCrossEntropyUnreducedBackward> {
  static constexpr size_t kInputs = 3;  // input, weight, bias

  SavedVariable input, weight, target, bias, ce_weight;
  int64_t ignore_index = 0;
  double label_smoothing = 0, lse_square_scale = 0;
  std::optional<double> softcap;
  std::optional<at::ScalarType> accum_dtype;
  std::optional<int64_t> workspace_bytes;
  bool use_token_scaling = false;
  std::optional<at::ScalarType> compute_dtype;

  template <typename Self>
  static auto members(Self& self) {
    return std::tie(self.input, self.weight, self.target, self.bias, self.ce_weight, self.ignore_index,
        self.label_smoothing, self.lse_square_scale, self.softcap, self.accum_dtype, self.workspace_bytes,
        self.use_token_scaling, self.compute_dtype);
  }

  static variable_list backward(const variable_list& grads, Wanted wanted, const at::Tensor& input,
      const at::Tensor& weight, const at::Tensor& target, const at::Tensor& bias, const at::Tensor& ce_weight,
      int64_t ignore_index, double label_smoothing, double lse_square_scale, std::optional<double> softcap,
      std::optional<at::ScalarType> accum_dtype, std::optional<int64_t> workspace_bytes,
      bool use_token_scaling, std::optional<at::ScalarType> compute_dtype) {
    auto [dinput, dweight, dbias] =
        fused_linear_cross_entropy_backward(grads[0], input, weight, target, optional_tensor(bias),
            optional_tensor(ce_weight), ignore_index, label_smoothing, lse_square_scale, softcap, accum_dtype,
            workspace_bytes, use_token_scaling, compute_dtype, wanted[0], wanted[1], wanted[2]);
    return {wanted[0] ? dinput : at::Tensor(), wanted[1] ? dweight : at::Tensor(),
        wanted[2] ? dbias : at::Tensor()};
  }
};

CrossEntropyOutputs fused_linear_cross_entropy_autograd(const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens, std::optional<at::ScalarType> compute_dtype) {
  constexpr auto op = "fused_linear_cross_entropy";
  if (at::GradMode::is_enabled()) {
    check_no_gradient(op, "ce_weight", ce_weight);
    check_no_gradient(op, "num_items", num_items);
  }
  check_no_tangent(op, input, weight, bias, ce_weight, num_items);
  const auto without_gradients = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return fused_linear_cross_entropy(input, weight, target, bias, ce_weight, ignore_index, label_smoothing,
        lse_square_scale, softcap, reduction, num_items, accum_dtype, workspace_bytes, use_token_scaling,
        return_token_accuracy, return_predicted_tokens, compute_dtype);
  };
  if (!torch::autograd::compute_requires_grad(input, weight, bias)) return without_gradients();
  if (reduction == "none") {
    const auto node = make_node<FusedLinearCrossEntropyUnreducedBackward>(op, input, weight, bias);
    auto outputs = without_gradients();
    node->input = SavedVariable(input, /*is_output=*/false);
    node->weight = SavedVariable(weight, /*is_output=*/false);
    node->target = SavedVariable(target, /*is_output=*/false);
    node->bias = SavedVariable(bias, /*is_output=*/false);
    node->ce_weight = SavedVariable(ce_weight, /*is_output=*/false);
    node->ignore_index = ignore_index;
    node->label_smoothing = label_smoothing;
    node->lse_square_scale = lse_square_scale;
    node->softcap = softcap;
    node->accum_dtype = accum_dtype;
    node->workspace_bytes = workspace_bytes;
    node->use_token_scaling = use_token_scaling;
    node->compute_dtype = compute_dtype;
    torch::autograd::set_history(std::get<0>(outputs), node);
    return outputs;
  }
  const auto node = make_node<FusedLinearCrossEntropyBackward>(op, input, weight, bias);
  const auto wanted = [&](size_t i) { return node->should_compute_output(i); };
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto [loss, z_loss, lse, token_accuracy, predicted_tokens, dinput, dweight, dbias, grad_scale] =
      fused_linear_cross_entropy_forward(input, weight, target, bias, ce_weight, ignore_index,
          label_smoothing, lse_square_scale, softcap, reduction, num_items, accum_dtype, workspace_bytes,
          use_token_scaling, return_token_accuracy, return_predicted_tokens, compute_dtype, wanted(0),
          wanted(1), wanted(2));
  if (wanted(0)) node->dinput = SavedVariable(dinput, /*is_output=*/false);
  if (wanted(1)) node->dweight = SavedVariable(dweight, /*is_output=*/false);
  if (wanted(2)) node->dbias = SavedVariable(dbias, /*is_output=*/false);
  // Of size 0 in other dtypes.
  if (compute_dtype.value_or(input.scalar_type()) == at::kHalf) {
    node->grad_scale = SavedVariable(grad_scale, /*is_output=*/false);
  }
  torch::autograd::set_history(loss, node);
  return {loss, z_loss, lse, token_accuracy, predicted_tokens};
}

// The products run in the autocast dtype, as those of linear. The arguments keep theirs, so that the
// gradients of float32 weights come back unrounded. float64 takes no part in autocast.
CrossEntropyOutputs fused_linear_cross_entropy_autocast(const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens, std::optional<at::ScalarType> compute_dtype) {
  NoAutocast guard;
  const auto takes_part = [](const at::Tensor& t) {
    return t.is_floating_point() && t.scalar_type() != at::kDouble;
  };
  const auto device = input.device().type();
  if (!compute_dtype && at::autocast::is_autocast_available(device) && takes_part(input) &&
      takes_part(weight) && (!bias || takes_part(*bias))) {
    const auto dtype = at::autocast::get_autocast_dtype(device);
    if (dtype == at::kBFloat16 || dtype == at::kHalf) compute_dtype = dtype;
  }
  return fused_linear_cross_entropy(input, weight, target, bias, ce_weight, ignore_index, label_smoothing,
      lse_square_scale, softcap, reduction, num_items, accum_dtype, workspace_bytes, use_token_scaling,
      return_token_accuracy, return_predicted_tokens, compute_dtype);
}

}  // namespace liger
