#include "ops/rope.h"

#include <ATen/ops/empty_like.h>

#include "cpu/kernels.h"
#include "ops/rows.h"

namespace liger {

namespace {

cpu::RopeTensor describe(const at::Tensor& x, const at::Tensor& out) {
  return {.x = x.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .heads = x.size(1),
      .x_strides = {x.stride(0), x.stride(1), x.stride(2)},
      .out_strides = {out.stride(0), out.stride(1), out.stride(2)}};
}

TensorPair rotate(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin, bool inverse) {
  auto q_out = at::empty_like(q);
  auto k_out = at::empty_like(k);
  // An output lacks a unit last stride only where its input does; it is then filled through a buffer that
  // has.
  const auto q_in = with_unit_last_stride(q), k_in = with_unit_last_stride(k);
  const auto q_dense = with_unit_last_stride(q_out), k_dense = with_unit_last_stride(k_out);
  const auto cos_in = with_unit_last_stride(cos), sin_in = with_unit_last_stride(sin);
  const auto batch_stride = [](const at::Tensor& t) {
    return t.dim() == 3 && t.size(0) > 1 ? t.stride(0) : 0;
  };
  cpu::kernels().rope(cpu::Rope{.dtype = q.scalar_type(),
      .angle_dtype = cos.scalar_type(),
      .tensors = {describe(q_in, q_dense), describe(k_in, k_dense)},
      .cos = cos_in.const_data_ptr(),
      .sin = sin_in.const_data_ptr(),
      .batch = q.size(0),
      .positions = q.size(2),
      .head_dim = q.size(3),
      .rotary_dim = cos.size(-1),
      .cos_strides = {batch_stride(cos_in), cos_in.stride(-2)},
      .sin_strides = {batch_stride(sin_in), sin_in.stride(-2)},
      .inverse = inverse});
  if (!q_dense.is_same(q_out)) q_out.copy_(q_dense);
  if (!k_dense.is_same(k_out)) k_out.copy_(k_dense);
  return {q_out, k_out};
}

}  // namespace

TensorPair rope_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin) {
  check_rope("rope", q, k, cos, sin);
  return rotate(q, k, cos, sin, /*inverse=*/false);
}

TensorPair rope_backward_cpu(
    const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos, const at::Tensor& sin) {
  check_rope("rope_backward", dq, dk, cos, sin);
  return rotate(dq, dk, cos, sin, /*inverse=*/true);
}

}  // namespace liger
