#include "ops/swiglu.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/checks.h"
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

namespace {

void check_gate_and_up(const char* op, const at::Tensor& gate, const at::Tensor& up) {
  const Argument gate_arg{op, "gate", gate};
  const Argument up_arg{op, "up", up};
  check_floating(gate_arg);
  check_dim_at_least(gate_arg, 1);
  check_same_device(up_arg, gate_arg);
  check_same_dtype(up_arg, gate_arg);
  check_same_shape(up_arg, gate_arg);
}

}  // namespace

void check_swiglu(const at::Tensor& gate, const at::Tensor& up) { check_gate_and_up("swiglu", gate, up); }

void check_swiglu_backward(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up) {
  constexpr auto op = "swiglu_backward";
  check_gate_and_up(op, gate, up);
  const Argument dout_arg{op, "dout", dout};
  const Argument gate_arg{op, "gate", gate};
  check_same_device(dout_arg, gate_arg);
  check_same_dtype(dout_arg, gate_arg);
  check_same_shape(dout_arg, gate_arg);
}

at::Tensor swiglu_meta(const at::Tensor& gate, const at::Tensor& up) {
  check_swiglu(gate, up);
  return at::empty_symint(gate.sym_sizes(), gate.options());
}

TensorPair swiglu_backward_meta(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up) {
  check_swiglu_backward(dout, gate, up);
  return {
      at::empty_symint(gate.sym_sizes(), gate.options()), at::empty_symint(gate.sym_sizes(), gate.options())};
}

namespace {

class SwigluFunction : public torch::autograd::Function<SwigluFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& gate, const at::Tensor& up) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({gate, up});
    ctx->set_materialize_grads(false);
    return {swiglu(gate, up)};
  }

  // With s = sigmoid(gate):  d gate = dout * up * s * (1 + gate * (1 - s)),  d up = dout * silu(gate).
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

}  // namespace

at::Tensor swiglu_autograd(const at::Tensor& gate, const at::Tensor& up) {
  return SwigluFunction::apply(gate, up)[0];
}

}  // namespace liger
