#pragma once

// Cross entropy of logits x [tokens, classes] with targets t, in float32 (float64 for float64 logits). Per
// row, with y = softcap * tanh(x / softcap) (y = x without), lse = log(sum_c exp(y_c)), class weights w (1
// without) and smoothing e:
//
//   ce = (1 - e) * w_t * (lse - y_t) + e / classes * sum_c w_c * (lse - y_c)
//   z  = lse_square_scale * lse^2
//
// and 0 for both where t is ignore_index. Then
//
//   "none"  loss = ce + z per row
//   "sum"   loss = sum(ce) + sum(z)
//   "mean"  loss = sum(ce) / sum(w_t) + sum(z) / count, over the rows that are not ignored; 0 when all are
//
// z_loss is the z part of loss. The gradient of a row, before the division and the upstream gradient, is,
// with p = exp(y - lse),
//
//   d y_c = p_c * ((1 - e) * w_t + e / classes * sum(w) + 2 * lse_square_scale * lse)
//           - [c = t] * (1 - e) * w_t - e / classes * w_c
//   d x_c = d y_c * (1 - (y_c / softcap)^2)

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace liger {

using TensorTriple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
// loss, z_loss, lse, lse_low, totals. lse + lse_low is the log-sum-exp to more digits than lse can hold,
// without which the probabilities of large logits would be off. totals: see cross_entropy_rows.h.
using CrossEntropyForward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

enum class Reduction { kMean, kSum, kNone };

// The arguments that are not tensors.
struct CrossEntropyOptions {
  int64_t ignore_index;
  double label_smoothing;
  double lse_square_scale;
  double softcap;  // 0: none
  Reduction reduction;
};

// The types of the operators' functions, to declare them without repeating their arguments.
using CrossEntropySignature = TensorTriple(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction);
using CrossEntropyForwardSignature = CrossEntropyForward(const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction);
using CrossEntropyBackwardSignature = at::Tensor(const at::Tensor& dloss, const at::Tensor& logits,
    const at::Tensor& target, const std::optional<at::Tensor>& weight, const at::Tensor& lse,
    const at::Tensor& lse_low, const at::Tensor& totals, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction);

// Calls through the dispatcher. cross_entropy is cross_entropy_forward without what only backward needs.
CrossEntropySignature cross_entropy;
CrossEntropyForwardSignature cross_entropy_forward;
CrossEntropyBackwardSignature cross_entropy_backward;

// Argument checks, shared by every backend.
CrossEntropyOptions check_cross_entropy_options(const char* op, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction);
// `weight` holds the class weights and is called `weight_name` in messages;
// `values` is what target and weight have to fit, [tokens, ...], and `classes`
// the number of classes.
void check_target_and_class_weight(const char* op, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, const char* weight_name, const at::Tensor& values,
    const char* values_name, const c10::SymInt& classes);
CrossEntropyOptions check_cross_entropy(const char* op, const at::Tensor& logits, const at::Tensor& target,
    const std::optional<at::Tensor>& weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction);
CrossEntropyOptions check_cross_entropy_backward(const at::Tensor& dloss, const at::Tensor& logits,
    const at::Tensor& target, const std::optional<at::Tensor>& weight, const at::Tensor& lse,
    const at::Tensor& lse_low, const at::Tensor& totals, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction);

// Kernels by dispatch key, bound in registration.cpp.
CrossEntropySignature cross_entropy_cpu;
CrossEntropySignature cross_entropy_cuda;
CrossEntropySignature cross_entropy_meta;
CrossEntropySignature cross_entropy_autograd;
CrossEntropyForwardSignature cross_entropy_forward_cpu;
CrossEntropyForwardSignature cross_entropy_forward_cuda;
CrossEntropyForwardSignature cross_entropy_forward_meta;
CrossEntropyBackwardSignature cross_entropy_backward_cpu;
CrossEntropyBackwardSignature cross_entropy_backward_cuda;
CrossEntropyBackwardSignature cross_entropy_backward_meta;

}  // namespace liger
