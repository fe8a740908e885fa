// The whole operator surface of liger-ops: every schema, and every (operator, dispatch key) binding.
//
// Conventions: outputs are freshly allocated and never alias an input or each other; no input is mutated,
// except by operators whose name ends in an underscore. Outputs that an operator does not produce (a gradient
// nobody asked for) have size 0.

#include <ATen/core/op_registration/adaption.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops/add_rms_norm.h"
#include "ops/cross_entropy.h"
#include "ops/cross_entropy_rows.h"
#include "ops/dispatch.h"
#include "ops/fused_linear_cross_entropy.h"
#include "ops/fused_linear_cross_entropy_chunks.h"
#include "ops/geglu.h"
#include "ops/layer_norm.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/swiglu.h"

namespace {
const std::vector<at::Tag> kTags = {at::Tag::pt2_compliant_tag};
}

TORCH_LIBRARY(liger, m) {
  // y: as x. rstd: x without its last dimension, float32 (float64 for float64 x).
  m.def(
      "rms_norm(Tensor x, Tensor? weight=None, float eps=1e-06, float offset=0.0, "
      "str casting_mode=\"llama\") -> (Tensor y, Tensor rstd)",
      kTags);
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float offset, "
      "str casting_mode, bool need_dx, bool need_dweight) -> (Tensor dx, Tensor dweight)",
      kTags);

  // sum: x + residual. y, rstd: of rms_norm(sum). dx: the gradient of x and of residual.
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor? weight=None, float eps=1e-06, float offset=0.0, "
      "str casting_mode=\"llama\") -> (Tensor y, Tensor sum, Tensor rstd)",
      kTags);
  m.def(
      "add_rms_norm_backward(Tensor dy, Tensor? dsum, Tensor sum, Tensor? weight, Tensor rstd, "
      "float offset, str casting_mode, bool need_dx, bool need_dweight) -> (Tensor dx, Tensor dweight)",
      kTags);

  // y: as x. mean, rstd: x without its last dimension, float32 (float64 for float64 x).
  m.def(
      "layer_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) -> "
      "(Tensor y, Tensor mean, Tensor rstd)",
      kTags);
  // bias_dtype: dtype of dbias.
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, "
      "ScalarType bias_dtype, bool need_dx, bool need_dweight, bool need_dbias) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias)",
      kTags);

  // The rotated q and k, in the memory order of q and k.
  m.def(
      "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved=False) -> "
      "(Tensor q_out, Tensor k_out)",
      kTags);
  m.def("rope_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
      kTags);
  m.def(
      "mrope(Tensor q, Tensor k, Tensor cos, Tensor sin, int[] mrope_section) -> "
      "(Tensor q_out, Tensor k_out)",
      kTags);
  m.def(
      "mrope_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin, int[] mrope_section) -> "
      "(Tensor, Tensor)",
      kTags);

  // silu(gate) * up, contiguous.
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor", kTags);
  m.def("swiglu_backward(Tensor dout, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)", kTags);
  // dgate is written over gate, dup over up, both contiguous and apart in memory.
  m.def("swiglu_backward_(Tensor dout, Tensor(a!) gate, Tensor(b!) up) -> ()", kTags);
  // gelu(gate) * up, contiguous; approximate: "tanh" or "none", as in F.gelu.
  m.def("geglu(Tensor gate, Tensor up, str approximate=\"tanh\") -> Tensor", kTags);
  m.def("geglu_backward(Tensor dout, Tensor gate, Tensor up, str approximate) -> (Tensor dgate, Tensor dup)",
      kTags);
  m.def("geglu_backward_(Tensor dout, Tensor(a!) gate, Tensor(b!) up, str approximate) -> ()", kTags);
  // gate and up are the halves of gate_up's last dimension.
  m.def("swiglu_packed(Tensor gate_up) -> Tensor", kTags);
  m.def("swiglu_packed_backward(Tensor dout, Tensor gate_up) -> Tensor dgate_up", kTags);
  m.def("swiglu_packed_backward_(Tensor dout, Tensor(a!) gate_up) -> ()", kTags);
  m.def("geglu_packed(Tensor gate_up, str approximate=\"tanh\") -> Tensor", kTags);
  m.def("geglu_packed_backward(Tensor dout, Tensor gate_up, str approximate) -> Tensor dgate_up", kTags);
  m.def("geglu_packed_backward_(Tensor dout, Tensor(a!) gate_up, str approximate) -> ()", kTags);

  // loss, z_loss: 0-D, or [tokens] for reduction "none"; lse: [tokens]; float32 (float64 for float64 logits).
  // token_accuracy: as loss, float32; predicted_tokens: [tokens] int64. z_loss is the part of loss that
  // lse_square_scale adds. num_items (one element) replaces the divisor of "mean". Only loss is
  // differentiable.
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight=None, int ignore_index=-100, "
      "float label_smoothing=0.0, float lse_square_scale=0.0, float? softcap=None, str reduction=\"mean\", "
      "Tensor? num_items=None, bool use_token_scaling=False, bool return_token_accuracy=False, "
      "bool return_predicted_tokens=False) -> "
      "(Tensor loss, Tensor z_loss, Tensor lse, Tensor token_accuracy, Tensor predicted_tokens)",
      kTags);
  // cross_entropy with what its backward needs: either lse, lse_low and totals, or with need_dlogits the
  // gradient for an upstream gradient of 1.
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
      "float label_smoothing, float lse_square_scale, float? softcap, str reduction, Tensor? num_items, "
      "bool use_token_scaling, bool return_token_accuracy, bool return_predicted_tokens, bool need_dlogits) "
      "-> (Tensor loss, Tensor z_loss, Tensor lse, Tensor token_accuracy, Tensor predicted_tokens, "
      "Tensor lse_low, Tensor totals, Tensor dlogits)",
      kTags);
  m.def(
      "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor? weight, Tensor lse, "
      "Tensor lse_low, Tensor totals, int ignore_index, float label_smoothing, float lse_square_scale, "
      "float? softcap, str reduction, bool use_token_scaling) -> Tensor dlogits",
      kTags);
  // grad times a 0-D scale, without rounding the scale to grad's dtype.
  m.def("cross_entropy_scale(Tensor grad, Tensor scale) -> Tensor", kTags);
  m.def("cross_entropy_scale_(Tensor(a!) grad, Tensor scale) -> ()", kTags);

  // The outputs: as cross_entropy of logits = input @ weight^T + bias. compute_dtype: dtype of the matrix
  // products; autocast sets it.
  m.def(
      "fused_linear_cross_entropy(Tensor input, Tensor weight, Tensor target, Tensor? bias=None, "
      "Tensor? ce_weight=None, int ignore_index=-100, float label_smoothing=0.0, float lse_square_scale=0.0, "
      "float? softcap=None, str reduction=\"mean\", Tensor? num_items=None, ScalarType? accum_dtype=None, "
      "int? workspace_bytes=None, bool use_token_scaling=False, bool return_token_accuracy=False, "
      "bool return_predicted_tokens=False, ScalarType? compute_dtype=None) -> "
      "(Tensor loss, Tensor z_loss, Tensor lse, Tensor token_accuracy, Tensor predicted_tokens)",
      kTags);
  // "mean" and "sum": the loss, and the gradients for an upstream gradient of 1, times grad_scale in float16.
  m.def(
      "fused_linear_cross_entropy_forward(Tensor input, Tensor weight, Tensor target, Tensor? bias, "
      "Tensor? ce_weight, int ignore_index, float label_smoothing, float lse_square_scale, float? softcap, "
      "str reduction, Tensor? num_items, ScalarType? accum_dtype, int? workspace_bytes, "
      "bool use_token_scaling, bool return_token_accuracy, bool return_predicted_tokens, "
      "ScalarType? compute_dtype, bool need_dinput, bool need_dweight, bool need_dbias) -> "
      "(Tensor loss, Tensor z_loss, Tensor lse, Tensor token_accuracy, Tensor predicted_tokens, "
      "Tensor dinput, Tensor dweight, Tensor dbias, Tensor grad_scale)",
      kTags);
  // "none": the gradients, for the upstream gradient of every token.
  m.def(
      "fused_linear_cross_entropy_backward(Tensor dloss, Tensor input, Tensor weight, Tensor target, "
      "Tensor? bias, Tensor? ce_weight, int ignore_index, float label_smoothing, float lse_square_scale, "
      "float? softcap, ScalarType? accum_dtype, int? workspace_bytes, bool use_token_scaling, "
      "ScalarType? compute_dtype, bool need_dinput, bool need_dweight, bool need_dbias) -> "
      "(Tensor dinput, Tensor dweight, Tensor dbias)",
      kTags);
}

