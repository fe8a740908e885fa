#pragma once

// Layer normalisation (Ba, Kiros and Hinton, 2016, arXiv:1607.06450) over the last dimension, as
// F.layer_norm:
//
//   rstd = 1 / sqrt(var(x) + eps),  n = (x - mean(x)) * rstd,  y = n * weight + bias
//
// with the variance of the population. In float32 (float64 for float64 x), rounded once.
//
// mean is a rounded number: where it is large beside the deviations, x - mean is off by a visible share of
// them in every column alike. Every kernel therefore takes the mean of x - mean away once more, forward and
// backward.

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace liger {

using TensorTriple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Calls through the dispatcher.
TensorTriple layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps);
TensorTriple layer_norm_backward(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& mean, const at::Tensor& rstd,
    at::ScalarType bias_dtype, bool need_dx, bool need_dweight, bool need_dbias);

// Argument checks, shared by every backend.
void check_layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps);
void check_layer_norm_backward(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& mean, const at::Tensor& rstd,
    at::ScalarType bias_dtype, bool need_dweight);

// Weight and bias as the kernels take them: contiguous, of one dtype. A 16-bit one beside a float32 one is
// widened.
struct LayerNormAffine {
  at::Tensor weight, bias;  // undefined where there is none
  at::ScalarType dtype;

  LayerNormAffine(
      const at::Tensor& x, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias);
};

// Kernels by dispatch key, bound in registration.cpp.
TensorTriple layer_norm_cpu(const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps);
TensorTriple layer_norm_backward_cpu(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& mean, const at::Tensor& rstd,
    at::ScalarType bias_dtype, bool need_dx, bool need_dweight, bool need_dbias);
TensorTriple layer_norm_cuda(const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps);
TensorTriple layer_norm_backward_cuda(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& mean, const at::Tensor& rstd,
    at::ScalarType bias_dtype, bool need_dx, bool need_dweight, bool need_dbias);
TensorTriple layer_norm_meta(const at::Tensor& x, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double eps);
TensorTriple layer_norm_backward_meta(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& mean, const at::Tensor& rstd,
    at::ScalarType bias_dtype, bool need_dx, bool need_dweight, bool need_dbias);
TensorTriple layer_norm_autograd(c10::DispatchKeySet keys, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, double eps);

}  // namespace liger
