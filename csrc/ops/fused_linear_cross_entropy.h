#pragma once

// Cross entropy of  logits = input @ weight^T + bias  that never holds all logits: rows are worked on in
// chunks, in one buffer of at most workspace_bytes. Loss and options: ops/cross_entropy.h.
//
// With a reduction, the gradients are computed along with the loss, when a chunk's logits are at hand, and
// backward multiplies them by the upstream gradient. Unreduced, the upstream gradient of every row has to be
// known first: forward computes the loss alone, and backward computes the logits again.
//
// dtypes. The matrix products run in compute_dtype, by default the dtype of the arguments, which then must
// agree; autocast sets it and leaves the arguments as they are. A gradient has its argument's dtype. The
// weight's is accumulated over chunks in accum_dtype, by default its own; float32 is rounded once, at the
// end.

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "ops/cross_entropy.h"

namespace liger {

// CrossEntropyOutputs, dinput, dweight, dbias, grad_scale. In float16 the gradients are still to be
// multiplied by grad_scale, [2], its first element for dinput and its second for dweight and dbias: divided
// by the number of tokens they would underflow before a loss scale could save them. Its elements are powers
// of two, so that the product with a loss scale is exact. Otherwise grad_scale is of size 0.
using FusedLinearCrossEntropyForward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
    at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using FusedLinearCrossEntropyGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The types of the operators' functions, to declare them without repeating their arguments.
using FusedLinearCrossEntropySignature = CrossEntropyOutputs(const at::Tensor& input,
    const at::Tensor& weight, const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens, std::optional<at::ScalarType> compute_dtype);
using FusedLinearCrossEntropyForwardSignature = FusedLinearCrossEntropyForward(const at::Tensor& input,
    const at::Tensor& weight, const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens, std::optional<at::ScalarType> compute_dtype, bool need_dinput,
    bool need_dweight, bool need_dbias);
using FusedLinearCrossEntropyBackwardSignature = FusedLinearCrossEntropyGradients(const at::Tensor& dloss,
    const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& ce_weight, int64_t ignore_index,
    double label_smoothing, double lse_square_scale, std::optional<double> softcap,
    std::optional<at::ScalarType> accum_dtype, std::optional<int64_t> workspace_bytes, bool use_token_scaling,
    std::optional<at::ScalarType> compute_dtype, bool need_dinput, bool need_dweight, bool need_dbias);

// Calls through the dispatcher.
FusedLinearCrossEntropySignature fused_linear_cross_entropy;
// With the gradients that are asked for; "mean" and "sum" only.
FusedLinearCrossEntropyForwardSignature fused_linear_cross_entropy_forward;
// The gradients of reduction "none", dloss: [tokens].
FusedLinearCrossEntropyBackwardSignature fused_linear_cross_entropy_backward;

struct FusedLinearCrossEntropyOptions {
  CrossEntropyOptions loss;
  at::ScalarType compute_dtype;  // of the matrix products
  at::ScalarType accum_dtype;    // of the weight's gradient, while it is accumulated
  std::optional<int64_t> workspace_bytes;
};

// Argument checks, shared by every backend.
FusedLinearCrossEntropyOptions check_fused_linear_cross_entropy(const char* op, const at::Tensor& input,
    const at::Tensor& weight, const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens, std::optional<at::ScalarType> compute_dtype);
FusedLinearCrossEntropyOptions check_fused_linear_cross_entropy_backward(const at::Tensor& dloss,
    const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& ce_weight, int64_t ignore_index,
    double label_smoothing, double lse_square_scale, std::optional<double> softcap,
    std::optional<at::ScalarType> accum_dtype, std::optional<int64_t> workspace_bytes, bool use_token_scaling,
    std::optional<at::ScalarType> compute_dtype);
void check_wanted_gradients(const char* op, const std::optional<at::Tensor>& bias, bool need_dbias);

// Kernels by dispatch key, bound in registration.cpp; those of devices are in
// fused_linear_cross_entropy_chunks.h.
FusedLinearCrossEntropySignature fused_linear_cross_entropy_from_forward;  // below Autograd, on every device
FusedLinearCrossEntropySignature fused_linear_cross_entropy_autograd;
FusedLinearCrossEntropySignature fused_linear_cross_entropy_autocast;
FusedLinearCrossEntropyForwardSignature fused_linear_cross_entropy_forward_meta;
FusedLinearCrossEntropyBackwardSignature fused_linear_cross_entropy_backward_meta;

}  // namespace liger
