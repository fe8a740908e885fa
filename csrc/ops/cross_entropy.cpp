#include "ops/cross_entropy.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/empty.h>

#include <cmath>

#include "ops/checks.h"
#include "ops/cross_entropy_rows.h"
#include "ops/dispatch.h"
#include "ops/node.h"
#include "ops/reuse.h"

namespace liger {

CrossEntropyOutputs cross_entropy(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens) {
  static const auto op = find_operator("liger::cross_entropy", cross_entropy);
  return op.call(logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction,
      num_items, use_token_scaling, return_token_accuracy, return_predicted_tokens);
}

CrossEntropyForward cross_entropy_forward(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens, bool need_dlogits) {
  static const auto op = find_operator("liger::cross_entropy_forward", cross_entropy_forward);
  return op.call(logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction,
      num_items, use_token_scaling, return_token_accuracy, return_predicted_tokens, need_dlogits);
}

at::Tensor cross_entropy_backward(const at::Tensor& dloss, const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, const at::Tensor& lse, const at::Tensor& lse_low,
    const at::Tensor& totals, int64_t ignore_index, double label_smoothing, double lse_square_scale,
    std::optional<double> softcap, std::string_view reduction, bool use_token_scaling) {
  static const auto op = find_operator("liger::cross_entropy_backward", cross_entropy_backward);
  return op.call(dloss, logits, target, weight, lse, lse_low, totals, ignore_index, label_smoothing,
      lse_square_scale, softcap, reduction, use_token_scaling);
}

at::Tensor cross_entropy_scale(const at::Tensor& grad, const at::Tensor& scale) {
  static const auto op = find_operator("liger::cross_entropy_scale", cross_entropy_scale);
  return op.call(grad, scale);
}

void cross_entropy_scale_(at::Tensor& grad, const at::Tensor& scale) {
  static const auto op = find_operator("liger::cross_entropy_scale_", cross_entropy_scale_);
  op.call(grad, scale);
}

at::Tensor scaled_gradient(const at::Tensor& saved, const at::Tensor& upstream) {
  if (at::GradMode::is_enabled()) {
    // create_graph=True. The saved gradient depends on arguments of the loss, which no graph knows of. With a
    // factor that wants a gradient, the result gets a node that says so when it is differentiated.
    const auto factor = upstream.requires_grad() ? upstream : upstream.detach().requires_grad_();
    return cross_entropy_scale(saved, factor);
  }
  if (!can_overwrite(saved)) return cross_entropy_scale(saved, upstream);
  auto gradient = saved;
  cross_entropy_scale_(gradient, upstream);
  return gradient;
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

void check_num_items(const char* op, const std::optional<at::Tensor>& num_items, const at::Tensor& values,
    const char* values_name, std::string_view reduction) {
  if (!num_items) return;
  check_same_device({op, "num_items", *num_items}, {op, values_name, values});
  TORCH_CHECK_TYPE(
      at::isFloatingType(num_items->scalar_type()) || at::isIntegralType(num_items->scalar_type(), false),
      "liger::", op, ": num_items must hold a number, got dtype ", dtype_name(num_items->scalar_type()));
  TORCH_CHECK_VALUE(num_items->sym_numel().sym_eq(1).expect_true(__FILE__, __LINE__), "liger::", op,
      ": num_items must have one element, got shape ", num_items->sym_sizes());
  TORCH_CHECK_VALUE(reduction == "mean", "liger::", op,
      ": num_items replaces the divisor of reduction \"mean\", got reduction \"", std::string(reduction),
      "\"");
}

CrossEntropyOptions check_cross_entropy(const char* op, const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens) {
  const Argument logits_arg{op, "logits", logits};
  check_floating(logits_arg);
  check_dim(logits_arg, 2);
  check_target_and_class_weight(op, target, weight, "weight", logits, "logits", logits.sym_size(1));
  check_num_items(op, num_items, logits, "logits", reduction);
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
      lse_square_scale, softcap, reduction, /*num_items=*/{}, use_token_scaling,
      /*return_token_accuracy=*/false, /*return_predicted_tokens=*/false);
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

void check_cross_entropy_scale(const at::Tensor& grad, const at::Tensor& scale) {
  constexpr auto op = "cross_entropy_scale";
  const Argument grad_arg{op, "grad", grad};
  const Argument scale_arg{op, "scale", scale};
  check_floating(grad_arg);
  check_same_device(scale_arg, grad_arg);
  const bool fits = scale.scalar_type() == accumulate_type(grad.scalar_type());
  TORCH_CHECK_TYPE(fits, "liger::", op, ": scale must have dtype ",
      dtype_name(accumulate_type(grad.scalar_type())), ", got ", dtype_name(scale.scalar_type()));
  check_dim(scale_arg, 0);
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
    const std::optional<at::Tensor>& num_items, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens) {
  auto [loss, z_loss, lse, token_accuracy, predicted_tokens, lse_low, totals, dlogits] =
      cross_entropy_forward(logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap,
          reduction, num_items, use_token_scaling, return_token_accuracy, return_predicted_tokens,
          /*need_dlogits=*/false);
  return {loss, z_loss, lse, token_accuracy, predicted_tokens};
}

CrossEntropyForward cross_entropy_forward_meta(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens, bool need_dlogits) {
  const auto options = check_cross_entropy("cross_entropy", logits, target, weight, ignore_index,
      label_smoothing, lse_square_scale, softcap, reduction, num_items, use_token_scaling,
      return_token_accuracy, return_predicted_tokens);
  const auto outputs = empty_cross_entropy_outputs(logits, logits.scalar_type(), options);
  const auto& lse = std::get<2>(outputs);
  return std::tuple_cat(outputs,
      std::make_tuple(at::empty_symint(lse.sym_sizes(), lse.options()), at::empty({kTotals}, lse.options()),
          need_dlogits ? at::empty_symint(logits.sym_sizes(), logits.options())
                       : at::empty({0}, logits.options())));
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

at::Tensor cross_entropy_scale_meta(const at::Tensor& grad, const at::Tensor& scale) {
  check_cross_entropy_scale(grad, scale);
  return at::empty_symint(grad.sym_sizes(), grad.options());
}

void cross_entropy_scale_inplace_meta(at::Tensor& grad, const at::Tensor& scale) {
  check_cross_entropy_scale(grad, scale);
}

// The nodes have names outside of this file, which `grad_fn` shows.

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

// The gradient that was computed with the loss waits for its factor.
struct CrossEntropyOnePassBackward : BackwardNode<CrossEntropyOnePassBackward> {
  static constexpr size_t kInputs = 1;  // logits
  static constexpr bool kOverwritesSaved = true;

  SavedVariable dlogits;

  template <typename Self>
  static auto members(Self& self) {
    return std::tie(self.dlogits);
  }

  static variable_list backward(const variable_list& grads, Wanted /*wanted*/, const at::Tensor& dlogits) {
    return {scaled_gradient(dlogits, grads[0])};
  }
};

namespace {

// Whether the gradient is computed with the loss: where that spares a read of the logits, which only the
// kernel does that keeps a 16-bit row on the chip, and where nothing is lost by a factor that comes later.
// float16 could not hold the gradient before it, and graphs and sharded tensors could not multiply in place.
bool takes_one_pass(const at::Tensor& logits, double label_smoothing, std::optional<double> softcap,
    std::string_view reduction, bool returns_predictions) {
  if (!logits.is_cuda() || at::isTensorSubclassLike(logits)) return false;
  if (logits.scalar_type() != at::kBFloat16 || logits.dim() != 2) return false;
  if (reduction == "none" || label_smoothing != 0 || softcap || returns_predictions) return false;
  return reads_logits_once != nullptr && reads_logits_once(logits.size(1), logits.device().index());
}

}  // namespace

CrossEntropyOutputs cross_entropy_autograd(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens) {
  constexpr auto op = "cross_entropy";
  if (at::GradMode::is_enabled()) {
    check_no_gradient(op, "weight", weight);
    check_no_gradient(op, "num_items", num_items);
  }
  check_no_tangent(op, logits, weight, num_items);
  const auto forward = [&](bool need_dlogits) {
    return cross_entropy_forward(logits, target, weight, ignore_index, label_smoothing, lse_square_scale,
        softcap, reduction, num_items, use_token_scaling, return_token_accuracy, return_predicted_tokens,
        need_dlogits);
  };
  if (!torch::autograd::compute_requires_grad(logits)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return cross_entropy(logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap,
        reduction, num_items, use_token_scaling, return_token_accuracy, return_predicted_tokens);
  }
  if (takes_one_pass(
          logits, label_smoothing, softcap, reduction, return_token_accuracy || return_predicted_tokens)) {
    const auto node = make_node<CrossEntropyOnePassBackward>(op, logits);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, z_loss, lse, token_accuracy, predicted_tokens, lse_low, totals, dlogits] =
        forward(/*need_dlogits=*/true);
    node->dlogits = SavedVariable(dlogits, /*is_output=*/false);
    torch::autograd::set_history(loss, node);
    return {loss, z_loss, lse, token_accuracy, predicted_tokens};
  }
  const auto node = make_node<CrossEntropyBackward>(op, logits);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto [loss, z_loss, lse, token_accuracy, predicted_tokens, lse_low, totals, dlogits] =
      forward(/*need_dlogits=*/false);
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
