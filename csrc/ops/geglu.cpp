#include "ops/geglu.h"

#include <c10/util/Exception.h>

#include <string>

#include "ops/dispatch.h"
#include "ops/geglu_node.h"
#include "ops/reuse.h"

namespace liger {

namespace {
const auto& geglu_operator() {
  static const auto op = find_operator("liger::geglu", geglu);
  return op;
}
const auto& geglu_packed_operator() {
  static const auto op = find_operator("liger::geglu_packed", geglu_packed);
  return op;
}
}  // namespace

at::Tensor geglu(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  return geglu_operator().call(gate, up, approximate);
}

TensorPair geglu_backward(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  static const auto op = find_operator("liger::geglu_backward", geglu_backward);
  return op.call(dout, gate, up, approximate);
}

at::Tensor geglu_packed(const at::Tensor& gate_up, std::string_view approximate) {
  return geglu_packed_operator().call(gate_up, approximate);
}

at::Tensor geglu_packed_backward(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate) {
  static const auto op = find_operator("liger::geglu_packed_backward", geglu_packed_backward);
  return op.call(dout, gate_up, approximate);
}

void geglu_backward_(const at::Tensor& dout, at::Tensor& gate, at::Tensor& up, std::string_view approximate) {
  static const auto op = find_operator("liger::geglu_backward_", geglu_backward_);
  op.call(dout, gate, up, approximate);
}

void geglu_packed_backward_(const at::Tensor& dout, at::Tensor& gate_up, std::string_view approximate) {
  static const auto op = find_operator("liger::geglu_packed_backward_", geglu_packed_backward_);
  op.call(dout, gate_up, approximate);
}

namespace {

GluActivation gelu_named(const char* op, std::string_view approximate) {
  TORCH_CHECK_VALUE(approximate == "tanh" || approximate == "none", "liger::", op,
      ": approximate must be \"tanh\" or \"none\", got \"", std::string(approximate), "\"");
  return approximate == "tanh" ? GluActivation::kGeluTanh : GluActivation::kGeluErf;
}

}  // namespace

GluActivation check_geglu(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  check_glu("geglu", gate, up);
  return gelu_named("geglu", approximate);
}

GluActivation check_geglu_backward(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  check_glu_backward("geglu_backward", dout, gate, up);
  return gelu_named("geglu_backward", approximate);
}

GluActivation check_geglu_packed(const at::Tensor& gate_up, std::string_view approximate) {
  check_glu_packed("geglu_packed", gate_up);
  return gelu_named("geglu_packed", approximate);
}

GluActivation check_geglu_packed_backward(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate) {
  check_glu_packed_backward("geglu_packed_backward", dout, gate_up);
  return gelu_named("geglu_packed_backward", approximate);
}

GluActivation check_geglu_backward_(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  check_glu_backward_("geglu_backward_", dout, gate, up);
  return gelu_named("geglu_backward_", approximate);
}

GluActivation check_geglu_packed_backward_(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate) {
  check_glu_packed_backward_("geglu_packed_backward_", dout, gate_up);
  return gelu_named("geglu_packed_backward_", approximate);
}

at::Tensor geglu_meta(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  check_geglu(gate, up, approximate);
  return empty_glu(gate);
}

TensorPair geglu_backward_meta(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  check_geglu_backward(dout, gate, up, approximate);
  return empty_glu_gradients(gate);
}

at::Tensor geglu_packed_meta(const at::Tensor& gate_up, std::string_view approximate) {
  check_geglu_packed(gate_up, approximate);
  return empty_glu_packed(gate_up);
}

at::Tensor geglu_packed_backward_meta(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate) {
  check_geglu_packed_backward(dout, gate_up, approximate);
  return empty_glu_packed_gradient(gate_up);
}

void geglu_backward_inplace_meta(
    const at::Tensor& dout, at::Tensor& gate, at::Tensor& up, std::string_view approximate) {
  check_geglu_backward_(dout, gate, up, approximate);
}

void geglu_packed_backward_inplace_meta(
    const at::Tensor& dout, at::Tensor& gate_up, std::string_view approximate) {
  check_geglu_packed_backward_(dout, gate_up, approximate);
}

variable_list GegluBackward::backward(const variable_list& grads, Wanted wanted, const at::Tensor& gate,
    const at::Tensor& up, const std::string& approximate) {
  const auto gradients = [&]() -> TensorPair {
    if (!can_overwrite(gate) || !can_overwrite(up)) return geglu_backward(grads[0], gate, up, approximate);
    auto dgate = gate.variable_data(), dup = up.variable_data();
    geglu_backward_(grads[0], dgate, dup, approximate);
    return {std::move(dgate), std::move(dup)};
  };
  auto [dgate, dup] = gradients();
  return {wanted[0] ? dgate : at::Tensor(), wanted[1] ? dup : at::Tensor()};
}

at::Tensor GegluBackward::rebuild() { return geglu(gate.unpack(), up.unpack(), approximate); }

variable_list GegluPackedBackward::backward(const variable_list& grads, Wanted /*wanted*/,
    const at::Tensor& gate_up, const std::string& approximate) {
  if (!can_overwrite(gate_up)) return {geglu_packed_backward(grads[0], gate_up, approximate)};
  auto gradient = gate_up.variable_data();
  geglu_packed_backward_(grads[0], gradient, approximate);
  return {std::move(gradient)};
}

at::Tensor GegluPackedBackward::rebuild() { return geglu_packed(gate_up.unpack(), approximate); }

at::Tensor geglu_autograd(
    c10::DispatchKeySet keys, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  const auto node = make_node<GegluBackward>("geglu", gate, up);
  auto out = redispatch_below_autograd(geglu_operator(), keys, gate, up, approximate);
  if (node) {
    node->gate = SavedVariable(gate, /*is_output=*/false);
    node->up = SavedVariable(up, /*is_output=*/false);
    node->approximate = approximate;
    torch::autograd::set_history(out, node);
    node->watch(out);
  }
  return out;
}

at::Tensor geglu_packed_autograd(
    c10::DispatchKeySet keys, const at::Tensor& gate_up, std::string_view approximate) {
  const auto node = make_node<GegluPackedBackward>("geglu_packed", gate_up);
  auto out = redispatch_below_autograd(geglu_packed_operator(), keys, gate_up, approximate);
  if (node) {
    node->gate_up = SavedVariable(gate_up, /*is_output=*/false);
    node->approximate = approximate;
    torch::autograd::set_history(out, node);
    node->watch(out);
  }
  return out;
}

}  // namespace liger
