#include "ops/swiglu.h"

#include <ATen/ops/empty.h>

#include "cpu/kernels.h"
#include "ops/rows.h"

namespace liger {

at::Tensor swiglu_cpu(const at::Tensor& gate, const at::Tensor& up) {
  check_swiglu(gate, up);
  auto out = at::empty(gate.sizes(), gate.options());
  const auto gate_rows = as_rows(gate);
  const auto up_rows = as_rows(up);
  // Contiguous tensors are one long row, which splits evenly over threads whatever their shape.
  const bool flat = gate_rows.dense() && up_rows.dense();
  cpu::kernels().swiglu_forward(cpu::Swiglu{.dtype = gate.scalar_type(),
      .gate = gate_rows.data(),
      .up = up_rows.data(),
      .out = out.mutable_data_ptr(),
      .rows = flat ? 1 : gate_rows.rows,
      .cols = flat ? out.numel() : gate_rows.cols,
      .gate_stride = gate_rows.stride,
      .up_stride = up_rows.stride});
  return out;
}

TensorPair swiglu_backward_cpu(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up) {
  check_swiglu_backward(dout, gate, up);
  auto dgate = at::empty(gate.sizes(), gate.options());
  auto dup = at::empty(gate.sizes(), gate.options());
  const auto gate_rows = as_rows(gate);
  const auto up_rows = as_rows(up);
  const auto dout_rows = as_rows(dout);
  const bool flat = gate_rows.dense() && up_rows.dense() && dout_rows.dense();
  cpu::kernels().swiglu_backward(cpu::Swiglu{.dtype = gate.scalar_type(),
      .gate = gate_rows.data(),
      .up = up_rows.data(),
      .dout = dout_rows.data(),
      .dgate = dgate.mutable_data_ptr(),
      .dup = dup.mutable_data_ptr(),
      .rows = flat ? 1 : gate_rows.rows,
      .cols = flat ? dgate.numel() : gate_rows.cols,
      .gate_stride = gate_rows.stride,
      .up_stride = up_rows.stride,
      .dout_stride = dout_rows.stride});
  return {dgate, dup};
}

}  // namespace liger
