#include "ops/cross_entropy.h"

#include <ATen/ops/empty.h>

#include <cmath>

#include "ops/checks.h"
#include "ops/cross_entropy_rows.h"
#include "ops/dispatch.h"
#include "ops/node.h"

namespace liger {

CrossEntropyOutputs cross_entropy(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    bool use_token_scaling, bool return_token_accuracy, bool return_predicted_tokens) {
  static const auto op = find_operator("liger::cross_entropy", cross_entropy);
  return op.call(logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction,
      use_token_scaling, return_token_accuracy, return_predicted_tokens);
}

CrossEntropyForward cross_entropy_forward(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    bool use_token_scaling, bool return_token_accuracy, bool return_predicted_tokens) {
  static const auto op = find_operator("liger::cross_entropy_forward", cross_entropy_forward);
  return op.call(logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction,
      use_token_scaling, return_token_accuracy, return_predicted_tokens);
}

at::Tensor cross_entropy_backward(const at::Tensor& dloss, const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, const at::Tensor& lse, const at::Tensor& lse_low,
    const at::Tensor& totals, int64_t ignore_index, double label_smoothing, double lse_square_scale,
    std::optional<double> softcap, std::string_view reduction, bool use_token_scaling) {
  static const auto op = find_operator("liger::cross_entropy_backward", cross_entropy_backward);
  return op.call(dloss, logits, target, weight, lse, lse_low, totals, ignore_index, label_smoothing,
      lse_square_scale, softcap, reduction, use_token_scaling);
}

namespace {

Reduction parse_reduction(const char* op, std::string_view reduction) {
  if (reduction == "mean") return Reduction::kMean;
  if (reduction == "sum") return Reduction::kSum;
  TORCH_CHECK_VALUE(reduction == "none", "liger::", op,
      ": reduction must be \"mean\", \"sum\" or \"none\", got \"", std::string(reduction), "\"");
  return Reduction::kNone;
}

void check_statistic(
    const Argument& arg, const Argument& logits, const c10::SymInt& size, const char* meaning) {
  const auto dtype = accumulate_type(logits.tensor.scalar_type());
  check_same_device(arg, logits);
  TORCH_CHECK_TYPE(arg.tensor.scalar_type() == dtype, "liger::", arg.op, ": ", arg.name, " must have dtype ",
      dtype_name(dtype), ", got ", dtype_name(arg.tensor.scalar_type()));
  check_vector(arg, size, meaning);
}

}  // namespace

CrossEntropyOptions check_cross_entropy_options(const char* op, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    bool use_token_scaling, bool return_token_accuracy, bool return_predicted_tokens) {
  TORCH_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, "liger::", op,
      ": label_smoothing must be between 0 and 1, got ", label_smoothing);
  TORCH_CHECK_VALUE(std::isfinite(lse_square_scale), "liger::", op, ": lse_square_scale must be finite, got ",
      lse_square_scale);
  TORCH_CHECK_VALUE(!softcap || (*softcap > 0 && std::isfinite(*softcap)), "liger::", op,
      ": softcap must be positive and finite, or None, got ", softcap.value_or(0));
  return {.ignore_index = ignore_index,
      .label_smoothing = label_smoothing,
      .lse_square_scale = lse_square_scale,
      .softcap = softcap.value_or(0),
      .reduction = parse_reduction(op, reduction),
      .use_token_scaling = use_token_scaling,
      .return_token_accuracy = return_token_accuracy,
      .return_predicted_tokens = return_predicted_tokens};
}

void check_target_and_class_weight(const char* op, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, const char* weight_name, const at::Tensor& values,
    const char* values_name, const c10::SymInt& classes) {
  const Argument values_arg{op, values_name, values};
  const Argument target_arg{op, "target", target};
  check_same_device(target_arg, values_arg);
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "liger::", op,
      ": target must have dtype int64 (class indices), got ", dtype_name(target.scalar_type()));
  check_leading_shape(target_arg, values_arg, 1);
  if (weight) {
    const Argument weight_arg{op, weight_name, *weight};
    check_same_device(weight_arg, values_arg);
    check_same_dtype_or_float32(weight_arg, values_arg);
    check_vector(weight_arg, classes, "number of classes");
  }
}

