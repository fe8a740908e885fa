#include "ops/swiglu.h"

#include <torch/csrc/autograd/custom_function.h>

#include "ops/dispatch.h"

namespace liger {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  static const auto op = find_operator("liger::swiglu", swiglu);
  return op.call(gate, up);
}

TensorPair swiglu_backward(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up) {
  static const auto op = find_operator("liger::swiglu_backward", swiglu_backward);
  return op.call(dout, gate, up);
}

at::Tensor swiglu_packed(const at::Tensor& gate_up) {
  static const auto op = find_operator("liger::swiglu_packed", swiglu_packed);
  return op.call(gate_up);
}

at::Tensor swiglu_packed_backward(const at::Tensor& dout, const at::Tensor& gate_up) {
  static const auto op = find_operator("liger::swiglu_packed_backward", swiglu_packed_backward);
  return op.call(dout, gate_up);
}

void check_swiglu(const at::Tensor& gate, const at::Tensor& up) { check_glu("swiglu", gate, up); }

void check_swiglu_backward(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up) {
  check_glu_backward("swiglu_backward", dout, gate, up);
}

void check_swiglu_packed(const at::Tensor& gate_up) { check_glu_packed("swiglu_packed", gate_up); }

void check_swiglu_packed_backward(const at::Tensor& dout, const at::Tensor& gate_up) {
  check_glu_packed_backward("swiglu_packed_backward", dout, gate_up);
}

at::Tensor swiglu_meta(const at::Tensor& gate, const at::Tensor& up) {
  check_swiglu(gate, up);
  return empty_glu(gate);
}

TensorPair swiglu_backward_meta(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up) {
  check_swiglu_backward(dout, gate, up);
  return empty_glu_gradients(gate);
}

at::Tensor swiglu_packed_meta(const at::Tensor& gate_up) {
  check_swiglu_packed(gate_up);
  return empty_glu_packed(gate_up);
}

at::Tensor swiglu_packed_backward_meta(const at::Tensor& dout, const at::Tensor& gate_up) {
  check_swiglu_packed_backward(dout, gate_up);
  return empty_glu_packed_gradient(gate_up);
}

namespace {

// With s = sigmoid(gate):  d gate = dout * up * s * (1 + gate * (1 - s)),  d up = dout * silu(gate).
class SwigluFunction : public torch::autograd::Function<SwigluFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& gate, const at::Tensor& up) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({gate, up});
    ctx->set_materialize_grads(false);
    return {swiglu(gate, up)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(2);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    auto [dgate, dup] = swiglu_backward(grads[0], saved[0], saved[1]);
    if (ctx->needs_input_grad(0)) result[0] = dgate;
    if (ctx->needs_input_grad(1)) result[1] = dup;
    return result;
  }
};

class SwigluPackedFunction : public torch::autograd::Function<SwigluPackedFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& gate_up) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({gate_up});
    ctx->set_materialize_grads(false);
    return {swiglu_packed(gate_up)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return {at::Tensor()};
    return {swiglu_packed_backward(grads[0], ctx->get_saved_variables()[0])};
  }
};

}  // namespace

at::Tensor swiglu_autograd(const at::Tensor& gate, const at::Tensor& up) {
  return SwigluFunction::apply(gate, up)[0];
}

at::Tensor swiglu_packed_autograd(const at::Tensor& gate_up) {
  return SwigluPackedFunction::apply(gate_up)[0];
}

}  // namespace liger
