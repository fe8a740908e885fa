#include "ops/geglu.h"

#include <c10/util/Exception.h>

#include <string>

#include "ops/dispatch.h"
#include "ops/rebuildable.h"

namespace liger {

using torch::autograd::SavedVariable;
using torch::autograd::set_history;
using torch::autograd::variable_list;

at::Tensor geglu(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  static const auto op = find_operator("liger::geglu", geglu);
  return op.call(gate, up, approximate);
}

TensorPair geglu_backward(
    const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  static const auto op = find_operator("liger::geglu_backward", geglu_backward);
  return op.call(dout, gate, up, approximate);
}

at::Tensor geglu_packed(const at::Tensor& gate_up, std::string_view approximate) {
  static const auto op = find_operator("liger::geglu_packed", geglu_packed);
  return op.call(gate_up, approximate);
}

at::Tensor geglu_packed_backward(
    const at::Tensor& dout, const at::Tensor& gate_up, std::string_view approximate) {
  static const auto op = find_operator("liger::geglu_packed_backward", geglu_packed_backward);
  return op.call(dout, gate_up, approximate);
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

namespace {

// d gate = dout * up * gelu'(gate),  d up = dout * gelu(gate).
struct GegluNode final : RebuildableNode {
  SavedVariable gate, up;
  std::string approximate;

  std::string name() const override { return "GegluBackward"; }

  variable_list apply(variable_list&& grads) override {
    variable_list result(2);
    if (!grads[0].defined()) return result;
    auto [dgate, dup] = geglu_backward(grads[0], gate.unpack(), up.unpack(), approximate);
    if (task_should_compute_output(0)) result[0] = dgate;
    if (task_should_compute_output(1)) result[1] = dup;
    return result;
  }

  at::Tensor rebuild() override { return geglu(gate.unpack(), up.unpack(), approximate); }
  c10::SmallVector<SavedVariable*, 3> inputs() override { return {&gate, &up}; }
  void release() override {
    gate.reset_data();
    up.reset_data();
  }
};

struct GegluPackedNode final : RebuildableNode {
  SavedVariable gate_up;
  std::string approximate;

  std::string name() const override { return "GegluPackedBackward"; }

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return {at::Tensor()};
    return {geglu_packed_backward(grads[0], gate_up.unpack(), approximate)};
  }

  at::Tensor rebuild() override { return geglu_packed(gate_up.unpack(), approximate); }
  c10::SmallVector<SavedVariable*, 3> inputs() override { return {&gate_up}; }
  void release() override { gate_up.reset_data(); }
};

}  // namespace

at::Tensor geglu_autograd(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  auto node = make_node<GegluNode>(gate, up);
  auto out = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return geglu(gate, up, approximate);
  }();
  if (node) {
    node->gate = SavedVariable(gate, false);
    node->up = SavedVariable(up, false);
    node->approximate = approximate;
    set_history(out, node);
    node->watch(out);
  }
  return out;
}

at::Tensor geglu_packed_autograd(const at::Tensor& gate_up, std::string_view approximate) {
  auto node = make_node<GegluPackedNode>(gate_up);
  auto out = [&] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return geglu_packed(gate_up, approximate);
  }();
  if (node) {
    node->gate_up = SavedVariable(gate_up, false);
    node->approximate = approximate;
    set_history(out, node);
    node->watch(out);
  }
  return out;
}

}  // namespace liger
