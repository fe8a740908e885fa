#pragma once

// Root-mean-square layer normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467) over the last dimension:
//
//   rstd = 1 / sqrt(mean(x^2) + eps),  n = x * rstd,  y = n * (offset + weight)
//
// The casting mode names the rounding points of the Hugging Face model it reproduces, with sums in float32
// (float64 for float64 x) in all of them:
//   "llama"  n is rounded to x's dtype before it meets the weight
//   "gemma"  n stays in float32 and y is rounded once (Gemma sets offset = 1)
//   "none"   as "gemma"; float32 throughout and one rounding

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace liger {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

// Calls through the dispatcher.
TensorPair rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps, double offset,
    std::string_view casting_mode);
TensorPair rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    std::string_view casting_mode, bool need_dx, bool need_dweight);

// Argument checks, shared by every backend. They return whether n is rounded to x's dtype.
bool check_rms_norm(
    const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps, std::string_view casting_mode);
bool check_rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& rstd, std::string_view casting_mode,
    bool need_dweight);

// Kernels by dispatch key, bound in registration.cpp.
TensorPair rms_norm_cpu(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps,
    double offset, std::string_view casting_mode);
TensorPair rms_norm_backward_cpu(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    std::string_view casting_mode, bool need_dx, bool need_dweight);
TensorPair rms_norm_cuda(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps,
    double offset, std::string_view casting_mode);
TensorPair rms_norm_backward_cuda(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    std::string_view casting_mode, bool need_dx, bool need_dweight);
TensorPair rms_norm_meta(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps,
    double offset, std::string_view casting_mode);
TensorPair rms_norm_backward_meta(const at::Tensor& dy, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    std::string_view casting_mode, bool need_dx, bool need_dweight);
TensorPair rms_norm_autograd(c10::DispatchKeySet keys, const at::Tensor& x,
    const std::optional<at::Tensor>& weight, double eps, double offset, std::string_view casting_mode);

}  // namespace liger
