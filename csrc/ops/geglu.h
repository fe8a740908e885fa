#pragma once

// The GeGLU gate (Shazeer, 2020, arXiv:2002.05202):  out = gelu(gate) * up, with the GELU of Hendrycks and
// Gimpel (arXiv:1606.08415), g * Phi(g), Phi the normal distribution function, exact or approximated:
//
//   approximate = "none"    Phi(g) = (1 + erf(g / sqrt(2))) / 2
//   approximate = "tanh"    Phi(g) = (1 + tanh(u)) / 2 = sigmoid(2 u),  u = sqrt(2 / pi) (g + 0.044715 g^3)
//
// The derivative is Phi + g * Phi'. Kernels compute the smaller of Phi and 1 - Phi without cancellation and
// take the other from it, so both are accurate in their tails and reach 0 and 1 exactly; nothing overflows.
//
// Layouts and rounding points: ops/glu.h.

#include <string_view>

#include "ops/glu.h"

namespace liger {

// Calls through the dispatcher.
at::Tensor geglu(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
TensorPair geglu_backward(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
at::Tensor geglu_packed(const at::Tensor& gate_up, std::string_view approximate);
at::Tensor geglu_packed_backward(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate);
void geglu_backward_(const at::Tensor& dout, at::Tensor& gate, at::Tensor& up, std::string_view approximate);
void geglu_packed_backward_(const at::Tensor& dout, at::Tensor& gate_up, std::string_view approximate);

// The checks also read `approximate`.
GluActivation check_geglu(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
GluActivation check_geglu_backward(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
GluActivation check_geglu_packed(const at::Tensor& gate_up, std::string_view approximate);
GluActivation check_geglu_packed_backward(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate);
GluActivation check_geglu_backward_(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
GluActivation check_geglu_packed_backward_(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate);

// Kernels by dispatch key, bound in registration.cpp.
at::Tensor geglu_cpu(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
TensorPair geglu_backward_cpu(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
at::Tensor geglu_packed_cpu(const at::Tensor& gate_up, std::string_view approximate);
at::Tensor geglu_packed_backward_cpu(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate);
void geglu_backward_inplace_cpu(
    const at::Tensor& dout, at::Tensor& gate, at::Tensor& up, std::string_view approximate);
void geglu_packed_backward_inplace_cpu(
    const at::Tensor& dout, at::Tensor& gate_up, std::string_view approximate);
at::Tensor geglu_cuda(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
TensorPair geglu_backward_cuda(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
at::Tensor geglu_packed_cuda(const at::Tensor& gate_up, std::string_view approximate);
at::Tensor geglu_packed_backward_cuda(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate);
void geglu_backward_inplace_cuda(
    const at::Tensor& dout, at::Tensor& gate, at::Tensor& up, std::string_view approximate);
void geglu_packed_backward_inplace_cuda(
    const at::Tensor& dout, at::Tensor& gate_up, std::string_view approximate);
at::Tensor geglu_meta(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
TensorPair geglu_backward_meta(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
at::Tensor geglu_packed_meta(const at::Tensor& gate_up, std::string_view approximate);
at::Tensor geglu_packed_backward_meta(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate);
void geglu_backward_inplace_meta(
    const at::Tensor& dout, at::Tensor& gate, at::Tensor& up, std::string_view approximate);
void geglu_packed_backward_inplace_meta(
    const at::Tensor& dout, at::Tensor& gate_up, std::string_view approximate);
at::Tensor geglu_autograd(
    c10::DispatchKeySet keys, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate);
at::Tensor geglu_packed_autograd(
    c10::DispatchKeySet keys, const at::Tensor& gate_up, std::string_view approximate);

}  // namespace liger