CrossEntropyOptions check_cross_entropy(const char* op, const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    bool use_token_scaling, bool return_token_accuracy, bool return_predicted_tokens) {
  const Argument logits_arg{op, "logits", logits};
  check_floating(logits_arg);
  check_dim(logits_arg, 2);
  check_target_and_class_weight(op, target, weight, "weight", logits, "logits", logits.sym_size(1));
  return check_cross_entropy_options(op, ignore_index, label_smoothing, lse_square_scale, softcap, reduction,
      use_token_scaling, return_token_accuracy, return_predicted_tokens);
}

CrossEntropyOptions check_cross_entropy_backward(const at::Tensor& dloss, const at::Tensor& logits,
    const at::Tensor& target, const std::optional<at::Tensor>& weight, const at::Tensor& lse,
    const at::Tensor& lse_low, const at::Tensor& totals, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    bool use_token_scaling) {
  constexpr auto op = "cross_entropy_backward";
  const auto options = check_cross_entropy(op, logits, target, weight, ignore_index, label_smoothing,
      lse_square_scale, softcap, reduction, use_token_scaling, /*return_token_accuracy=*/false,
      /*return_predicted_tokens=*/false);
  const Argument logits_arg{op, "logits", logits};
  const Argument lse_arg{op, "lse", lse};
  const Argument dloss_arg{op, "dloss", dloss};
  check_statistic(lse_arg, logits_arg, logits.sym_size(0), "rows of logits");
  check_statistic({op, "lse_low", lse_low}, logits_arg, logits.sym_size(0), "rows of logits");
  check_statistic({op, "totals", totals}, logits_arg, kTotals, "totals of cross_entropy_forward");
  check_same_device(dloss_arg, logits_arg);
  check_same_dtype(dloss_arg, lse_arg);
  if (options.reduction == Reduction::kNone) {
    check_same_shape(dloss_arg, lse_arg);
  } else {
    check_dim(dloss_arg, 0);
  }
  return options;
}

CrossEntropyOutputs empty_cross_entropy_outputs(
    const at::Tensor& values, at::ScalarType dtype, const CrossEntropyOptions& options) {
  const auto stats = values.options().dtype(accumulate_type(dtype));
  const auto tokens = values.sym_sizes().slice(0, 1);
  const auto loss_sizes = options.reduction == Reduction::kNone ? tokens : c10::SymIntArrayRef{};
  const auto optional = [](bool wanted, c10::SymIntArrayRef sizes, const at::TensorOptions& tensor_options) {
    return wanted ? at::empty_symint(sizes, tensor_options) : at::empty({0}, tensor_options);
  };
  return {at::empty_symint(loss_sizes, stats), at::empty_symint(loss_sizes, stats),
      at::empty_symint(tokens, stats),
      optional(options.return_token_accuracy, loss_sizes, stats.dtype(at::kFloat)),
      optional(options.return_predicted_tokens, tokens, stats.dtype(at::kLong))};
}

CrossEntropyOutputs cross_entropy_from_forward(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    bool use_token_scaling, bool return_token_accuracy, bool return_predicted_tokens) {
  auto [loss, z_loss, lse, token_accuracy, predicted_tokens, lse_low, totals] =
      cross_entropy_forward(logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap,
          reduction, use_token_scaling, return_token_accuracy, return_predicted_tokens);
  return {loss, z_loss, lse, token_accuracy, predicted_tokens};
}

