#include "ops/fused_linear_cross_entropy_chunks.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/frexp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "ops/checks.h"

namespace liger {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows per chunk: as many as fit, spread evenly over the chunks, in whole tiles of the matrix products.
int64_t chunk_rows(int64_t tokens, int64_t row_bytes, int64_t workspace) {
  constexpr int64_t kTile = 128;
  const int64_t most = std::clamp<int64_t>(workspace / std::max<int64_t>(row_bytes, 1), 1, tokens);
  const int64_t even = ceil_div(tokens, ceil_div(tokens, most));
  return std::min(most, ceil_div(even, kTile) * kTile);
}

// 2^e of x = m * 2^e with m in [1/2, 1); 0 for 0. On the device.
at::Tensor power_of_two(const at::Tensor& x) {
  return at::where(x.eq(0), x, x.div(std::get<0>(at::frexp(x))));
}

// 1 / x, and 0 for 0.
at::Tensor reciprocal_or_zero(const at::Tensor& x) { return at::where(x.eq(0), x, x.reciprocal()); }

struct Arguments {
  const char* op;
  const at::Tensor& input;
  const at::Tensor& weight;
  const at::Tensor& target;
  const std::optional<at::Tensor>& bias;
  const std::optional<at::Tensor>& ce_weight;
  const std::optional<at::Tensor>& num_items;
  FusedLinearCrossEntropyOptions options;
  bool need_dinput, need_dweight, need_dbias;
};

class Chunks {
 public:
  Chunks(const FusedLinearCrossEntropyDevice& device, const Arguments& args)
      : device_(device),
        args_(args),
        tokens_(args.input.size(0)),
        hidden_(args.input.size(1)),
        classes_(args.weight.size(0)),
        accumulate_(accumulate_type(args.options.compute_dtype)),
        stats_(args.input.options().dtype(accumulate_)),
        input_(args.input.to(args.options.compute_dtype)),
        weight_(args.weight.to(args.options.compute_dtype)),
        target_(args.target.contiguous()),
        class_weight_(accumulate_weight(args.ce_weight, accumulate_)),
        totals(at::empty({kTotals}, stats_)),
        results(tokens_, stats_, args.options.loss, /*keep_lse_low=*/false) {
    if (args.bias) bias_ = args.bias->to(args.options.compute_dtype);
    device.rows.totals({.op = args.op,
        .target = target_,
        .weight = class_weight_,
        .num_items = args.num_items ? args.num_items->to(accumulate_) : at::Tensor(),
        .totals = totals,
        .classes = classes_,
        .options = args.options.loss});
  }

  bool gradients() const { return args_.need_dinput || args_.need_dweight || args_.need_dbias; }
  bool float16() const { return args_.options.compute_dtype == at::kHalf; }

  // In float16, the power of two that is not below the number of tokens.
  double sum_scale() const {
    double scale = 1;
    while (float16() && scale < static_cast<double>(tokens_)) scale *= 2;
    return scale;
  }

  // In float16, a power of two for the upstream gradients of scaled tokens. Gradients p_t * p of unlikely
  // tokens would underflow; none is above 1/4, and sums over tokens are means here, so there is room above.
  double token_power() const { return float16() && args_.options.loss.use_token_scaling ? 256 : 1; }

  CrossEntropyOutputs outputs() const {
    return cross_entropy_outputs(device_.rows, results, target_, totals, args_.options.loss);
  }

