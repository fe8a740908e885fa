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
  // grad *= scale (one element, on the device).
  void (*scale)(at::Tensor& grad, const at::Tensor& scale);
  // Bytes that a call may take beside its results, when nobody says.
  int64_t (*default_workspace)(const at::Tensor& weight);
  // Rows of the logits buffer start at multiples of this.
  int64_t row_alignment_bytes;
};

struct FusedLinearCrossEntropyArguments {
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

// The loss, and the gradients that are asked for.
FusedLinearCrossEntropyForward fused_linear_cross_entropy_forward_chunks(
    const FusedLinearCrossEntropyDevice& device, const FusedLinearCrossEntropyArguments& args);

// The gradients for an upstream gradient [tokens] of the unreduced loss.
TensorTriple fused_linear_cross_entropy_backward_chunks(const FusedLinearCrossEntropyDevice& device,
    const FusedLinearCrossEntropyArguments& args, const at::Tensor& dloss);

// addmm_float32 for devices whose matrix products do not widen: multiplies float32 copies, block by block.
void addmm_float32_by_blocks(
    at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double beta, double alpha);

}  // namespace liger
