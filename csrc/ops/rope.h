#pragma once

// Rotary position embedding (Su et al., 2021, arXiv:2104.09864). With R = width of cos and sin, pair j < R /
// 2 is rotated by
//
//   out[a] = x[a] * cos[a] - x[b] * sin[a]
//   out[b] = x[b] * cos[b] + x[a] * sin[b]
//
// where a = j and b = j + R / 2 (the half-split form of most Hugging Face models), or, interleaved, a = 2j
// and b = 2j + 1 (GPT-J, Cohere). Columns from R on are copied (partial rotary). Computed in float32 (float64
// for float64) and rounded once.
//
// mrope (Qwen2-VL, Wang et al., 2024, arXiv:2409.12191) is the half-split form with cos and sin in three
// planes, of temporal, height and width positions; pair j reads the plane whose section holds j.

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <utility>

namespace liger {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

// q: [batch, query heads, positions, head_dim]; k: [batch, key heads, positions, head_dim];
// cos, sin: [1 or batch, positions, R] or [positions, R], of q's dtype or float32; for mrope with a leading
// dimension of 3. mrope_section: the pairs of each plane, R / 2 in all.
//
// Calls through the dispatcher.
TensorPair rope(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin, bool interleaved);
TensorPair rope_backward(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos,
    const at::Tensor& sin, bool interleaved);
TensorPair mrope(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin,
    at::IntArrayRef mrope_section);
TensorPair mrope_backward(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos,
    const at::Tensor& sin, at::IntArrayRef mrope_section);

// One call of rope, mrope or their backwards, as the device kernels see it.
struct Rotation {
  const char* op;
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& cos;
  const at::Tensor& sin;
  std::optional<at::IntArrayRef> mrope_section = std::nullopt;
  bool interleaved = false;
  bool backward = false;  // rotates back, which is what the transposed rotation does

  // Where the pairs of planes 0 and 1 end; without planes the first one has them all.
  std::pair<int64_t, int64_t> section_ends() const;
};

// Strides of cos and sin over planes and batch: 0 where one serves all.
inline int64_t plane_stride(const at::Tensor& angle) { return angle.dim() == 4 ? angle.stride(0) : 0; }
inline int64_t batch_stride(const at::Tensor& angle) {
  return angle.dim() > 2 && angle.size(-3) > 1 ? angle.stride(-3) : 0;
}

// The argument checks, shared by every backend.
void check_rotation(const Rotation& rotation);

// Kernels by dispatch key, bound in registration.cpp.
TensorPair rope_cpu(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin, bool interleaved);
TensorPair rope_backward_cpu(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos,
    const at::Tensor& sin, bool interleaved);
TensorPair rope_cuda(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin, bool interleaved);
TensorPair rope_backward_cuda(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos,
    const at::Tensor& sin, bool interleaved);
TensorPair rope_meta(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin, bool interleaved);
TensorPair rope_backward_meta(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos,
    const at::Tensor& sin, bool interleaved);
TensorPair rope_autograd(c10::DispatchKeySet keys, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& cos, const at::Tensor& sin, bool interleaved);

TensorPair mrope_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin,
    at::IntArrayRef mrope_section);
TensorPair mrope_backward_cpu(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos,
    const at::Tensor& sin, at::IntArrayRef mrope_section);
TensorPair mrope_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin,
    at::IntArrayRef mrope_section);
TensorPair mrope_backward_cuda(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos,
    const at::Tensor& sin, at::IntArrayRef mrope_section);
TensorPair mrope_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin,
    at::IntArrayRef mrope_section);
TensorPair mrope_backward_meta(const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos,
    const at::Tensor& sin, at::IntArrayRef mrope_section);
TensorPair mrope_autograd(c10::DispatchKeySet keys, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& cos, const at::Tensor& sin, at::IntArrayRef mrope_section);

}  // namespace liger
