#include "ops/swiglu.h"


#include "ops/dispatch.h"
#include "ops/rebuildable.h"

namespace liger {

using torch::autograd::SavedVariable;
using torch::autograd::set_history;
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
struct SwigluNode final : RebuildableNode {
  SavedVariable gate, up;

  std::string name() const override { return "SwigluBackward"; }

  variable_list apply(variable_list&& grads) override {
    variable_list result(2);
    if (!grads[0].defined()) return result;
    auto [dgate, dup] = swiglu_backward(grads[0], gate.unpack(), up.unpack());
    if (task_should_compute_output(0)) result[0] = dgate;
    if (task_should_compute_output(1)) result[1] = dup;
    return result;
  }

  at::Tensor rebuild() override { return swiglu(gate.unpack(), up.unpack()); }
  c10::SmallVector<SavedVariable*, 3> inputs() override { return {&gate, &up}; }
  void release() override {
    gate.reset_data();
    up.reset_data();
  }
};

struct SwigluPackedNode final : RebuildableNode {
  SavedVariable gate_up;

  std::string name() const override { return "SwigluPackedBackward"; }

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return {at::Tensor()};
    return {swiglu_packed_backward(grads[0], gate_up.unpack())};
  }

  at::Tensor rebuild() override { return swiglu_packed(gate_up.unpack()); }
  c10::SmallVector<SavedVariable*, 3> inputs() override { return {&gate_up}; }
  void release() override { gate_up.reset_data(); }
};

}  // namespace

at::Tensor swiglu_autograd(const at::Tensor& gate, const at::Tensor& up) {
  auto node = make_node<SwigluNode>(gate, up);
  auto out = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return swiglu(gate, up);
  }();
  if (node) {
    node->gate = SavedVariable(gate, false);
    node->up = SavedVariable(up, false);
    set_history(out, node);
    node->watch(out);
  }
  return out;
}

at::Tensor swiglu_packed_autograd(const at::Tensor& gate_up) {
  auto node = make_node<SwigluPackedNode>(gate_up);
  auto out = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return swiglu_packed(gate_up);
  }();
  if (node) {
    node->gate_up = SavedVariable(gate_up, false);
    set_history(out, node);
    node->watch(out);
  }
  return out;
}

}  // namespace liger
