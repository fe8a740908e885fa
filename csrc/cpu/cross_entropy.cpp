#include "ops/cross_entropy.h"

#include "cpu/kernels.h"
#include "ops/cross_entropy_rows.h"

namespace liger {

namespace {

// f(A{}) for the accumulate type.
template <typename F>
void dispatch_accumulate(const at::Tensor& tensor, const F& f) {
  tensor.scalar_type() == at::kDouble ? f(double{}) : f(float{});
}

void check_target(const char* op, int64_t target, int64_t position, int64_t classes, int64_t ignore_index) {
  TORCH_CHECK_INDEX(target == ignore_index || (target >= 0 && target < classes), "liger::", op,
      ": target must be in [0, ", classes, ") or ignore_index ", ignore_index, ", got ", target,
      " at position ", position);
}

void totals_cpu(const CrossEntropyTotals& args) {
  dispatch_accumulate(args.totals, [&](auto accumulate) {
    using A = decltype(accumulate);
    const auto* target = args.target.const_data_ptr<int64_t>();
    const A* weight = args.weight.defined() ? args.weight.const_data_ptr<A>() : nullptr;
    int64_t count = 0;
    double target_weight = 0;
    for (int64_t i = 0; i < args.target.numel(); ++i) {
      check_target(args.op, target[i], i, args.classes, args.options.ignore_index);
      if (target[i] == args.options.ignore_index) continue;
      ++count;
      target_weight += weight == nullptr ? 1 : static_cast<double>(weight[target[i]]);
    }
    A* totals = args.totals.mutable_data_ptr<A>();
    totals[0] = totals[1] = 1;
    if (args.num_items.defined()) {
      totals[0] = totals[1] = *args.num_items.const_data_ptr<A>();
    } else if (args.options.reduction == Reduction::kMean) {
      totals[0] = static_cast<A>(target_weight);
      totals[1] = static_cast<A>(count);
    }
    double weight_sum = static_cast<double>(args.classes);
    if (weight != nullptr) {
      weight_sum = 0;
      for (int64_t i = 0; i < args.classes; ++i) weight_sum += static_cast<double>(weight[i]);
    }
    totals[2] = static_cast<A>(weight_sum);
  });
}

cpu::CrossEntropy kernel_arguments(const CrossEntropyRows& args) {
  const auto optional = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  const auto optional_out = [](const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  return {.dtype = args.logits.scalar_type(),
      .logits = args.logits.const_data_ptr(),
      .dlogits = optional_out(args.dlogits),
      .target = args.target.const_data_ptr<int64_t>(),
      .weight = optional(args.weight),
      .totals = args.totals.const_data_ptr(),
      .dloss = optional(args.dloss),
      .ce = optional_out(args.ce),
      .rows = args.logits.size(0),
      .cols = args.logits.size(1),
      .logits_stride = args.logits.stride(0),
      .dlogits_stride = args.dlogits.defined() ? args.dlogits.stride(0) : 0,
      .dloss_stride = args.dloss.defined() ? args.dloss.dim() : 0,
      .ignore_index = args.options.ignore_index,
      .label_smoothing = args.options.label_smoothing,
      .lse_square_scale = args.options.lse_square_scale,
      .softcap = args.options.softcap,
      .divide = args.divide};
}

void forward_cpu(const CrossEntropyRows& args) {
  auto kernel = kernel_arguments(args);
  kernel.lse_out = args.lse.mutable_data_ptr();
  kernel.lse_low_out = args.lse_low.defined() ? args.lse_low.mutable_data_ptr() : nullptr;
  cpu::kernels().cross_entropy_forward(kernel);
}

void backward_cpu(const CrossEntropyRows& args) {
  const auto* target = args.target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < args.target.numel(); ++i) {
    check_target(args.op, target[i], i, args.logits.size(1), args.options.ignore_index);
  }
  auto kernel = kernel_arguments(args);
  kernel.lse = args.lse.const_data_ptr();
  kernel.lse_low = args.lse_low.const_data_ptr();
  cpu::kernels().cross_entropy_backward(kernel);
}

void reduce_cpu(const CrossEntropyReduce& args) {
  dispatch_accumulate(args.lse, [&](auto accumulate) {
    using A = decltype(accumulate);
    const int64_t tokens = args.lse.numel();
    const A* ce = args.ce.const_data_ptr<A>();
    const A* lse = args.lse.const_data_ptr<A>();
    const A* totals = args.totals.const_data_ptr<A>();
    A* loss = args.loss.mutable_data_ptr<A>();
    A* z_loss = args.z_loss.mutable_data_ptr<A>();
    const double scale = args.options.lse_square_scale;
    const auto z = [&](int64_t i) {
      return scale == 0 ? 0.0 : scale * static_cast<double>(lse[i]) * static_cast<double>(lse[i]);
    };
    if (args.options.reduction == Reduction::kNone) {
      for (int64_t i = 0; i < tokens; ++i) {
        z_loss[i] = static_cast<A>(z(i));
        loss[i] = static_cast<A>(static_cast<double>(ce[i]) + z(i));
      }
      return;
    }
    double ce_sum = 0;
    double z_sum = 0;
    for (int64_t i = 0; i < tokens; ++i) {
      ce_sum += static_cast<double>(ce[i]);
      z_sum += z(i);
    }
    const auto over = [](double sum, A divisor) {
      return divisor == 0 ? 0.0 : sum / static_cast<double>(divisor);
    };
    z_loss[0] = static_cast<A>(over(z_sum, totals[1]));
    loss[0] = static_cast<A>(over(ce_sum, totals[0]) + over(z_sum, totals[1]));
  });
}

}  // namespace

const CrossEntropyDevice kCrossEntropyCpu = {
    .totals = totals_cpu, .forward = forward_cpu, .backward = backward_cpu, .reduce = reduce_cpu};

TensorTriple cross_entropy_cpu(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction) {
  constexpr auto op = "cross_entropy";
  const auto options = check_cross_entropy(
      op, logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction);
  auto [loss, z_loss, lse, lse_low, totals] = cross_entropy_forward_rows(
      kCrossEntropyCpu, op, logits, target, weight, options, /*need_lse_low=*/false);
  return {loss, z_loss, lse};
}

CrossEntropyForward cross_entropy_forward_cpu(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction) {
  constexpr auto op = "cross_entropy";
  const auto options = check_cross_entropy(
      op, logits, target, weight, ignore_index, label_smoothing, lse_square_scale, softcap, reduction);
  return cross_entropy_forward_rows(
      kCrossEntropyCpu, op, logits, target, weight, options, /*need_lse_low=*/true);
}

at::Tensor cross_entropy_backward_cpu(const at::Tensor& dloss, const at::Tensor& logits,
    const at::Tensor& target, const std::optional<at::Tensor>& weight, const at::Tensor& lse,
    const at::Tensor& lse_low, const at::Tensor& totals, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction) {
  const auto options = check_cross_entropy_backward(dloss, logits, target, weight, lse, lse_low, totals,
      ignore_index, label_smoothing, lse_square_scale, softcap, reduction);
  return cross_entropy_backward_rows(
      kCrossEntropyCpu, dloss, logits, target, weight, lse, lse_low, totals, options);
}

}  // namespace liger
