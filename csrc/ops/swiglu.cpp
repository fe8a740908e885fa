#include "ops/swiglu.h"

#include "ops/dispatch.h"
#include "ops/reuse.h"
#include "ops/swiglu_node.h"

namespace liger {

namespace {
const auto& swiglu_operator() {
  static const auto op = find_operator("liger::swiglu", swiglu);
  return op;
}
const auto& swiglu_packed_operator() {
  static const auto op = find_operator("liger::swiglu_packed", swiglu_packed);
  return op;
}
}  // namespace

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) { return swiglu_operator().call(gate, up); }

TensorPair swiglu_backward(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up) {
  static const auto op = find_operator("liger::swiglu_backward", swiglu_backward);
  return op.call(dout, gate, up);
}

at::Tensor swiglu_packed(const at::Tensor& gate_up) { return swiglu_packed_operator().call(gate_up); }

at::Tensor swiglu_packed_backward(const at::Tensor& dout, const at::Tensor& gate_up) {
  static const auto op = find_operator("liger::swiglu_packed_backward", swiglu_packed_backward);
  return op.call(dout, gate_up);
}

void swiglu_backward_(const at::Tensor& dout, at::Tensor& gate, at::Tensor& up) {
  static const auto op = find_operator("liger::swiglu_backward_", swiglu_backward_);
  op.call(dout, gate, up);
}

void swiglu_packed_backward_(const at::Tensor& dout, at::Tensor& gate_up) {
  static const auto op = find_operator("liger::swiglu_packed_backward_", swiglu_packed_backward_);
  op.call(dout, gate_up);
}

void check_swiglu(const at::Tensor& gate, const at::Tensor& up) { check_glu("swiglu", gate, up); }

void check_swiglu_backward(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up) {
  check_glu_backward("swiglu_backward", dout, gate, up);
}

void check_swiglu_packed(const at::Tensor& gate_up) { check_glu_packed("swiglu_packed", gate_up); }

void check_swiglu_packed_backward(const at::Tensor& dout, const at::Tensor& gate_up) {
  check_glu_packed_backward("swiglu_packed_backward", dout, gate_up);
}

void check_swiglu_backward_(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up) {
  check_glu_backward_("swiglu_backward_", dout, gate, up);
}

void check_swiglu_packed_backward_(const at::Tensor& dout, const at::Tensor& gate_up) {
  check_glu_packed_backward_("swiglu_packed_backward_", dout, gate_up);
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

void swiglu_backward_inplace_meta(const at::Tensor& dout, at::Tensor& gate, at::Tensor& up) {
  check_swiglu_backward_(dout, gate, up);
}

void swiglu_packed_backward_inplace_meta(const at::Tensor& dout, at::Tensor& gate_up) {
  check_swiglu_packed_backward_(dout, gate_up);
}

variable_list SwigluBackward::backward(
    const variable_list& grads, Wanted wanted, const at::Tensor& gate, const at::Tensor& up) {
  const auto gradients = [&]() -> TensorPair {
    if (!can_overwrite(gate) || !can_overwrite(up)) return swiglu_backward(grads[0], gate, up);
    auto dgate = gate.variable_data(), dup = up.variable_data();
    swiglu_backward_(grads[0], dgate, dup);
    return {std::move(dgate), std::move(dup)};
  };
  auto [dgate, dup] = gradients();
  return {wanted[0] ? dgate : at::Tensor(), wanted[1] ? dup : at::Tensor()};
}

at::Tensor SwigluBackward::rebuild() { return swiglu(gate.unpack(), up.unpack()); }

variable_list SwigluPackedBackward::backward(
    const variable_list& grads, Wanted /*wanted*/, const at::Tensor& gate_up) {
  if (!can_overwrite(gate_up)) return {swiglu_packed_backward(grads[0], gate_up)};
  auto gradient = gate_up.variable_data();
  swiglu_packed_backward_(grads[0], gradient);
  return {std::move(gradient)};
}

at::Tensor SwigluPackedBackward::rebuild() { return swiglu_packed(gate_up.unpack()); }

at::Tensor swiglu_autograd(c10::DispatchKeySet keys, const at::Tensor& gate, const at::Tensor& up) {
  const auto node = make_node<SwigluBackward>("swiglu", gate, up);
  auto out = redispatch_below_autograd(swiglu_operator(), keys, gate, up);
  if (node) {
    node->gate = SavedVariable(gate, /*is_output=*/false);
    node->up = SavedVariable(up, /*is_output=*/false);
    torch::autograd::set_history(out, node);
    node->watch(out);
  }
  return out;
}

at::Tensor swiglu_packed_autograd(c10::DispatchKeySet keys, const at::Tensor& gate_up) {
  const auto node = make_node<SwigluPackedBackward>("swiglu_packed", gate_up);
  auto out = redispatch_below_autograd(swiglu_packed_operator(), keys, gate_up);
  if (node) {
    node->gate_up = SavedVariable(gate_up, /*is_output=*/false);
    torch::autograd::set_history(out, node);
    node->watch(out);
  }
  return out;
}

}  // namespace liger