TORCH_LIBRARY_IMPL(liger, CPU, m) {
  m.impl("rms_norm", liger::rms_norm_cpu);
  m.impl("rms_norm_backward", liger::rms_norm_backward_cpu);
  m.impl("add_rms_norm", liger::add_rms_norm_cpu);
  m.impl("add_rms_norm_backward", liger::add_rms_norm_backward_cpu);
  m.impl("layer_norm", liger::layer_norm_cpu);
  m.impl("layer_norm_backward", liger::layer_norm_backward_cpu);
  m.impl("rope", liger::rope_cpu);
  m.impl("rope_backward", liger::rope_backward_cpu);
  m.impl("mrope", liger::mrope_cpu);
  m.impl("mrope_backward", liger::mrope_backward_cpu);
  m.impl("swiglu", liger::swiglu_cpu);
  m.impl("swiglu_backward", liger::swiglu_backward_cpu);
  m.impl("swiglu_backward_", liger::swiglu_backward_inplace_cpu);
  m.impl("geglu", liger::geglu_cpu);
  m.impl("geglu_backward", liger::geglu_backward_cpu);
  m.impl("geglu_backward_", liger::geglu_backward_inplace_cpu);
  m.impl("swiglu_packed", liger::swiglu_packed_cpu);
  m.impl("swiglu_packed_backward", liger::swiglu_packed_backward_cpu);
  m.impl("swiglu_packed_backward_", liger::swiglu_packed_backward_inplace_cpu);
  m.impl("geglu_packed", liger::geglu_packed_cpu);
  m.impl("geglu_packed_backward", liger::geglu_packed_backward_cpu);
  m.impl("geglu_packed_backward_", liger::geglu_packed_backward_inplace_cpu);
  m.impl("cross_entropy", liger::cross_entropy_from_forward);
  m.impl("cross_entropy_forward",
      liger::OnDevice<liger::cross_entropy_forward_on, liger::kCrossEntropyCpu>::call);
  m.impl("cross_entropy_backward",
      liger::OnDevice<liger::cross_entropy_backward_on, liger::kCrossEntropyCpu>::call);
  m.impl(
      "cross_entropy_scale", liger::OnDevice<liger::cross_entropy_scale_on, liger::kCrossEntropyCpu>::call);
  m.impl("cross_entropy_scale_",
      liger::OnDevice<liger::cross_entropy_scale_inplace_on, liger::kCrossEntropyCpu>::call);
  m.impl("fused_linear_cross_entropy", liger::fused_linear_cross_entropy_from_forward);
  m.impl("fused_linear_cross_entropy_forward",
      liger::OnDevice<liger::fused_linear_cross_entropy_forward_on,
          liger::kFusedLinearCrossEntropyCpu>::call);
  m.impl("fused_linear_cross_entropy_backward",
      liger::OnDevice<liger::fused_linear_cross_entropy_backward_on,
          liger::kFusedLinearCrossEntropyCpu>::call);
}

