#include "cpu/kernels.h"
#include "ops/cross_entropy_rows.h"

namespace liger {

namespace {

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

void* optional_out(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

cpu::CrossEntropy kernel_arguments(const CrossEntropyRows& args) {
  const auto optional = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  return {.dtype = args.logits.scalar_type(),
      .logits = args.logits.const_data_ptr(),
      .dlogits = optional_out(args.dlogits),
      .target = args.target.const_data_ptr<int64_t>(),
      .weight = optional(args.weight),
      .totals = args.totals.const_data_ptr(),
      .dloss = optional(args.dloss),
      .rows = args.logits.size(0),
      .cols = args.logits.size(1),
      .logits_stride = args.logits.stride(0),
      .dlogits_stride = args.dlogits.defined() ? args.dlogits.stride(0) : 0,
      .dloss_stride = args.dloss.defined() ? args.dloss.dim() : 0,
      .ignore_index = args.options.ignore_index,
      .label_smoothing = args.options.label_smoothing,
      .lse_square_scale = args.options.lse_square_scale,
      .softcap = args.options.softcap,
      .use_token_scaling = args.options.use_token_scaling,
      .divide = args.divide};
}

void forward_cpu(const CrossEntropyRows& args) {
  auto kernel = kernel_arguments(args);
  kernel.ce = args.ce.mutable_data_ptr();
  kernel.lse_out = args.lse.mutable_data_ptr();
  kernel.lse_low_out = optional_out(args.lse_low);
  kernel.row_scale = optional_out(args.row_scale);
  kernel.predicted = static_cast<int64_t*>(optional_out(args.predicted));
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
    const A* row_scale = args.row_scale.defined() ? args.row_scale.const_data_ptr<A>() : nullptr;
    const A* totals = args.totals.const_data_ptr<A>();
    const auto* target = args.target.const_data_ptr<int64_t>();
    const auto* predicted = args.predicted.defined() ? args.predicted.const_data_ptr<int64_t>() : nullptr;
    A* loss = args.loss.mutable_data_ptr<A>();
    A* z_loss = args.z_loss.mutable_data_ptr<A>();
    auto* accuracy = args.token_accuracy.defined() ? args.token_accuracy.mutable_data_ptr<float>() : nullptr;
    const double scale = args.options.lse_square_scale;
    const auto z = [&](int64_t i) {
      if (scale == 0) return 0.0;
      const double square = static_cast<double>(lse[i]) * static_cast<double>(lse[i]);
      return scale * square * (row_scale == nullptr ? 1.0 : static_cast<double>(row_scale[i]));
    };
    // Ignored rows have no prediction, and are never right: ignore_index may be the -1 that stands for that.
    const auto counts = [&](int64_t i) { return predicted[i] >= 0; };
    const auto right = [&](int64_t i) { return counts(i) && predicted[i] == target[i]; };
    if (args.options.reduction == Reduction::kNone) {
      for (int64_t i = 0; i < tokens; ++i) {
        z_loss[i] = static_cast<A>(z(i));
        loss[i] = static_cast<A>(static_cast<double>(ce[i]) + z(i));
        if (accuracy != nullptr) accuracy[i] = right(i) ? 1.0f : 0.0f;
      }
      return;
    }
    double ce_sum = 0;
    double z_sum = 0;
    int64_t right_count = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < tokens; ++i) {
      ce_sum += static_cast<double>(ce[i]);
      z_sum += z(i);
      if (accuracy != nullptr) {
        right_count += right(i);
        count += counts(i);
      }
    }
    const auto over = [](double sum, double divisor) { return divisor == 0 ? 0.0 : sum / divisor; };
    const double ce_divisor = static_cast<double>(totals[0]);
    const double z_divisor = static_cast<double>(totals[1]);
    z_loss[0] = static_cast<A>(over(z_sum, z_divisor));
    loss[0] = static_cast<A>(over(ce_sum, ce_divisor) + over(z_sum, z_divisor));
    if (accuracy != nullptr) {
      accuracy[0] = static_cast<float>(over(static_cast<double>(right_count), static_cast<double>(count)));
    }
  });
}

void scale_cpu(const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& out) {
  const double factor =
      scale.scalar_type() == at::kDouble ? *scale.const_data_ptr<double>() : *scale.const_data_ptr<float>();
  if (factor == 1 && out.is_same(grad)) return;
  cpu::kernels().scale({.dtype = grad.scalar_type(),
      .in = grad.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .size = grad.numel(),
      .factor = factor});
}

}  // namespace

const CrossEntropyDevice kCrossEntropyCpu = {.totals = totals_cpu,
    .forward = forward_cpu,
    .backward = backward_cpu,
    .reduce = reduce_cpu,
    .scale = scale_cpu};

}  // namespace liger