  // Fills results, and computes the gradients that are asked for, for an upstream gradient of the reduced
  // loss or one of each token. In float16 powers of two are left out: that of the divisor of the reduced loss
  // (CrossEntropyRows::divide), and sum_scale() from the sums over tokens, which would leave the range.
  FusedLinearCrossEntropyGradients run(const at::Tensor& dloss) {
    const auto compute = input_.options();
    const auto dinput =
        at::empty(args_.need_dinput ? args_.input.sizes() : at::IntArrayRef{0}, args_.input.options());
    at::Tensor dweight, dbias;
    if (args_.need_dweight) dweight = accumulator({classes_, hidden_}, args_.options.accum_dtype);
    if (args_.need_dbias) dbias = accumulator({classes_}, accumulate_);

    if (tokens_ > 0) {
      const int64_t element = static_cast<int64_t>(input_.element_size());
      const int64_t step = std::max<int64_t>(1, device_.row_alignment_bytes / element);
      const int64_t stride = ceil_div(std::max<int64_t>(classes_, 1), step) * step;
      const int64_t rows = chunk_rows(tokens_, stride * element, workspace());
      const auto buffer = at::empty({rows, stride}, compute);
      // Matrix products load whole vectors at the end of a row, and drop what is beyond the classes.
      if (stride > classes_) buffer.narrow(1, classes_, stride - classes_).zero_();
      for (int64_t start = 0; start < tokens_; start += rows) {
        const int64_t count = std::min(rows, tokens_ - start);
        const auto input = input_.narrow(0, start, count);
        auto logits = buffer.narrow(0, 0, count).narrow(1, 0, classes_);
        if (bias_.defined()) {
          at::addmm_out(logits, bias_, input, weight_.t());
        } else {
          at::mm_out(logits, input, weight_.t());
        }
        const auto rows_of = [&](const at::Tensor& t) {
          return t.defined() && t.dim() > 0 ? t.narrow(0, start, count) : t;
        };
        device_.rows.forward({.op = args_.op,
            .logits = logits,
            .dlogits = gradients() ? logits : at::Tensor(),
            .target = rows_of(target_),
            .weight = class_weight_,
            .totals = totals,
            .dloss = rows_of(dloss),
            .ce = rows_of(results.ce),
            .lse = rows_of(results.lse),
            .row_scale = rows_of(results.row_scale),
            .predicted = rows_of(results.predicted),
            .options = args_.options.loss,
            .divide = !float16() || args_.options.loss.reduction == Reduction::kNone});

        // The buffer holds the gradient of the logits now.
        const double beta = start == 0 ? 0 : 1;
        if (args_.need_dinput) {
          auto rows_out = dinput.narrow(0, start, count);
          product(rows_out, logits, weight_, 0, 1);
        }
        if (args_.need_dweight) product(dweight, logits.t(), input, beta, 1 / sum_scale());
        if (args_.need_dbias) {
          const auto sums = at::sum(logits, 0, /*keepdim=*/false, dbias.scalar_type());
          start == 0 ? dbias.copy_(sums) : dbias.add_(sums);
        }
      }
    }
    if (dbias.defined() && sum_scale() != 1) dbias.mul_(1 / sum_scale());
    return {dinput,
        dweight.defined() ? dweight.to(args_.weight.scalar_type()) : at::empty({0}, args_.weight.options()),
        dbias.defined() ? dbias.to(args_.bias->scalar_type())
                        : at::empty({0}, args_.bias.value_or(args_.input).options())};
  }

 private:
  // Uninitialised: the first chunk overwrites it. Zeros where there is none.
  at::Tensor accumulator(at::IntArrayRef sizes, at::ScalarType dtype) const {
    const auto options = input_.options().dtype(dtype);
    return tokens_ > 0 ? at::empty(sizes, options) : at::zeros(sizes, options);
  }

  int64_t workspace() const {
    const auto& asked = args_.options.workspace_bytes;
    const auto bytes = [](const at::Tensor& t) {
      return t.defined() ? static_cast<int64_t>(t.nbytes()) : int64_t{0};
    };
    const int64_t statistics = 4 * bytes(results.lse) + bytes(results.row_scale) + bytes(results.predicted);
    return (asked ? *asked : device_.default_workspace(weight_)) - statistics;
  }

  // out = beta * out + alpha * a @ b, in out's dtype.
  void product(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double beta, double alpha) const {
    if (out.scalar_type() == a.scalar_type()) {
      at::addmm_out(out, out, a, b, beta, alpha);
    } else if (out.scalar_type() == at::kFloat) {
      device_.addmm_float32(out, a, b, beta, alpha);
    } else {  // one 16-bit dtype computed in the other
      TORCH_INTERNAL_ASSERT(beta == 0);
      auto wide = at::empty(out.sizes(), out.options().dtype(at::kFloat));
      device_.addmm_float32(wide, a, b, beta, alpha);
      out.copy_(wide);
    }
  }

