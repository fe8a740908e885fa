#pragma once

// The SwiGLU gate (Shazeer, 2020, arXiv:2002.05202):  out = silu(gate) * up,  silu(g) = g * sigmoid(g).
//
// Layouts and rounding points: ops/glu.h.

#include "ops/glu.h"

namespace liger {

// Calls through the dispatcher.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);
TensorPair swiglu_backward(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
at::Tensor swiglu_packed(const at::Tensor& gate_up);
at::Tensor swiglu_packed_backward(const at::Tensor& dout, const at::Tensor& gate_up);
void swiglu_backward_(const at::Tensor& dout, at::Tensor& gate, at::Tensor& up);
void swiglu_packed_backward_(const at::Tensor& dout, at::Tensor& gate_up);

void check_swiglu(const at::Tensor& gate, const at::Tensor& up);
void check_swiglu_backward(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
void check_swiglu_packed(const at::Tensor& gate_up);
void check_swiglu_packed_backward(const at::Tensor& dout, const at::Tensor& gate_up);
void check_swiglu_backward_(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
void check_swiglu_packed_backward_(const at::Tensor& dout, const at::Tensor& gate_up);

// Kernels by dispatch key, bound in registration.cpp.
at::Tensor swiglu_cpu(const at::Tensor& gate, const at::Tensor& up);
TensorPair swiglu_backward_cpu(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
at::Tensor swiglu_packed_cpu(const at::Tensor& gate_up);
at::Tensor swiglu_packed_backward_cpu(const at::Tensor& dout, const at::Tensor& gate_up);
void swiglu_backward_inplace_cpu(const at::Tensor& dout, at::Tensor& gate, at::Tensor& up);
void swiglu_packed_backward_inplace_cpu(const at::Tensor& dout, at::Tensor& gate_up);
at::Tensor swiglu_cuda(const at::Tensor& gate, const at::Tensor& up);
TensorPair swiglu_backward_cuda(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
at::Tensor swiglu_packed_cuda(const at::Tensor& gate_up);
at::Tensor swiglu_packed_backward_cuda(const at::Tensor& dout, const at::Tensor& gate_up);
void swiglu_backward_inplace_cuda(const at::Tensor& dout, at::Tensor& gate, at::Tensor& up);
void swiglu_packed_backward_inplace_cuda(const at::Tensor& dout, at::Tensor& gate_up);
at::Tensor swiglu_meta(const at::Tensor& gate, const at::Tensor& up);
TensorPair swiglu_backward_meta(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
at::Tensor swiglu_packed_meta(const at::Tensor& gate_up);
at::Tensor swiglu_packed_backward_meta(const at::Tensor& dout, const at::Tensor& gate_up);
void swiglu_backward_inplace_meta(const at::Tensor& dout, at::Tensor& gate, at::Tensor& up);
void swiglu_packed_backward_inplace_meta(const at::Tensor& dout, at::Tensor& gate_up);
at::Tensor swiglu_autograd(c10::DispatchKeySet keys, const at::Tensor& gate, const at::Tensor& up);
at::Tensor swiglu_packed_autograd(c10::DispatchKeySet keys, const at::Tensor& gate_up);

}  // namespace liger
