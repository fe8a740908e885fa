#pragma once

// A residual connection and the RMSNorm after it (ops/rms_norm.h) in one pass:
//
//   sum = x + residual, rounded to x's dtype as a separate addition would;  y = rms_norm(sum)
//
// Both y and sum are differentiable. The gradient of x is that of residual: one tensor, as for an addition.

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace liger {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;
using TensorTriple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Calls through the dispatcher.
TensorTriple add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight, double eps, double offset, std::string_view casting_mode);
TensorPair add_rms_norm_backward(const at::Tensor& dy, const std::optional<at::Tensor>& dsum,
    const at::Tensor& sum, const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    std::string_view casting_mode, bool need_dx, bool need_dweight);

// Argument checks, shared by every backend. They return whether n is rounded to x's dtype.
bool check_add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight, double eps, std::string_view casting_mode);
bool check_add_rms_norm_backward(const at::Tensor& dy, const std::optional<at::Tensor>& dsum,
    const at::Tensor& sum, const std::optional<at::Tensor>& weight, const at::Tensor& rstd,
    std::string_view casting_mode, bool need_dweight);

// Kernels by dispatch key, bound in registration.cpp.
TensorTriple add_rms_norm_cpu(const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight, double eps, double offset, std::string_view casting_mode);
TensorPair add_rms_norm_backward_cpu(const at::Tensor& dy, const std::optional<at::Tensor>& dsum,
    const at::Tensor& sum, const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    std::string_view casting_mode, bool need_dx, bool need_dweight);
TensorTriple add_rms_norm_cuda(const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight, double eps, double offset, std::string_view casting_mode);
TensorPair add_rms_norm_backward_cuda(const at::Tensor& dy, const std::optional<at::Tensor>& dsum,
    const at::Tensor& sum, const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    std::string_view casting_mode, bool need_dx, bool need_dweight);
TensorTriple add_rms_norm_meta(const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight, double eps, double offset, std::string_view casting_mode);
TensorPair add_rms_norm_backward_meta(const at::Tensor& dy, const std::optional<at::Tensor>& dsum,
    const at::Tensor& sum, const std::optional<at::Tensor>& weight, const at::Tensor& rstd, double offset,
    std::string_view casting_mode, bool need_dx, bool need_dweight);
TensorTriple add_rms_norm_autograd(c10::DispatchKeySet keys, const at::Tensor& x, const at::Tensor& residual,
    const std::optional<at::Tensor>& weight, double eps, double offset, std::string_view casting_mode);

}  // namespace liger
