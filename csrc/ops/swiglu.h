#pragma once

// The SwiGLU gate (Shazeer, 2020, arXiv:2002.05202):  out = silu(gate) * up,  silu(g) = g * sigmoid(g).
//
// Rounding points are those of Hugging Face's eager MLP: silu(gate) is computed in float32 (float64 for
// float64) and rounded to the dtype, the product is rounded again.

#include <ATen/core/Tensor.h>

#include <tuple>

namespace liger {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

// Calls through the dispatcher.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);
TensorPair swiglu_backward(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);

void check_swiglu(const at::Tensor& gate, const at::Tensor& up);
void check_swiglu_backward(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);

// Kernels by dispatch key, bound in registration.cpp.
at::Tensor swiglu_cpu(const at::Tensor& gate, const at::Tensor& up);
TensorPair swiglu_backward_cpu(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
at::Tensor swiglu_cuda(const at::Tensor& gate, const at::Tensor& up);
TensorPair swiglu_backward_cuda(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
at::Tensor swiglu_meta(const at::Tensor& gate, const at::Tensor& up);
TensorPair swiglu_backward_meta(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
at::Tensor swiglu_autograd(const at::Tensor& gate, const at::Tensor& up);

}  // namespace liger