#ifdef LIGER_WITH_CUDA
TORCH_LIBRARY_IMPL(liger, CUDA, m) {
  liger::reads_logits_once = liger::reads_logits_once_cuda;
  m.impl("rms_norm", liger::rms_norm_cuda);
  m.impl("rms_norm_backward", liger::rms_norm_backward_cuda);
  m.impl("add_rms_norm", liger::add_rms_norm_cuda);
  m.impl("add_rms_norm_backward", liger::add_rms_norm_backward_cuda);
  m.impl("layer_norm", liger::layer_norm_cuda);
  m.impl("layer_norm_backward", liger::layer_norm_backward_cuda);
  m.impl("rope", liger::rope_cuda);
  m.impl("rope_backward", liger::rope_backward_cuda);
  m.impl("mrope", liger::mrope_cuda);
  m.impl("mrope_backward", liger::mrope_backward_cuda);
  m.impl("swiglu", liger::swiglu_cuda);
  m.impl("swiglu_backward", liger::swiglu_backward_cuda);
  m.impl("swiglu_backward_", liger::swiglu_backward_inplace_cuda);
  m.impl("geglu", liger::geglu_cuda);
  m.impl("geglu_backward", liger::geglu_backward_cuda);
  m.impl("geglu_backward_", liger::geglu_backward_inplace_cuda);
  m.impl("swiglu_packed", liger::swiglu_packed_cuda);
  m.impl("swiglu_packed_backward", liger::swiglu_packed_backward_cuda);
  m.impl("swiglu_packed_backward_", liger::swiglu_packed_backward_inplace_cuda);
  m.impl("geglu_packed", liger::geglu_packed_cuda);
  m.impl("geglu_packed_backward", liger::geglu_packed_backward_cuda);
  m.impl("geglu_packed_backward_", liger::geglu_packed_backward_inplace_cuda);
  m.impl("cross_entropy", liger::cross_entropy_from_forward);
  m.impl("cross_entropy_forward",
      liger::OnDevice<liger::cross_entropy_forward_on, liger::kCrossEntropyCuda>::call);
  m.impl("cross_entropy_backward",
      liger::OnDevice<liger::cross_entropy_backward_on, liger::kCrossEntropyCuda>::call);
  m.impl(
      "cross_entropy_scale", liger::OnDevice<liger::cross_entropy_scale_on, liger::kCrossEntropyCuda>::call);
  m.impl("cross_entropy_scale_",
      liger::OnDevice<liger::cross_entropy_scale_inplace_on, liger::kCrossEntropyCuda>::call);
  m.impl("fused_linear_cross_entropy", liger::fused_linear_cross_entropy_from_forward);
  m.impl("fused_linear_cross_entropy_forward",
      liger::OnDevice<liger::fused_linear_cross_entropy_forward_on,
          liger::kFusedLinearCrossEntropyCuda>::call);
  m.impl("fused_linear_cross_entropy_backward",
      liger::OnDevice<liger::fused_linear_cross_entropy_backward_on,
          liger::kFusedLinearCrossEntropyCuda>::call);
}
#endif

