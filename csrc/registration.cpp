// The whole operator surface of liger-ops: every schema, and every (operator, dispatch key) binding.
//
// Conventions: outputs are freshly allocated and never alias an input or each other; no input is mutated.
// Outputs that an operator does not produce (a gradient nobody asked for) have size 0.

#include <ATen/core/op_registration/adaption.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

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

  // The rotated q and k, in the memory order of q and k.
  m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor q_out, Tensor k_out)", kTags);
  m.def("rope_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin) -> (Tensor, Tensor)", kTags);

  // silu(gate) * up, contiguous.
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor", kTags);
  m.def("swiglu_backward(Tensor dout, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)", kTags);
}

TORCH_LIBRARY_IMPL(liger, CPU, m) {
  m.impl("rms_norm", liger::rms_norm_cpu);
  m.impl("rms_norm_backward", liger::rms_norm_backward_cpu);
  m.impl("rope", liger::rope_cpu);
  m.impl("rope_backward", liger::rope_backward_cpu);
  m.impl("swiglu", liger::swiglu_cpu);
  m.impl("swiglu_backward", liger::swiglu_backward_cpu);
}

#ifdef LIGER_WITH_CUDA
TORCH_LIBRARY_IMPL(liger, CUDA, m) {
  m.impl("rms_norm", liger::rms_norm_cuda);
  m.impl("rms_norm_backward", liger::rms_norm_backward_cuda);
  m.impl("rope", liger::rope_cuda);
  m.impl("rope_backward", liger::rope_backward_cuda);
  m.impl("swiglu", liger::swiglu_cuda);
  m.impl("swiglu_backward", liger::swiglu_backward_cuda);
}
#endif

TORCH_LIBRARY_IMPL(liger, Meta, m) {
  m.impl("rms_norm", liger::rms_norm_meta);
  m.impl("rms_norm_backward", liger::rms_norm_backward_meta);
  m.impl("rope", liger::rope_meta);
  m.impl("rope_backward", liger::rope_backward_meta);
  m.impl("swiglu", liger::swiglu_meta);
  m.impl("swiglu_backward", liger::swiglu_backward_meta);
}

TORCH_LIBRARY_IMPL(liger, Autograd, m) {
  m.impl("rms_norm", liger::rms_norm_autograd);
  m.impl("rms_norm_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("rope", liger::rope_autograd);
  m.impl("rope_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("swiglu", liger::swiglu_autograd);
  m.impl("swiglu_backward", torch::autograd::autogradNotImplementedFallback());
}

// Autocast leaves the dtypes of norms, rotary embeddings and GLUs alone. The kernels only take the
// autocast keys out of the way, so that nothing below is cast a second time.
namespace {
void register_autocast(torch::Library& m) {
  m.impl("rms_norm", liger::rms_norm_autocast);
  m.impl("rms_norm_backward", liger::rms_norm_backward_autocast);
  m.impl("rope", liger::rope_autocast);
  m.impl("rope_backward", liger::rope_backward_autocast);
  m.impl("swiglu", liger::swiglu_autocast);
  m.impl("swiglu_backward", liger::swiglu_backward_autocast);
}
}  // namespace

TORCH_LIBRARY_IMPL(liger, Autocast, m) { register_autocast(m); }
TORCH_LIBRARY_IMPL(liger, AutocastCPU, m) { register_autocast(m); }
