#pragma once

// Rotary position embedding (Su et al., 2021, arXiv:2104.09864) in the half-split form of the Hugging Face
// models. With R = width of cos and sin, for j < R / 2:
//
//   out[j]         = x[j]         * cos[j]         - x[j + R / 2] * sin[j]
//   out[j + R / 2] = x[j + R / 2] * cos[j + R / 2] + x[j]         * sin[j + R / 2]
//
// Columns from R on are copied (partial rotary). Computed in float32 (float64 for float64) and rounded once.

#include <ATen/core/Tensor.h>

#include <tuple>

namespace liger {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

// q: [batch, query heads, positions, head_dim]; k: [batch, key heads, positions, head_dim];
// cos, sin: [1 or batch, positions, R] or [positions, R], of q's dtype or float32.
//
// Calls through the dispatcher.
TensorPair rope(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin);
TensorPair rope_backward(
    const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos, const at::Tensor& sin);

void check_rope(
    const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin);

// Kernels by dispatch key, bound in registration.cpp.
TensorPair rope_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin);
TensorPair rope_backward_cpu(
    const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos, const at::Tensor& sin);
TensorPair rope_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin);
TensorPair rope_backward_cuda(
    const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos, const at::Tensor& sin);
TensorPair rope_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin);
TensorPair rope_backward_meta(
    const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos, const at::Tensor& sin);
TensorPair rope_autograd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin);

}  // namespace liger
