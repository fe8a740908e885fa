#include "ops/rope.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "cpu/kernels.h"
#include "ops/rows.h"

namespace liger {

using at::Tensor;

namespace {

cpu::RopeTensor describe(const Tensor& x, const Tensor& out) {
  return {.x = x.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .heads = x.size(1),
      .x_strides = {x.stride(0), x.stride(1), x.stride(2)},
      .out_strides = {out.stride(0), out.stride(1), out.stride(2)}};
}

TensorPair rotate(const Rotation& rotation) {
  check_rotation(rotation);
  const Tensor &q = rotation.q, &k = rotation.k, &cos = rotation.cos, &sin = rotation.sin;
  auto q_out = at::empty_like(q);
  auto k_out = at::empty_like(k);
  // An output lacks a unit last stride only where its input does; it is then filled through a buffer that
  // has.
  const auto q_in = with_unit_last_stride(q), k_in = with_unit_last_stride(k);
  const auto writable = [](const Tensor& out) {
    return out.size(-1) <= 1 || out.stride(-1) == 1 ? out : at::empty(out.sizes(), out.options());
  };
  const auto q_dense = writable(q_out), k_dense = writable(k_out);
  const auto cos_in = with_unit_last_stride(cos), sin_in = with_unit_last_stride(sin);
  const auto [first_end, second_end] = rotation.section_ends();
  cpu::kernels().rope(cpu::Rope{.dtype = q.scalar_type(),
      .angle_dtype = cos.scalar_type(),
      .tensors = {describe(q_in, q_dense), describe(k_in, k_dense)},
      .cos = cos_in.const_data_ptr(),
      .sin = sin_in.const_data_ptr(),
      .batch = q.size(0),
      .positions = q.size(2),
      .head_dim = q.size(3),
      .rotary_dim = cos.size(-1),
      .cos_strides = {plane_stride(cos_in), batch_stride(cos_in), cos_in.stride(-2)},
      .sin_strides = {plane_stride(sin_in), batch_stride(sin_in), sin_in.stride(-2)},
      .section_ends = {first_end, second_end},
      .interleaved = rotation.interleaved,
      .inverse = rotation.backward});
  if (!q_dense.is_same(q_out)) q_out.copy_(q_dense);
  if (!k_dense.is_same(k_out)) k_out.copy_(k_dense);
  return {q_out, k_out};
}

}  // namespace

TensorPair rope_cpu(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return rotate({.op = "rope", .q = q, .k = k, .cos = cos, .sin = sin, .interleaved = interleaved});
}

TensorPair rope_backward_cpu(
    const Tensor& dq, const Tensor& dk, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return rotate({.op = "rope_backward",
      .q = dq,
      .k = dk,
      .cos = cos,
      .sin = sin,
      .interleaved = interleaved,
      .backward = true});
}

TensorPair mrope_cpu(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, at::IntArrayRef mrope_section) {
  return rotate({.op = "mrope", .q = q, .k = k, .cos = cos, .sin = sin, .mrope_section = mrope_section});
}

TensorPair mrope_backward_cpu(
    const Tensor& dq, const Tensor& dk, const Tensor& cos, const Tensor& sin, at::IntArrayRef mrope_section) {
  return rotate({.op = "mrope_backward",
      .q = dq,
      .k = dk,
      .cos = cos,
      .sin = sin,
      .mrope_section = mrope_section,
      .backward = true});
}

}  // namespace liger
