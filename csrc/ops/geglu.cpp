#include "ops/geglu.h"

#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <string>

#include "ops/dispatch.h"

namespace liger {

using torch::autograd::AutogradContext;
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
class GegluFunction : public torch::autograd::Function<GegluFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(
      AutogradContext* ctx, const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({gate, up});
    ctx->saved_data["approximate"] = std::string(approximate);
    ctx->set_materialize_grads(false);
    return {geglu(gate, up, approximate)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(3);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    auto [dgate, dup] =
        geglu_backward(grads[0], saved[0], saved[1], ctx->saved_data["approximate"].toStringRef());
    if (ctx->needs_input_grad(0)) result[0] = dgate;
    if (ctx->needs_input_grad(1)) result[1] = dup;
    return result;
  }
};

class GegluPackedFunction : public torch::autograd::Function<GegluPackedFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(
      AutogradContext* ctx, const at::Tensor& gate_up, std::string_view approximate) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({gate_up});
    ctx->saved_data["approximate"] = std::string(approximate);
    ctx->set_materialize_grads(false);
    return {geglu_packed(gate_up, approximate)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(2);
    if (!grads[0].defined()) return result;
    result[0] = geglu_packed_backward(
        grads[0], ctx->get_saved_variables()[0], ctx->saved_data["approximate"].toStringRef());
    return result;
  }
};

}  // namespace

at::Tensor geglu_autograd(const at::Tensor& gate, const at::Tensor& up, std::string_view approximate) {
  return GegluFunction::apply(gate, up, approximate)[0];
}

at::Tensor geglu_packed_autograd(const at::Tensor& gate_up, std::string_view approximate) {
  return GegluPackedFunction::apply(gate_up, approximate)[0];
}

}  // namespace liger
