#include "cuda/glu_launch.h"
#include "ops/swiglu.h"

namespace liger {

at::Tensor swiglu_cuda(const at::Tensor& gate, const at::Tensor& up) {
  check_swiglu(gate, up);
  const c10::cuda::CUDAGuard device_guard(gate.device());
  return glu_forward(
      gate, up, [](const GluRows& rows) { cuda::launch_glu_forward<cuda::Silu>("swiglu", rows); });
}

TensorPair swiglu_backward_cuda(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up) {
  check_swiglu_backward(dout, gate, up);
  const c10::cuda::CUDAGuard device_guard(gate.device());
  return glu_backward(dout, gate, up,
      [](const GluRows& rows) { cuda::launch_glu_backward<cuda::Silu>("swiglu_backward", rows); });
}

at::Tensor swiglu_packed_cuda(const at::Tensor& gate_up) {
  check_swiglu_packed(gate_up);
  const c10::cuda::CUDAGuard device_guard(gate_up.device());
  return glu_packed_forward(
      gate_up, [](const GluRows& rows) { cuda::launch_glu_forward<cuda::Silu>("swiglu_packed", rows); });
}

at::Tensor swiglu_packed_backward_cuda(const at::Tensor& dout, const at::Tensor& gate_up) {
  check_swiglu_packed_backward(dout, gate_up);
  const c10::cuda::CUDAGuard device_guard(gate_up.device());
  return glu_packed_backward(dout, gate_up,
      [](const GluRows& rows) { cuda::launch_glu_backward<cuda::Silu>("swiglu_packed_backward", rows); });
}

void swiglu_backward_inplace_cuda(const at::Tensor& dout, at::Tensor& gate, at::Tensor& up) {
  check_swiglu_backward_(dout, gate, up);
  const c10::cuda::CUDAGuard device_guard(gate.device());
  glu_backward_(dout, gate, up,
      [](const GluRows& rows) { cuda::launch_glu_backward<cuda::Silu>("swiglu_backward_", rows); });
}

void swiglu_packed_backward_inplace_cuda(const at::Tensor& dout, at::Tensor& gate_up) {
  check_swiglu_packed_backward_(dout, gate_up);
  const c10::cuda::CUDAGuard device_guard(gate_up.device());
  glu_packed_backward_(dout, gate_up,
      [](const GluRows& rows) { cuda::launch_glu_backward<cuda::Silu>("swiglu_packed_backward_", rows); });
}

}  // namespace liger
