#pragma once

// Cross entropy of logits x [tokens, classes] with targets t, in float32 (float64 for float64 logits). Per
// row, with y = softcap * tanh(x / softcap) (y = x without), lse = log(sum_c exp(y_c)), class weights w (1
// without) and smoothing e:
//
//   ce = (1 - e) * w_t * (lse - y_t) + e / classes * sum_c w_c * (lse - y_c)
//   z  = lse_square_scale * lse^2
//
// and 0 for both where t is ignore_index. use_token_scaling multiplies both by p_t = exp(y_t - lse), as a
// constant to which no gradient flows (dynamic fine-tuning, Wu et al., arXiv:2508.05629; Liger's option of
// that name). Then
//
//   "none"  loss = ce + z per row
//   "sum"   loss = sum(ce) + sum(z)
//   "mean"  loss = sum(ce) / sum(w_t) + sum(z) / count, over the rows that are not ignored; 0 when all are
//
// z_loss is the z part of loss. The gradient of a row, before the division, the upstream gradient and the
// factor of token scaling, is, with p = exp(y - lse),
//
//   d y_c = p_c * ((1 - e) * w_t + e / classes * sum(w) + 2 * lse_square_scale * lse)
//           - [c = t] * (1 - e) * w_t - e / classes * w_c
//   d x_c = d y_c * (1 - (y_c / softcap)^2)
//
// predicted_tokens is, per row, the first class with the largest logit x, NaN being largest, as torch.argmax
// has it; -1 where t is ignore_index. token_accuracy is float32, whether it equals the target: 0 or 1 per row
// for "none", otherwise the mean over the rows that are not ignored, 0 when all are. Only loss is
// differentiable.
//
// The gradient of logits can be computed together with the loss (cross_entropy_forward's need_dlogits) or
// from what forward saved (cross_entropy_backward). Together, the logits are read once; but the upstream
// gradient is not known yet, and one that is not 1 costs a pass over the gradient (cross_entropy_scale) and a
// second rounding.

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace liger {

// loss, z_loss, lse, token_accuracy, predicted_tokens. The last two have size 0 unless they are asked for.
using CrossEntropyOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// CrossEntropyOutputs, lse_low, totals, dlogits. lse + lse_low is the log-sum-exp to more digits than lse can
// hold, without which the probabilities of large logits would be off. totals: see cross_entropy_rows.h.
// dlogits is the gradient for an upstream gradient of 1, of size 0 unless it is needed.
using CrossEntropyForward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
    at::Tensor, at::Tensor>;

enum class Reduction { kMean, kSum, kNone };

// The arguments that are not tensors.
struct CrossEntropyOptions {
  int64_t ignore_index;
  double label_smoothing;
  double lse_square_scale;
  double softcap;  // 0: none
  Reduction reduction;
  bool use_token_scaling;
  bool return_token_accuracy;
  bool return_predicted_tokens;
};

// The types of the operators' functions, to declare them without repeating their arguments.
using CrossEntropySignature = CrossEntropyOutputs(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens);
using CrossEntropyForwardSignature = CrossEntropyForward(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens, bool need_dlogits);
using CrossEntropyBackwardSignature = at::Tensor(const at::Tensor& dloss, const at::Tensor& logits,
    const at::Tensor& target, const std::optional<at::Tensor>& weight, const at::Tensor& lse,
    const at::Tensor& lse_low, const at::Tensor& totals, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    bool use_token_scaling);

using CrossEntropyScaleSignature = at::Tensor(const at::Tensor& grad, const at::Tensor& scale);
using CrossEntropyScaleInplaceSignature = void(at::Tensor& grad, const at::Tensor& scale);

// Calls through the dispatcher. cross_entropy is cross_entropy_forward without what only backward needs.
CrossEntropySignature cross_entropy;
CrossEntropyForwardSignature cross_entropy_forward;
CrossEntropyBackwardSignature cross_entropy_backward;
// grad * scale for a scale of one element, rounded once (at::mul would round the scale to grad's dtype
// first).
CrossEntropyScaleSignature cross_entropy_scale;
CrossEntropyScaleInplaceSignature cross_entropy_scale_;

// A gradient that was computed in forward, times the upstream gradient of the loss: for backward of a node
// with kOverwritesSaved. In `saved` itself where nobody else can see it.
at::Tensor scaled_gradient(const at::Tensor& saved, const at::Tensor& upstream);

// Argument checks, shared by every backend.
CrossEntropyOptions check_cross_entropy_options(const char* op, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    bool use_token_scaling, bool return_token_accuracy, bool return_predicted_tokens);
// `weight` holds the class weights and is called `weight_name` in messages;
// `values` is what target and weight have to fit, [tokens, ...], and `classes`
// the number of classes.
void check_target_and_class_weight(const char* op, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, const char* weight_name, const at::Tensor& values,
    const char* values_name, const c10::SymInt& classes);
// num_items, where there is one, replaces the divisor of "mean".
void check_num_items(const char* op, const std::optional<at::Tensor>& num_items, const at::Tensor& values,
    const char* values_name, std::string_view reduction);
CrossEntropyOptions check_cross_entropy(const char* op, const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens);
CrossEntropyOptions check_cross_entropy_backward(const at::Tensor& dloss, const at::Tensor& logits,
    const at::Tensor& target, const std::optional<at::Tensor>& weight, const at::Tensor& lse,
    const at::Tensor& lse_low, const at::Tensor& totals, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    bool use_token_scaling);
void check_cross_entropy_scale(const at::Tensor& grad, const at::Tensor& scale);

// CrossEntropyOutputs for `values` [tokens, ...] in the accumulate type of `dtype`, uninitialised.
CrossEntropyOutputs empty_cross_entropy_outputs(
    const at::Tensor& values, at::ScalarType dtype, const CrossEntropyOptions& options);

// Kernels by dispatch key, bound in registration.cpp; those of devices are in cross_entropy_rows.h.
CrossEntropySignature cross_entropy_from_forward;  // below Autograd, on every device
CrossEntropySignature cross_entropy_autograd;
CrossEntropyForwardSignature cross_entropy_forward_meta;
CrossEntropyBackwardSignature cross_entropy_backward_meta;
CrossEntropyScaleSignature cross_entropy_scale_meta;
CrossEntropyScaleInplaceSignature cross_entropy_scale_inplace_meta;

}  // namespace liger
