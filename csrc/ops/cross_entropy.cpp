#include "ops/cross_entropy.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>

#include "ops/checks.h"
#include "ops/cross_entropy_rows.h"
#include "ops/dispatch.h"

namespace liger {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

TensorTriple cross_entropy(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction) {
  static const auto op = find_operator("liger::cross_entropy", cross_entropy);
  return op.call(logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction);
}

CrossEntropyForward cross_entropy_forward(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction) {
  static const auto op = find_operator("liger::cross_entropy_forward", cross_entropy_forward);
  return op.call(logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction);
}

at::Tensor cross_entropy_backward(const at::Tensor& dloss, const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, const at::Tensor& lse, const at::Tensor& lse_low,
    const at::Tensor& totals, int64_t ignore_index, double label_smoothing, double lse_square_scale,
    std::optional<double> softcap, std::string_view reduction) {
  static const auto op = find_operator("liger::cross_entropy_backward", cross_entropy_backward);
  return op.call(dloss, logits, target, weight, lse, lse_low, totals, ignore_index, label_smoothing,
      lse_square_scale, softcap, reduction);
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
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction) {
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
      .reduction = parse_reduction(op, reduction)};
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
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction) {
  const Argument logits_arg{op, "logits", logits};
  check_floating(logits_arg);
  check_dim(logits_arg, 2);
  check_target_and_class_weight(op, target, weight, "weight", logits, "logits", logits.sym_size(1));
  return check_cross_entropy_options(op, ignore_index, label_smoothing, lse_square_scale, softcap, reduction);
}

CrossEntropyOptions check_cross_entropy_backward(const at::Tensor& dloss, const at::Tensor& logits,
    const at::Tensor& target, const std::optional<at::Tensor>& weight, const at::Tensor& lse,
    const at::Tensor& lse_low, const at::Tensor& totals, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction) {
  constexpr auto op = "cross_entropy_backward";
  const auto options = check_cross_entropy(
      op, logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction);
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

namespace {

CrossEntropyForward empty_forward(const at::Tensor& logits, Reduction reduction, bool need_lse_low) {
  const auto stats = logits.options().dtype(accumulate_type(logits.scalar_type()));
  const auto tokens = logits.sym_sizes().slice(0, 1);
  const auto loss_sizes = reduction == Reduction::kNone ? tokens : c10::SymIntArrayRef{};
  return {at::empty_symint(loss_sizes, stats), at::empty_symint(loss_sizes, stats),
      at::empty_symint(tokens, stats), need_lse_low ? at::empty_symint(tokens, stats) : at::empty({0}, stats),
      at::empty({kTotals}, stats)};
}

}  // namespace

TensorTriple cross_entropy_meta(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction) {
  const auto options = check_cross_entropy("cross_entropy", logits, target, weight, ignore_index,
      label_smoothing, lse_square_scale, softcap, reduction);
  auto [loss, z_loss, lse, lse_low, totals] =
      empty_forward(logits, options.reduction, /*need_lse_low=*/false);
  return {loss, z_loss, lse};
}

CrossEntropyForward cross_entropy_forward_meta(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction) {
  const auto options = check_cross_entropy("cross_entropy", logits, target, weight, ignore_index,
      label_smoothing, lse_square_scale, softcap, reduction);
  return empty_forward(logits, options.reduction, /*need_lse_low=*/true);
}

at::Tensor cross_entropy_backward_meta(const at::Tensor& dloss, const at::Tensor& logits,
    const at::Tensor& target, const std::optional<at::Tensor>& weight, const at::Tensor& lse,
    const at::Tensor& lse_low, const at::Tensor& totals, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction) {
  check_cross_entropy_backward(dloss, logits, target, weight, lse, lse_low, totals, ignore_index,
      label_smoothing, lse_square_scale, softcap, reduction);
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

namespace {

class CrossEntropyFunction : public torch::autograd::Function<CrossEntropyFunction> {
 public:
  static constexpr bool is_traceable = true;

  // z_loss and lse leave through pointers: returned tensors would have to be
  // marked non-differentiable, which compiled autograd does not support.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits, const at::Tensor& target,
      const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
      double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
      at::Tensor* z_loss_out, at::Tensor* lse_out) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, z_loss, lse, lse_low, totals] = cross_entropy_forward(
        logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction);
    ctx->save_for_backward({logits, target, weight.value_or(at::Tensor()), lse, lse_low, totals});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
    ctx->saved_data["lse_square_scale"] = lse_square_scale;
    ctx->saved_data["softcap"] = softcap;
    ctx->saved_data["reduction"] = std::string(reduction);
    ctx->set_materialize_grads(false);
    *z_loss_out = z_loss;
    *lse_out = lse;
    return {loss};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(10);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const auto weight = saved[2].defined() ? std::optional<at::Tensor>(saved[2]) : std::nullopt;
    result[0] = cross_entropy_backward(grads[0], saved[0], saved[1], weight, saved[3], saved[4], saved[5],
        ctx->saved_data["ignore_index"].toInt(), ctx->saved_data["label_smoothing"].toDouble(),
        ctx->saved_data["lse_square_scale"].toDouble(), ctx->saved_data["softcap"].toOptional<double>(),
        ctx->saved_data["reduction"].toStringRef());
    return result;
  }
};

}  // namespace

TensorTriple cross_entropy_autograd(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction) {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled() || !weight || !weight->requires_grad(),
      "liger::cross_entropy: the gradient with respect "
      "to weight is not implemented; detach() it");
  if (!at::GradMode::is_enabled() || !logits.requires_grad()) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return cross_entropy(
        logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction);
  }
  at::Tensor z_loss, lse;
  auto loss = CrossEntropyFunction::apply(logits, target, weight, ignore_index, label_smoothing,
      lse_square_scale, softcap, reduction, &z_loss, &lse);
  return {loss[0], z_loss, lse};
}

}  // namespace liger