TORCH_LIBRARY_IMPL(liger, Meta, m) {
  m.impl("rms_norm", liger::rms_norm_meta);
  m.impl("rms_norm_backward", liger::rms_norm_backward_meta);
  m.impl("add_rms_norm", liger::add_rms_norm_meta);
  m.impl("add_rms_norm_backward", liger::add_rms_norm_backward_meta);
  m.impl("layer_norm", liger::layer_norm_meta);
  m.impl("layer_norm_backward", liger::layer_norm_backward_meta);
  m.impl("rope", liger::rope_meta);
  m.impl("rope_backward", liger::rope_backward_meta);
  m.impl("mrope", liger::mrope_meta);
  m.impl("mrope_backward", liger::mrope_backward_meta);
  m.impl("swiglu", liger::swiglu_meta);
  m.impl("swiglu_backward", liger::swiglu_backward_meta);
  m.impl("swiglu_backward_", liger::swiglu_backward_inplace_meta);
  m.impl("geglu", liger::geglu_meta);
  m.impl("geglu_backward", liger::geglu_backward_meta);
  m.impl("geglu_backward_", liger::geglu_backward_inplace_meta);
  m.impl("swiglu_packed", liger::swiglu_packed_meta);
  m.impl("swiglu_packed_backward", liger::swiglu_packed_backward_meta);
  m.impl("swiglu_packed_backward_", liger::swiglu_packed_backward_inplace_meta);
  m.impl("geglu_packed", liger::geglu_packed_meta);
  m.impl("geglu_packed_backward", liger::geglu_packed_backward_meta);
  m.impl("geglu_packed_backward_", liger::geglu_packed_backward_inplace_meta);
  m.impl("cross_entropy", liger::cross_entropy_from_forward);
  m.impl("cross_entropy_forward", liger::cross_entropy_forward_meta);
  m.impl("cross_entropy_backward", liger::cross_entropy_backward_meta);
  m.impl("cross_entropy_scale", liger::cross_entropy_scale_meta);
  m.impl("cross_entropy_scale_", liger::cross_entropy_scale_inplace_meta);
  m.impl("fused_linear_cross_entropy", liger::fused_linear_cross_entropy_from_forward);
  m.impl("fused_linear_cross_entropy_forward", liger::fused_linear_cross_entropy_forward_meta);
  m.impl("fused_linear_cross_entropy_backward", liger::fused_linear_cross_entropy_backward_meta);
}

