#include "ops/glu.h"

#include <ATen/ops/empty.h>

#include "cpu/kernels.h"
#include "ops/rows.h"

namespace liger {

using at::Tensor;

namespace {

Tensor forward(const Glu& glu) {
  auto out = at::empty(glu.gate.sizes(), glu.gate.options());
  const auto gate = as_rows(glu.gate), up = as_rows(glu.up);
  // Contiguous tensors are one long row, which splits evenly over threads whatever their shape.
  const bool flat = gate.dense() && up.dense();
  cpu::kernels().glu_forward(cpu::Glu{.dtype = out.scalar_type(),
      .activation = glu.activation,
      .gate = gate.data(),
      .up = up.data(),
      .out = out.mutable_data_ptr(),
      .rows = flat ? 1 : gate.rows,
      .cols = flat ? out.numel() : gate.cols,
      .gate_stride = gate.stride,
      .up_stride = up.stride});
  return out;
}

// dgate and dup have rows of one stride: tensors of their own, or the halves of a buffer.
void backward_into(const Glu& glu, const Tensor& dgate, const Tensor& dup) {
  const auto gate = as_rows(glu.gate), up = as_rows(glu.up), dout = as_rows(glu.dout);
  const auto gradient = as_rows(dgate);
  const bool flat = gate.dense() && up.dense() && dout.dense() && gradient.dense();
  cpu::kernels().glu_backward(cpu::Glu{.dtype = dgate.scalar_type(),
      .activation = glu.activation,
      .gate = gate.data(),
      .up = up.data(),
      .dout = dout.data(),
      .dgate = dgate.mutable_data_ptr(),
      .dup = dup.mutable_data_ptr(),
      .rows = flat ? 1 : gate.rows,
      .cols = flat ? dgate.numel() : gate.cols,
      .gate_stride = gate.stride,
      .up_stride = up.stride,
      .dout_stride = dout.stride,
      .gradient_stride = gradient.stride});
}

TensorPair backward(const Glu& glu) {
  auto dgate = at::empty(glu.gate.sizes(), glu.gate.options());
  auto dup = at::empty(glu.gate.sizes(), glu.gate.options());
  backward_into(glu, dgate, dup);
  return {dgate, dup};
}

Tensor packed_backward(const Glu& glu, const Tensor& gate_up) {
  auto gradient = at::empty(gate_up.sizes(), gate_up.options());
  const auto halves = gradient.chunk(2, -1);
  backward_into(glu, halves[0], halves[1]);
  return gradient;
}

}  // namespace

Tensor swiglu_cpu(const Tensor& gate, const Tensor& up) {
  return forward(check_glu("swiglu", gate, up, Activation::kSilu));
}

TensorPair swiglu_backward_cpu(const Tensor& dout, const Tensor& gate, const Tensor& up) {
  return backward(check_glu_backward("swiglu_backward", dout, gate, up, Activation::kSilu));
}

Tensor geglu_cpu(const Tensor& gate, const Tensor& up, std::string_view approximate) {
  return forward(check_glu("geglu", gate, up, gelu_named("geglu", approximate)));
}

TensorPair geglu_backward_cpu(
    const Tensor& dout, const Tensor& gate, const Tensor& up, std::string_view approximate) {
  return backward(
      check_glu_backward("geglu_backward", dout, gate, up, gelu_named("geglu_backward", approximate)));
}

Tensor swiglu_packed_cpu(const Tensor& gate_up) {
  return forward(check_glu_packed("swiglu_packed", gate_up, Activation::kSilu));
}

Tensor swiglu_packed_backward_cpu(const Tensor& dout, const Tensor& gate_up) {
  return packed_backward(
      check_glu_packed_backward("swiglu_packed_backward", dout, gate_up, Activation::kSilu), gate_up);
}

Tensor geglu_packed_cpu(const Tensor& gate_up, std::string_view approximate) {
  return forward(check_glu_packed("geglu_packed", gate_up, gelu_named("geglu_packed", approximate)));
}

Tensor geglu_packed_backward_cpu(const Tensor& dout, const Tensor& gate_up, std::string_view approximate) {
  return packed_backward(check_glu_packed_backward("geglu_packed_backward", dout, gate_up,
                             gelu_named("geglu_packed_backward", approximate)),
      gate_up);
}

}  // namespace liger
