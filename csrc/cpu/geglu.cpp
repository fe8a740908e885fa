#include "ops/geglu.h"

#include "cpu/kernels.h"

namespace liger {

namespace {

auto forward(GluActivation gelu) {
  return [gelu](const GluRows& rows) { cpu::kernels().glu_forward(rows, gelu); };
}
auto backward(GluActivation gelu) {
  return [gelu](const GluRows& rows) { cpu::kernels().glu_backward(rows, gelu); };
}

}  // namespace

at::Tensor geglu_cpu(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  const auto gelu = check_geglu(gate, up, approximate);
  return glu_forward(gate, up, forward(gelu));
}

TensorPair geglu_backward_cpu(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  const auto gelu = check_geglu_backward(dout, gate, up, approximate);
  return glu_backward(dout, gate, up, backward(gelu));
}

at::Tensor geglu_packed_cpu(const at::Tensor& gate_up, std::string_view approximate) {
  const auto gelu = check_geglu_packed(gate_up, approximate);
  return glu_packed_forward(gate_up, forward(gelu));
}

at::Tensor geglu_packed_backward_cpu(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate) {
  const auto gelu = check_geglu_packed_backward(dout, gate_up, approximate);
  return glu_packed_backward(dout, gate_up, backward(gelu));
}

void geglu_backward_inplace_cpu(
    const at::Tensor& dout, at::Tensor& gate, at::Tensor& up, std::string_view approximate) {
  const auto gelu = check_geglu_backward_(dout, gate, up, approximate);
  glu_backward_(dout, gate, up, backward(gelu));
}

void geglu_packed_backward_inplace_cpu(
    const at::Tensor& dout, at::Tensor& gate_up, std::string_view approximate) {
  const auto gelu = check_geglu_packed_backward_(dout, gate_up, approximate);
  glu_packed_backward_(dout, gate_up, backward(gelu));
}

}  // namespace liger
