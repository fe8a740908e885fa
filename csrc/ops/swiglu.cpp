#include "ops/swiglu.h"

#include "ops/dispatch.h"
#include "ops/rebuildable.h"

namespace liger {

using torch::autograd::set_history;

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
struct SwigluBackward final : RebuildableNode<SwigluBackward> {
  static constexpr size_t kInputs = 2;

  SavedVariable gate, up;

  template <typename Self>
  static auto members(Self& self) {
    return std::tie(self.gate, self.up);
  }

  static variable_list backward(
      const variable_list& grads, Wanted wanted, const at::Tensor& gate, const at::Tensor& up) {
    auto [dgate, dup] = swiglu_backward(grads[0], gate, up);
    return {wanted[0] ? dgate : at::Tensor(), wanted[1] ? dup : at::Tensor()};
  }

  at::Tensor rebuild() override { return swiglu(gate.unpack(), up.unpack()); }
};

struct SwigluPackedBackward final : RebuildableNode<SwigluPackedBackward> {
  static constexpr size_t kInputs = 1;

  SavedVariable gate_up;

  template <typename Self>
  static auto members(Self& self) {
    return std::tie(self.gate_up);
  }

  static variable_list backward(const variable_list& grads, Wanted /*wanted*/, const at::Tensor& gate_up) {
    return {swiglu_packed_backward(grads[0], gate_up)};
  }

  at::Tensor rebuild() override { return swiglu_packed(gate_up.unpack()); }
};

}  // namespace

at::Tensor swiglu_autograd(const at::Tensor& gate, const at::Tensor& up) {
  auto node = make_node<SwigluBackward>("swiglu", gate, up);
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
  auto node = make_node<SwigluPackedBackward>("swiglu_packed", gate_up);
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
