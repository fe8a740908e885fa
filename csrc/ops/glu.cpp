#include "ops/glu.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include "ops/checks.h"
#include "ops/rows.h"

namespace liger {

namespace {

// The shape of gate, up and out.
c10::SymDimVector half_shape(const at::Tensor& gate_up) {
  c10::SymDimVector shape(gate_up.sym_sizes().begin(), gate_up.sym_sizes().end());
  shape.back() = shape.back() / 2;
  return shape;
}

void check_contiguous(const Argument& arg) {
  TORCH_CHECK_VALUE(arg.tensor.is_contiguous(), "liger::", arg.op, ": ", arg.name,
      ", which the gradient is written over, must be contiguous, got strides ", arg.tensor.sym_strides());
}

}  // namespace

void check_glu(const char* op, const at::Tensor& gate, const at::Tensor& up) {
  const Argument gate_arg{op, "gate", gate};
  const Argument up_arg{op, "up", up};
  check_floating(gate_arg);
  check_dim_at_least(gate_arg, 1);
  check_same_device(up_arg, gate_arg);
  check_same_dtype(up_arg, gate_arg);
  check_same_shape(up_arg, gate_arg);
}

void check_glu_backward(
    const char* op, const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up) {
  check_glu(op, gate, up);
  const Argument dout_arg{op, "dout", dout};
  const Argument gate_arg{op, "gate", gate};
  check_same_device(dout_arg, gate_arg);
  check_same_dtype(dout_arg, gate_arg);
  check_same_shape(dout_arg, gate_arg);
}

void check_glu_packed(const char* op, const at::Tensor& gate_up) {
  const Argument gate_up_arg{op, "gate_up", gate_up};
  check_floating(gate_up_arg);
  check_dim_at_least(gate_up_arg, 1);
  TORCH_CHECK_VALUE((gate_up.sym_size(-1) % 2).sym_eq(0).expect_true(__FILE__, __LINE__), "liger::", op,
      ": gate_up must have an even last dimension (gate, then up), got shape ", gate_up.sym_sizes());
}

void check_glu_packed_backward(const char* op, const at::Tensor& dout, const at::Tensor& gate_up) {
  check_glu_packed(op, gate_up);
  const Argument dout_arg{op, "dout", dout};
  const Argument gate_up_arg{op, "gate_up", gate_up};
  check_same_device(dout_arg, gate_up_arg);
  check_same_dtype(dout_arg, gate_up_arg);
  check_shape(dout_arg, half_shape(gate_up), "shape of one half of gate_up");
}

void check_glu_backward_(
    const char* op, const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up) {
  check_glu_backward(op, dout, gate, up);
  check_contiguous({op, "gate", gate});
  check_contiguous({op, "up", up});
}

void check_glu_packed_backward_(const char* op, const at::Tensor& dout, const at::Tensor& gate_up) {
  check_glu_packed_backward(op, dout, gate_up);
  check_contiguous({op, "gate_up", gate_up});
}

at::Tensor empty_glu(const at::Tensor& gate) { return at::empty_symint(gate.sym_sizes(), gate.options()); }

TensorPair empty_glu_gradients(const at::Tensor& gate) { return {empty_glu(gate), empty_glu(gate)}; }

at::Tensor empty_glu_packed(const at::Tensor& gate_up) {
  return at::empty_symint(half_shape(gate_up), gate_up.options());
}

at::Tensor empty_glu_packed_gradient(const at::Tensor& gate_up) {
  return at::empty_symint(gate_up.sym_sizes(), gate_up.options());
}

// Contiguous tensors are one long row, which splits evenly over threads and keeps its alignment, whatever
// their shape.

at::Tensor glu_forward(const at::Tensor& gate, const at::Tensor& up, RunGlu run) {
  auto out = empty_glu(gate);
  if (out.numel() == 0) return out;
  const auto gate_rows = as_rows(gate), up_rows = as_rows(up);
  const bool flat = gate_rows.dense() && up_rows.dense();
  run({.dtype = gate.scalar_type(),
      .gate = gate_rows.data(),
      .up = up_rows.data(),
      .out = out.mutable_data_ptr(),
      .rows = flat ? 1 : gate_rows.rows,
      .cols = flat ? out.numel() : gate_rows.cols,
      .gate_stride = gate_rows.stride,
      .up_stride = up_rows.stride});
  return out;
}

namespace {

// dgate and dup are contiguous, and may be gate and up.
void run_glu_backward(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up,
    const at::Tensor& dgate, const at::Tensor& dup, RunGlu run) {
  if (dgate.numel() == 0) return;
  const auto dout_rows = as_rows(dout), gate_rows = as_rows(gate), up_rows = as_rows(up);
  const bool flat = dout_rows.dense() && gate_rows.dense() && up_rows.dense();
  run({.dtype = gate.scalar_type(),
      .gate = gate_rows.data(),
      .up = up_rows.data(),
      .dout = dout_rows.data(),
      .dgate = dgate.mutable_data_ptr(),
      .dup = dup.mutable_data_ptr(),
      .rows = flat ? 1 : gate_rows.rows,
      .cols = flat ? dgate.numel() : gate_rows.cols,
      .gate_stride = gate_rows.stride,
      .up_stride = up_rows.stride,
      .dout_stride = dout_rows.stride,
      .grad_stride = gate_rows.cols});
}

}  // namespace

TensorPair glu_backward(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, RunGlu run) {
  auto gradients = empty_glu_gradients(gate);
  run_glu_backward(dout, gate, up, std::get<0>(gradients), std::get<1>(gradients), run);
  return gradients;
}

void glu_backward_(const at::Tensor& dout, at::Tensor& gate, at::Tensor& up, RunGlu run) {
  at::assert_no_overlap(gate, up);
  at::assert_no_overlap(gate, dout);
  at::assert_no_overlap(up, dout);
  run_glu_backward(dout, gate, up, gate, up, run);
}

namespace {

// The start of the second half of a row.
template <typename Pointer>
Pointer* second_half(Pointer* row, const Rows& gate_up) {
  using Byte = std::conditional_t<std::is_const_v<Pointer>, const std::byte, std::byte>;
  return static_cast<Byte*>(row) + gate_up.cols / 2 * static_cast<int64_t>(gate_up.tensor.element_size());
}

}  // namespace

at::Tensor glu_packed_forward(const at::Tensor& gate_up, RunGlu run) {
  auto out = empty_glu_packed(gate_up);
  if (out.numel() == 0) return out;
  const auto rows = as_rows(gate_up);
  run({.dtype = gate_up.scalar_type(),
      .gate = rows.data(),
      .up = second_half(rows.data(), rows),
      .out = out.mutable_data_ptr(),
      .rows = rows.rows,
      .cols = rows.cols / 2,
      .gate_stride = rows.stride,
      .up_stride = rows.stride});
  return out;
}

namespace {

// The gradient is contiguous, and may be gate_up.
void run_glu_packed_backward(
    const at::Tensor& dout, const at::Tensor& gate_up, const at::Tensor& gradient, RunGlu run) {
  if (gradient.numel() == 0) return;
  const auto dout_rows = as_rows(dout), rows = as_rows(gate_up);
  run({.dtype = gate_up.scalar_type(),
      .gate = rows.data(),
      .up = second_half(rows.data(), rows),
      .dout = dout_rows.data(),
      .dgate = gradient.mutable_data_ptr(),
      .dup = second_half(gradient.mutable_data_ptr(), rows),
      .rows = rows.rows,
      .cols = rows.cols / 2,
      .gate_stride = rows.stride,
      .up_stride = rows.stride,
      .dout_stride = dout_rows.stride,
      .grad_stride = rows.cols});
}

}  // namespace

at::Tensor glu_packed_backward(const at::Tensor& dout, const at::Tensor& gate_up, RunGlu run) {
  auto gradient = empty_glu_packed_gradient(gate_up);
  run_glu_packed_backward(dout, gate_up, gradient, run);
  return gradient;
}

void glu_packed_backward_(const at::Tensor& dout, at::Tensor& gate_up, RunGlu run) {
  at::assert_no_overlap(gate_up, dout);
  run_glu_packed_backward(dout, gate_up, gate_up, run);
}

}  // namespace liger