CrossEntropyForward cross_entropy_forward_meta(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    bool use_token_scaling, bool return_token_accuracy, bool return_predicted_tokens) {
  const auto options = check_cross_entropy("cross_entropy", logits, target, weight, ignore_index,
      label_smoothing, lse_square_scale, softcap, reduction, use_token_scaling, return_token_accuracy,
      return_predicted_tokens);
  const auto outputs = empty_cross_entropy_outputs(logits, logits.scalar_type(), options);
  const auto& lse = std::get<2>(outputs);
  return std::tuple_cat(outputs,
      std::make_tuple(at::empty_symint(lse.sym_sizes(), lse.options()), at::empty({kTotals}, lse.options())));
}

at::Tensor cross_entropy_backward_meta(const at::Tensor& dloss, const at::Tensor& logits,
    const at::Tensor& target, const std::optional<at::Tensor>& weight, const at::Tensor& lse,
    const at::Tensor& lse_low, const at::Tensor& totals, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    bool use_token_scaling) {
  check_cross_entropy_backward(dloss, logits, target, weight, lse, lse_low, totals, ignore_index,
      label_smoothing, lse_square_scale, softcap, reduction, use_token_scaling);
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

// Its name, which `grad_fn` shows, is one outside of this file.
struct CrossEntropyBackward : BackwardNode<CrossEntropyBackward> {
  static constexpr size_t kInputs = 1;  // logits

  SavedVariable logits, target, weight, lse, lse_low, totals;
  int64_t ignore_index = 0;
  double label_smoothing = 0, lse_square_scale = 0;
  std::optional<double> softcap;
  std::string reduction;
  bool use_token_scaling = false;

  template <typename Self>
  static auto members(Self& self) {
    return std::tie(self.logits, self.target, self.weight, self.lse, self.lse_low, self.totals,
        self.ignore_index, self.label_smoothing, self.lse_square_scale, self.softcap, self.reduction,
        self.use_token_scaling);
  }

  static variable_list backward(const variable_list& grads, Wanted /*wanted*/, const at::Tensor& logits,
      const at::Tensor& target, const at::Tensor& weight, const at::Tensor& lse, const at::Tensor& lse_low,
      const at::Tensor& totals, int64_t ignore_index, double label_smoothing, double lse_square_scale,
      std::optional<double> softcap, const std::string& reduction, bool use_token_scaling) {
    return {cross_entropy_backward(grads[0], logits, target, optional_tensor(weight), lse, lse_low, totals,
        ignore_index, label_smoothing, lse_square_scale, softcap, reduction, use_token_scaling)};
  }
};

CrossEntropyOutputs cross_entropy_autograd(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    bool use_token_scaling, bool return_token_accuracy, bool return_predicted_tokens) {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled() || !weight || !weight->requires_grad(),
      "liger::cross_entropy: the gradient with respect "
      "to weight is not implemented; detach() it");
  check_no_tangent("cross_entropy", weight);
  const auto node = make_node<CrossEntropyBackward>("cross_entropy", logits);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (!node) {
    return cross_entropy(logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap,
        reduction, use_token_scaling, return_token_accuracy, return_predicted_tokens);
  }
  auto [loss, z_loss, lse, token_accuracy, predicted_tokens, lse_low, totals] =
      cross_entropy_forward(logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap,
          reduction, use_token_scaling, return_token_accuracy, return_predicted_tokens);
  node->logits = SavedVariable(logits, /*is_output=*/false);
  node->target = SavedVariable(target, /*is_output=*/false);
  node->weight = SavedVariable(weight, /*is_output=*/false);
  node->lse = SavedVariable(lse, /*is_output=*/false);
  node->lse_low = SavedVariable(lse_low, /*is_output=*/false);
  node->totals = SavedVariable(totals, /*is_output=*/false);
  node->ignore_index = ignore_index;
  node->label_smoothing = label_smoothing;
  node->lse_square_scale = lse_square_scale;
  node->softcap = softcap;
  node->reduction = reduction;
  node->use_token_scaling = use_token_scaling;
  torch::autograd::set_history(loss, node);
  return {loss, z_loss, lse, token_accuracy, predicted_tokens};
}

}  // namespace liger
