#include "ops/cross_entropy_rows.h"

#include <ATen/ops/empty.h>

#include "ops/checks.h"
#include "ops/rows.h"

namespace liger {

at::Tensor accumulate_weight(const std::optional<at::Tensor>& weight, at::ScalarType accumulate) {
  return weight ? weight->to(accumulate).contiguous() : at::Tensor();
}

std::tuple<at::Tensor, at::Tensor> empty_losses(const at::Tensor& lse, Reduction reduction) {
  const auto sizes = reduction == Reduction::kNone ? lse.sizes() : at::IntArrayRef{};
  return {at::empty(sizes, lse.options()), at::empty(sizes, lse.options())};
}

CrossEntropyForward cross_entropy_forward_rows(const CrossEntropyDevice& device, const char* op,
    const at::Tensor& logits, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    const CrossEntropyOptions& options, bool need_lse_low) {
  const auto accumulate = accumulate_type(logits.scalar_type());
  const auto stats = logits.options().dtype(accumulate);
  const auto dense_target = target.contiguous();
  const auto class_weight = accumulate_weight(weight, accumulate);
  auto totals = at::empty({kTotals}, stats);
  device.totals({.op = op,
      .target = dense_target,
      .weight = class_weight,
      .totals = totals,
      .classes = logits.size(1),
      .options = options});

  const int64_t tokens = logits.size(0);
  auto lse = at::empty({tokens}, stats);
  auto lse_low = at::empty({need_lse_low ? tokens : 0}, stats);
  auto [loss, z_loss] = empty_losses(lse, options.reduction);
  // Unreduced, the rows' ce goes where the loss will be.
  const auto ce = options.reduction == Reduction::kNone ? loss : at::empty({tokens}, stats);
  device.forward({.op = op,
      .logits = as_rows(logits).tensor,
      .target = dense_target,
      .weight = class_weight,
      .totals = totals,
      .ce = ce,
      .lse = lse,
      .lse_low = need_lse_low ? lse_low : at::Tensor(),
      .options = options});
  device.reduce({.ce = ce, .lse = lse, .totals = totals, .loss = loss, .z_loss = z_loss, .options = options});
  return {loss, z_loss, lse, lse_low, totals};
}

at::Tensor cross_entropy_backward_rows(const CrossEntropyDevice& device, const at::Tensor& dloss,
    const at::Tensor& logits, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    const at::Tensor& lse, const at::Tensor& lse_low, const at::Tensor& totals,
    const CrossEntropyOptions& options) {
  auto dlogits = at::empty(logits.sizes(), logits.options());
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

}  // namespace liger
