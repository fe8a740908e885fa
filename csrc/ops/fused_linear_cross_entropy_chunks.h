#pragma once

// The chunk loop of fused linear cross entropy, which CPU and CUDA share: ATen matrix products around the row
// kernels of cross entropy.

#include <ATen/core/Tensor.h>

#include "ops/cross_entropy_rows.h"
#include "ops/fused_linear_cross_entropy.h"

namespace liger {

struct FusedLinearCrossEntropyDevice {
  const CrossEntropyDevice& rows;
  // out = beta * out + alpha * a @ b for 16-bit a and b and float32 out.
  void (*addmm_float32)(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double beta, double alpha);
  // Bytes that a call may take beside its results, when nobody says.
  int64_t (*default_workspace)(const at::Tensor& weight);
  // Rows of the logits buffer start at multiples of this.
  int64_t row_alignment_bytes;
};

extern const FusedLinearCrossEntropyDevice kFusedLinearCrossEntropyCpu;
extern const FusedLinearCrossEntropyDevice kFusedLinearCrossEntropyCuda;

// The kernels of the operators; registration.cpp binds them to a device (OnDevice).
FusedLinearCrossEntropyForward fused_linear_cross_entropy_forward_on(
    const FusedLinearCrossEntropyDevice& device, const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, bool use_token_scaling, bool return_token_accuracy,
    bool return_predicted_tokens, std::optional<at::ScalarType> compute_dtype, bool need_dinput,
    bool need_dweight, bool need_dbias);
FusedLinearCrossEntropyGradients fused_linear_cross_entropy_backward_on(
    const FusedLinearCrossEntropyDevice& device, const at::Tensor& dloss, const at::Tensor& input,
    const at::Tensor& weight, const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, bool use_token_scaling,
    std::optional<at::ScalarType> compute_dtype, bool need_dinput, bool need_dweight, bool need_dbias);

// addmm_float32 for devices whose matrix products do not widen: multiplies float32 copies, block by block.
void addmm_float32_by_blocks(
    at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double beta, double alpha);

}  // namespace liger