  const FusedLinearCrossEntropyDevice& device_;
  const Arguments& args_;
  const int64_t tokens_, hidden_, classes_;
  const at::ScalarType accumulate_;
  const at::TensorOptions stats_;
  const at::Tensor input_, weight_, target_, class_weight_;
  at::Tensor bias_;

 public:
  const at::Tensor totals;
  const CrossEntropyResults results;
};

}  // namespace

FusedLinearCrossEntropyForward fused_linear_cross_entropy_forward_on(
    const FusedLinearCrossEntropyDevice& device, const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& target, const std::optional<at::Tensor>& bias,
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
  const c10::DeviceGuard guard(input.device());
  const Arguments args{
      op, input, weight, target, bias, ce_weight, num_items, options, need_dinput, need_dweight, need_dbias};
  Chunks chunks(device, args);
  const double token_power = chunks.token_power();
  const auto dloss = token_power == 1 ? at::Tensor() : at::full({}, token_power, chunks.totals.options());
  const auto gradients = chunks.run(dloss);
  auto grad_scale = at::empty({0}, chunks.totals.options());
  if (chunks.float16() && chunks.gradients()) {
    const auto scale = reciprocal_or_zero(power_of_two(chunks.totals.select(0, 0)).mul(token_power));
    grad_scale = at::stack({scale, scale.mul(chunks.sum_scale())});
  }
  return std::tuple_cat(chunks.outputs(), gradients, std::make_tuple(grad_scale));
}

FusedLinearCrossEntropyGradients fused_linear_cross_entropy_backward_on(
    const FusedLinearCrossEntropyDevice& device, const at::Tensor& dloss, const at::Tensor& input,
    const at::Tensor& weight, const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, bool use_token_scaling,
    std::optional<at::ScalarType> compute_dtype, bool need_dinput, bool need_dweight, bool need_dbias) {
  constexpr auto op = "fused_linear_cross_entropy_backward";
  const auto options = check_fused_linear_cross_entropy_backward(dloss, input, weight, target, bias,
      ce_weight, ignore_index, label_smoothing, lse_square_scale, softcap, accum_dtype, workspace_bytes,
      use_token_scaling, compute_dtype);
  check_wanted_gradients(op, bias, need_dbias);
  const c10::DeviceGuard guard(input.device());
  const std::optional<at::Tensor> no_num_items;
  const Arguments args{op, input, weight, target, bias, ce_weight, no_num_items, options, need_dinput,
      need_dweight, need_dbias};
  Chunks chunks(device, args);
  if (!chunks.float16() || input.size(0) == 0) return chunks.run(dloss.contiguous());
  // The power of two of the largest upstream gradient is kept out of the float16 products.
  const auto power = power_of_two(at::amax(dloss.abs())).div(chunks.token_power());
  auto gradients = chunks.run(dloss.mul(reciprocal_or_zero(power)).contiguous());
  auto& [dinput, dweight, dbias] = gradients;
  const auto sum_power = power.mul(chunks.sum_scale());
  if (need_dinput) cross_entropy_scale_inplace_on(device.rows, dinput, power);
  if (need_dweight) cross_entropy_scale_inplace_on(device.rows, dweight, sum_power);
  if (need_dbias) cross_entropy_scale_inplace_on(device.rows, dbias, sum_power);
  return gradients;
}

void addmm_float32_by_blocks(
    at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double beta, double alpha) {
  constexpr int64_t kBlockElements = int64_t{1} << 22;
  const int64_t rows = a.size(0), inner = a.size(1), cols = b.size(1);
  if (rows >= inner) {
    const auto wide_b = b.to(at::kFloat);
    const int64_t block = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, inner));
    for (int64_t start = 0; start < rows; start += block) {
      const int64_t count = std::min(block, rows - start);
      auto out_rows = out.narrow(0, start, count);
      at::addmm_out(out_rows, out_rows, a.narrow(0, start, count).to(at::kFloat), wide_b, beta, alpha);
    }
  } else {
    const int64_t block = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, std::max(rows, cols)));
    for (int64_t start = 0; start < inner; start += block) {
      const int64_t count = std::min(block, inner - start);
      at::addmm_out(out, out, a.narrow(1, start, count).to(at::kFloat),
          b.narrow(0, start, count).to(at::kFloat), start == 0 ? beta : 1.0, alpha);
    }
  }
}

}  // namespace liger
