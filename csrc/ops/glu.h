#pragma once

// Gated linear units (Shazeer, 2020, arXiv:2002.05202):  out = act(gate) * up, with
//
//   swiglu             silu(x) = x * sigmoid(x)
//   geglu, "tanh"      gelu(x) = x * (1 + tanh(u)) / 2,  u = sqrt(2 / pi) * (x + 0.044715 x^3)
//   geglu, "none"      gelu(x) = x * Phi(x), Phi the normal distribution (Hendrycks and Gimpel,
//   arXiv:1606.08415)
//
// Rounding points are those of Hugging Face's eager MLPs: the activation is computed in float32 (float64 for
// float64) and rounded to the dtype, the product is rounded again. The gradients are rounded once:
//
//   dgate = dout * up * act'(gate),  dup = dout * act(gate)
//
// The packed operators take gate and up as the halves of one buffer, and write the gradient of that buffer.

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

#include "ops/activation.h"

namespace liger {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

// Calls through the dispatcher.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up);
TensorPair swiglu_backward(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
at::Tensor geglu(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
TensorPair geglu_backward(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
at::Tensor swiglu_packed(const at::Tensor& gate_up);
at::Tensor swiglu_packed_backward(const at::Tensor& dout, const at::Tensor& gate_up);
at::Tensor geglu_packed(const at::Tensor& gate_up, std::string_view approximate);
at::Tensor geglu_packed_backward(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate);

// One call, as the device kernels see it. gate and up may be views of one buffer.
struct Glu {
  Activation activation;
  at::Tensor gate, up;
  at::Tensor dout;  // undefined in forward
};

// The activation that geglu's argument names; ValueError for another name.
Activation gelu_named(const char* op, std::string_view approximate);

// Check the arguments, which is the same for every backend.
Glu check_glu(const char* op, const at::Tensor& gate, const at::Tensor& up, Activation activation);
Glu check_glu_backward(const char* op, const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up,
    Activation activation);
Glu check_glu_packed(const char* op, const at::Tensor& gate_up, Activation activation);
Glu check_glu_packed_backward(
    const char* op, const at::Tensor& dout, const at::Tensor& gate_up, Activation activation);

// Kernels by dispatch key, bound in registration.cpp.
at::Tensor swiglu_cpu(const at::Tensor& gate, const at::Tensor& up);
TensorPair swiglu_backward_cpu(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
at::Tensor geglu_cpu(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
TensorPair geglu_backward_cpu(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
at::Tensor swiglu_packed_cpu(const at::Tensor& gate_up);
at::Tensor swiglu_packed_backward_cpu(const at::Tensor& dout, const at::Tensor& gate_up);
at::Tensor geglu_packed_cpu(const at::Tensor& gate_up, std::string_view approximate);
at::Tensor geglu_packed_backward_cpu(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate);

at::Tensor swiglu_cuda(const at::Tensor& gate, const at::Tensor& up);
TensorPair swiglu_backward_cuda(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
at::Tensor geglu_cuda(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
TensorPair geglu_backward_cuda(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
at::Tensor swiglu_packed_cuda(const at::Tensor& gate_up);
at::Tensor swiglu_packed_backward_cuda(const at::Tensor& dout, const at::Tensor& gate_up);
at::Tensor geglu_packed_cuda(const at::Tensor& gate_up, std::string_view approximate);
at::Tensor geglu_packed_backward_cuda(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate);

at::Tensor swiglu_meta(const at::Tensor& gate, const at::Tensor& up);
TensorPair swiglu_backward_meta(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
at::Tensor geglu_meta(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
TensorPair geglu_backward_meta(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
at::Tensor swiglu_packed_meta(const at::Tensor& gate_up);
at::Tensor swiglu_packed_backward_meta(const at::Tensor& dout, const at::Tensor& gate_up);
at::Tensor geglu_packed_meta(const at::Tensor& gate_up, std::string_view approximate);
at::Tensor geglu_packed_backward_meta(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate);

at::Tensor swiglu_autograd(const at::Tensor& gate, const at::Tensor& up);
at::Tensor geglu_autograd(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
at::Tensor swiglu_packed_autograd(const at::Tensor& gate_up);
at::Tensor geglu_packed_autograd(const at::Tensor& gate_up, std::string_view approximate);

}  // namespace liger