TORCH_LIBRARY_IMPL(liger, Autograd, m) {
  m.impl("rms_norm", liger::rms_norm_autograd);
  m.impl("rms_norm_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("add_rms_norm", liger::add_rms_norm_autograd);
  m.impl("add_rms_norm_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("layer_norm", liger::layer_norm_autograd);
  m.impl("layer_norm_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("rope", liger::rope_autograd);
  m.impl("rope_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("mrope", liger::mrope_autograd);
  m.impl("mrope_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("swiglu", liger::swiglu_autograd);
  m.impl("swiglu_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("swiglu_backward_", torch::autograd::autogradNotImplementedFallback());
  m.impl("geglu", liger::geglu_autograd);
  m.impl("geglu_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("geglu_backward_", torch::autograd::autogradNotImplementedFallback());
  m.impl("swiglu_packed", liger::swiglu_packed_autograd);
  m.impl("swiglu_packed_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("swiglu_packed_backward_", torch::autograd::autogradNotImplementedFallback());
  m.impl("geglu_packed", liger::geglu_packed_autograd);
  m.impl("geglu_packed_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("geglu_packed_backward_", torch::autograd::autogradNotImplementedFallback());
  m.impl("cross_entropy", liger::cross_entropy_autograd);
  m.impl("cross_entropy_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("cross_entropy_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("cross_entropy_scale", torch::autograd::autogradNotImplementedFallback());
  m.impl("cross_entropy_scale_", torch::autograd::autogradNotImplementedFallback());
  m.impl("fused_linear_cross_entropy", liger::fused_linear_cross_entropy_autograd);
  m.impl("fused_linear_cross_entropy_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("fused_linear_cross_entropy_backward", torch::autograd::autogradNotImplementedFallback());
}

// Autocast leaves the dtypes of norms, rotary embeddings, GLUs and logits alone. The kernels only take the
// autocast keys out of the way, so that nothing below is cast a second time; fused linear cross entropy casts
// the operands of its matrix products.
namespace {
void register_autocast(torch::Library& m) {
  m.impl("rms_norm", liger::WithoutAutocast<liger::rms_norm>::call);
  m.impl("rms_norm_backward", liger::WithoutAutocast<liger::rms_norm_backward>::call);
  m.impl("add_rms_norm", liger::WithoutAutocast<liger::add_rms_norm>::call);
  m.impl("add_rms_norm_backward", liger::WithoutAutocast<liger::add_rms_norm_backward>::call);
  m.impl("layer_norm", liger::WithoutAutocast<liger::layer_norm>::call);
  m.impl("layer_norm_backward", liger::WithoutAutocast<liger::layer_norm_backward>::call);
  m.impl("rope", liger::WithoutAutocast<liger::rope>::call);
  m.impl("rope_backward", liger::WithoutAutocast<liger::rope_backward>::call);
  m.impl("mrope", liger::WithoutAutocast<liger::mrope>::call);
  m.impl("mrope_backward", liger::WithoutAutocast<liger::mrope_backward>::call);
  m.impl("swiglu", liger::WithoutAutocast<liger::swiglu>::call);
  m.impl("swiglu_backward", liger::WithoutAutocast<liger::swiglu_backward>::call);
  m.impl("swiglu_backward_", liger::WithoutAutocast<liger::swiglu_backward_>::call);
  m.impl("geglu", liger::WithoutAutocast<liger::geglu>::call);
  m.impl("geglu_backward", liger::WithoutAutocast<liger::geglu_backward>::call);
  m.impl("geglu_backward_", liger::WithoutAutocast<liger::geglu_backward_>::call);
  m.impl("swiglu_packed", liger::WithoutAutocast<liger::swiglu_packed>::call);
  m.impl("swiglu_packed_backward", liger::WithoutAutocast<liger::swiglu_packed_backward>::call);
  m.impl("swiglu_packed_backward_", liger::WithoutAutocast<liger::swiglu_packed_backward_>::call);
  m.impl("geglu_packed", liger::WithoutAutocast<liger::geglu_packed>::call);
  m.impl("geglu_packed_backward", liger::WithoutAutocast<liger::geglu_packed_backward>::call);
  m.impl("geglu_packed_backward_", liger::WithoutAutocast<liger::geglu_packed_backward_>::call);
  m.impl("cross_entropy", liger::WithoutAutocast<liger::cross_entropy>::call);
  m.impl("cross_entropy_forward", liger::WithoutAutocast<liger::cross_entropy_forward>::call);
  m.impl("cross_entropy_backward", liger::WithoutAutocast<liger::cross_entropy_backward>::call);
  m.impl("fused_linear_cross_entropy", liger::fused_linear_cross_entropy_autocast);
  m.impl("fused_linear_cross_entropy_forward",
      liger::WithoutAutocast<liger::fused_linear_cross_entropy_forward>::call);
  m.impl("fused_linear_cross_entropy_backward",
      liger::WithoutAutocast<liger::fused_linear_cross_entropy_backward>::call);
  m.impl("cross_entropy_scale", liger::WithoutAutocast<liger::cross_entropy_scale>::call);
  m.impl("cross_entropy_scale_", liger::WithoutAutocast<liger::cross_entropy_scale_>::call);
}
}  // namespace

TORCH_LIBRARY_IMPL(liger, Autocast, m) { register_autocast(m); }
TORCH_LIBRARY_IMPL(liger, AutocastCPU, m) { register_autocast(m); }
