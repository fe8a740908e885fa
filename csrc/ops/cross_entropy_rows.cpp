#include "ops/cross_entropy_rows.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "ops/checks.h"
#include "ops/rows.h"

namespace liger {

bool (*reads_logits_once)(int64_t classes, c10::DeviceIndex device) = nullptr;

at::Tensor accumulate_weight(const std::optional<at::Tensor>& weight, at::ScalarType accumulate) {
  return weight ? weight->to(accumulate).contiguous() : at::Tensor();
}

CrossEntropyResults::CrossEntropyResults(
    int64_t rows, const at::TensorOptions& stats, const CrossEntropyOptions& options, bool keep_lse_low)
    : ce(at::empty({rows}, stats)), lse(at::empty({rows}, stats)) {
  if (keep_lse_low) lse_low = at::empty({rows}, stats);
  if (options.use_token_scaling) row_scale = at::empty({rows}, stats);
  if (options.return_token_accuracy || options.return_predicted_tokens) {
    predicted = at::empty({rows}, stats.dtype(at::kLong));
  }
}

CrossEntropyOutputs cross_entropy_outputs(const CrossEntropyDevice& device,
    const CrossEntropyResults& results, const at::Tensor& target, const at::Tensor& totals,
    const CrossEntropyOptions& options) {
  const auto stats = results.lse.options();
  const bool unreduced = options.reduction == Reduction::kNone;
  const auto sizes = unreduced ? results.lse.sizes() : at::IntArrayRef{};
  const auto loss = unreduced ? results.ce : at::empty(sizes, stats);
  const auto z_loss = at::empty(sizes, stats);
  at::Tensor token_accuracy;
  if (options.return_token_accuracy) token_accuracy = at::empty(sizes, stats.dtype(at::kFloat));
  device.reduce({.ce = results.ce,
      .lse = results.lse,
      .row_scale = results.row_scale,
      .predicted = results.predicted,
      .target = target,
      .totals = totals,
      .loss = loss,
      .z_loss = z_loss,
      .token_accuracy = token_accuracy,
      .options = options});
  return {loss, z_loss, results.lse,
      token_accuracy.defined() ? token_accuracy : at::empty({0}, stats.dtype(at::kFloat)),
      options.return_predicted_tokens ? results.predicted : at::empty({0}, stats.dtype(at::kLong))};
}

CrossEntropyForward cross_entropy_forward_on(const CrossEntropyDevice& device, const at::Tensor& logits,
    const at::Tensor& target, const std::optional<at::Tensor>& weight, int64_t ignore_index,
    double label_smoothing, double lse_square_scale, std::optional<double> softcap,
    std::string_view reduction, const std::optional<at::Tensor>& num_items, bool use_token_scaling,
    bool return_token_accuracy, bool return_predicted_tokens, bool need_dlogits) {
  constexpr auto op = "cross_entropy";
  const auto options =
      check_cross_entropy(op, logits, target, weight, ignore_index, label_smoothing, lse_square_scale,
          softcap, reduction, num_items, use_token_scaling, return_token_accuracy, return_predicted_tokens);
  const c10::DeviceGuard guard(logits.device());
  const auto accumulate = accumulate_type(logits.scalar_type());
  const auto stats = logits.options().dtype(accumulate);
  const auto dense_target = target.contiguous();
  const auto class_weight = accumulate_weight(weight, accumulate);
  const auto totals = at::empty({kTotals}, stats);
  device.totals({.op = op,
      .target = dense_target,
      .weight = class_weight,
      .num_items = num_items ? num_items->to(accumulate) : at::Tensor(),
      .totals = totals,
      .classes = logits.size(1),
      .options = options});

  const CrossEntropyResults results(logits.size(0), stats, options, /*keep_lse_low=*/true);
  const auto dlogits = at::empty(need_dlogits ? logits.sizes() : at::IntArrayRef{0}, logits.options());
  device.forward({.op = op,
      .logits = as_rows(logits).tensor,
      .dlogits = need_dlogits ? dlogits : at::Tensor(),
      .target = dense_target,
      .weight = class_weight,
      .totals = totals,
      .ce = results.ce,
      .lse = results.lse,
      .lse_low = results.lse_low,
      .row_scale = results.row_scale,
      .predicted = results.predicted,
      .options = options,
      .divide = true});
  return std::tuple_cat(cross_entropy_outputs(device, results, dense_target, totals, options),
      std::make_tuple(results.lse_low, totals, dlogits));
}

at::Tensor cross_entropy_backward_on(const CrossEntropyDevice& device, const at::Tensor& dloss,
    const at::Tensor& logits, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    const at::Tensor& lse, const at::Tensor& lse_low, const at::Tensor& totals, int64_t ignore_index,
    double label_smoothing, double lse_square_scale, std::optional<double> softcap,
    std::string_view reduction, bool use_token_scaling) {
  const auto options = check_cross_entropy_backward(dloss, logits, target, weight, lse, lse_low, totals,
      ignore_index, label_smoothing, lse_square_scale, softcap, reduction, use_token_scaling);
  const c10::DeviceGuard guard(logits.device());
  const auto dlogits = at::empty(logits.sizes(), logits.options());
  device.backward({.op = "cross_entropy_backward",
      .logits = as_rows(logits).tensor,
      .dlogits = dlogits,
      .target = target.contiguous(),
      .weight = accumulate_weight(weight, totals.scalar_type()),
      .totals = totals.contiguous(),
      .dloss = dloss.contiguous(),
      .lse = lse.contiguous(),
      .lse_low = lse_low.contiguous(),
      .options = options,
      .divide = true});
  return dlogits;
}

at::Tensor cross_entropy_scale_on(
    const CrossEntropyDevice& device, const at::Tensor& grad, const at::Tensor& scale) {
  check_cross_entropy_scale(grad, scale);
  const c10::DeviceGuard guard(grad.device());
  const auto out = at::empty(grad.sizes(), grad.options());
  device.scale(grad.contiguous(), scale, out);
  return out;
}

void cross_entropy_scale_inplace_on(
    const CrossEntropyDevice& device, at::Tensor& grad, const at::Tensor& scale) {
  check_cross_entropy_scale(grad, scale);
  const c10::DeviceGuard guard(grad.device());
  const auto dense = grad.contiguous();
  device.scale(dense, scale, dense);
  if (!dense.is_same(grad)) grad.copy_(dense);
}

}  // namespace liger
