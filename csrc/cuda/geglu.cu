#include "cuda/glu_launch.h"
#include "ops/geglu.h"

namespace liger {

namespace {

auto forward(const char* op, GluActivation gelu) {
  return [op, gelu](const GluRows& rows) {
    gelu == GluActivation::kGeluTanh ? cuda::launch_glu_forward<cuda::GeluTanh>(op, rows)
                                     : cuda::launch_glu_forward<cuda::GeluErf>(op, rows);
  };
}

auto backward(const char* op, GluActivation gelu) {
  return [op, gelu](const GluRows& rows) {
    gelu == GluActivation::kGeluTanh ? cuda::launch_glu_backward<cuda::GeluTanh>(op, rows)
                                     : cuda::launch_glu_backward<cuda::GeluErf>(op, rows);
  };
}

}  // namespace

at::Tensor geglu_cuda(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  const auto gelu = check_geglu(gate, up, approximate);
  const c10::cuda::CUDAGuard device_guard(gate.device());
  return glu_forward(gate, up, forward("geglu", gelu));
}

TensorPair geglu_backward_cuda(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  const auto gelu = check_geglu_backward(dout, gate, up, approximate);
  const c10::cuda::CUDAGuard device_guard(gate.device());
  return glu_backward(dout, gate, up, backward("geglu_backward", gelu));
}

at::Tensor geglu_packed_cuda(const at::Tensor& gate_up, std::string_view approximate) {
  const auto gelu = check_geglu_packed(gate_up, approximate);
  const c10::cuda::CUDAGuard device_guard(gate_up.device());
  return glu_packed_forward(gate_up, forward("geglu_packed", gelu));
}

at::Tensor geglu_packed_backward_cuda(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate) {
  const auto gelu = check_geglu_packed_backward(dout, gate_up, approximate);
  const c10::cuda::CUDAGuard device_guard(gate_up.device());
  return glu_packed_backward(dout, gate_up, backward("geglu_packed_backward", gelu));
}

void geglu_backward_inplace_cuda(
    const at::Tensor& dout, at::Tensor& gate, at::Tensor& up, std::string_view approximate) {
  const auto gelu = check_geglu_backward_(dout, gate, up, approximate);
  const c10::cuda::CUDAGuard device_guard(gate.device());
  glu_backward_(dout, gate, up, backward("geglu_backward_", gelu));
}

void geglu_packed_backward_inplace_cuda(
    const at::Tensor& dout, at::Tensor& gate_up, std::string_view approximate) {
  const auto gelu = check_geglu_packed_backward_(dout, gate_up, approximate);
  const c10::cuda::CUDAGuard device_guard(gate_up.device());
  glu_packed_backward_(dout, gate_up, backward("geglu_packed_backward_", gelu));
}

}  // namespace liger
