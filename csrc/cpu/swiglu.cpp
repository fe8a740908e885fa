#include "ops/swiglu.h"

#include "cpu/kernels.h"

namespace liger {

namespace {

void forward(const GluRows& rows) { cpu::kernels().glu_forward(rows, GluActivation::kSilu); }
void backward(const GluRows& rows) { cpu::kernels().glu_backward(rows, GluActivation::kSilu); }

}  // namespace

at::Tensor swiglu_cpu(const at::Tensor& gate, const at::Tensor& up) {
  check_swiglu(gate, up);
  return glu_forward(gate, up, forward);
}

TensorPair swiglu_backward_cpu(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up) {
  check_swiglu_backward(dout, gate, up);
  return glu_backward(dout, gate, up, backward);
}

at::Tensor swiglu_packed_cpu(const at::Tensor& gate_up) {
  check_swiglu_packed(gate_up);
  return glu_packed_forward(gate_up, forward);
}

at::Tensor swiglu_packed_backward_cpu(const at::Tensor& dout, const at::Tensor& gate_up) {
  check_swiglu_packed_backward(dout, gate_up);
  return glu_packed_backward(dout, gate_up, backward);
}

void swiglu_backward_inplace_cpu(const at::Tensor& dout, at::Tensor& gate, at::Tensor& up) {
  check_swiglu_backward_(dout, gate, up);
  glu_backward_(dout, gate, up, backward);
}

void swiglu_packed_backward_inplace_cpu(const at::Tensor& dout, at::Tensor& gate_up) {
  check_swiglu_packed_backward_(dout, gate_up);
  glu_packed_backward_(dout, gate_up, backward);
}

}  // namespace liger
