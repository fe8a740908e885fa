#include "ops/glu.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/checks.h"
#include "ops/dispatch.h"

namespace liger {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  static const auto op = find_operator("liger::swiglu", swiglu);
  return op.call(gate, up);
}

TensorPair swiglu_backward(const Tensor& dout, const Tensor& gate, const Tensor& up) {
  static const auto op = find_operator("liger::swiglu_backward", swiglu_backward);
  return op.call(dout, gate, up);
}

Tensor geglu(const Tensor& gate, const Tensor& up, std::string_view approximate) {
  static const auto op = find_operator("liger::geglu", geglu);
  return op.call(gate, up, approximate);
}

TensorPair geglu_backward(
    const Tensor& dout, const Tensor& gate, const Tensor& up, std::string_view approximate) {
  static const auto op = find_operator("liger::geglu_backward", geglu_backward);
  return op.call(dout, gate, up, approximate);
}

Tensor swiglu_packed(const Tensor& gate_up) {
  static const auto op = find_operator("liger::swiglu_packed", swiglu_packed);
  return op.call(gate_up);
}

Tensor swiglu_packed_backward(const Tensor& dout, const Tensor& gate_up) {
  static const auto op = find_operator("liger::swiglu_packed_backward", swiglu_packed_backward);
  return op.call(dout, gate_up);
}

Tensor geglu_packed(const Tensor& gate_up, std::string_view approximate) {
  static const auto op = find_operator("liger::geglu_packed", geglu_packed);
  return op.call(gate_up, approximate);
}

Tensor geglu_packed_backward(const Tensor& dout, const Tensor& gate_up, std::string_view approximate) {
  static const auto op = find_operator("liger::geglu_packed_backward", geglu_packed_backward);
  return op.call(dout, gate_up, approximate);
}

Activation gelu_named(const char* op, std::string_view approximate) {
  TORCH_CHECK_VALUE(approximate == "tanh" || approximate == "none", "liger::", op,
      ": approximate must be \"tanh\" or \"none\", got \"", std::string(approximate), "\"");
  return approximate == "tanh" ? Activation::kGeluTanh : Activation::kGelu;
}

Glu check_glu(const char* op, const Tensor& gate, const Tensor& up, Activation activation) {
  const Argument gate_arg{op, "gate", gate};
  const Argument up_arg{op, "up", up};
  check_floating(gate_arg);
  check_dim_at_least(gate_arg, 1);
  check_same_device(up_arg, gate_arg);
  check_same_dtype(up_arg, gate_arg);
  check_same_shape(up_arg, gate_arg);
  return {activation, gate, up, Tensor()};
}

Glu check_glu_backward(
    const char* op, const Tensor& dout, const Tensor& gate, const Tensor& up, Activation activation) {
  auto glu = check_glu(op, gate, up, activation);
  const Argument dout_arg{op, "dout", dout};
  const Argument gate_arg{op, "gate", gate};
  check_same_device(dout_arg, gate_arg);
  check_same_dtype(dout_arg, gate_arg);
  check_same_shape(dout_arg, gate_arg);
  glu.dout = dout;
  return glu;
}

Glu check_glu_packed(const char* op, const Tensor& gate_up, Activation activation) {
  const Argument arg{op, "gate_up", gate_up};
  check_floating(arg);
  check_dim_at_least(arg, 1);
  const auto width = gate_up.sym_size(-1);
  TORCH_CHECK_VALUE((width % 2).sym_eq(0).expect_true(__FILE__, __LINE__), "liger::", op,
      ": the last dimension of gate_up must be even (gate, then up), got ", width);
  const auto half = width / 2;
  return {activation, gate_up.narrow_symint(-1, 0, half), gate_up.narrow_symint(-1, half, half), Tensor()};
}

Glu check_glu_packed_backward(
    const char* op, const Tensor& dout, const Tensor& gate_up, Activation activation) {
  auto glu = check_glu_packed(op, gate_up, activation);
  const Argument dout_arg{op, "dout", dout};
  const Argument gate_up_arg{op, "gate_up", gate_up};
  check_same_device(dout_arg, gate_up_arg);
  check_same_dtype(dout_arg, gate_up_arg);
  TORCH_CHECK_VALUE(dout.sym_sizes() == glu.gate.sym_sizes(), "liger::", op, ": dout must have shape ",
      glu.gate.sym_sizes(), " (half of gate_up), got ", dout.sym_sizes());
  glu.dout = dout;
  return glu;
}

namespace {

Tensor empty_as(const Tensor& x) { return at::empty_symint(x.sym_sizes(), x.options()); }

}  // namespace

Tensor swiglu_meta(const Tensor& gate, const Tensor& up) {
  return empty_as(check_glu("swiglu", gate, up, Activation::kSilu).gate);
}

TensorPair swiglu_backward_meta(const Tensor& dout, const Tensor& gate, const Tensor& up) {
  check_glu_backward("swiglu_backward", dout, gate, up, Activation::kSilu);
  return {empty_as(gate), empty_as(gate)};
}

Tensor geglu_meta(const Tensor& gate, const Tensor& up, std::string_view approximate) {
  return empty_as(check_glu("geglu", gate, up, gelu_named("geglu", approximate)).gate);
}

TensorPair geglu_backward_meta(
    const Tensor& dout, const Tensor& gate, const Tensor& up, std::string_view approximate) {
  check_glu_backward("geglu_backward", dout, gate, up, gelu_named("geglu_backward", approximate));
  return {empty_as(gate), empty_as(gate)};
}

Tensor swiglu_packed_meta(const Tensor& gate_up) {
  return empty_as(check_glu_packed("swiglu_packed", gate_up, Activation::kSilu).gate);
}

Tensor swiglu_packed_backward_meta(const Tensor& dout, const Tensor& gate_up) {
  check_glu_packed_backward("swiglu_packed_backward", dout, gate_up, Activation::kSilu);
  return empty_as(gate_up);
}

Tensor geglu_packed_meta(const Tensor& gate_up, std::string_view approximate) {
  return empty_as(check_glu_packed("geglu_packed", gate_up, gelu_named("geglu_packed", approximate)).gate);
}

Tensor geglu_packed_backward_meta(const Tensor& dout, const Tensor& gate_up, std::string_view approximate) {
  check_glu_packed_backward(
      "geglu_packed_backward", dout, gate_up, gelu_named("geglu_packed_backward", approximate));
  return empty_as(gate_up);
}

namespace {

// The option of an autograd function: geglu's approximate, or that there is none.
constexpr std::string_view kSilu = "silu";

class GluFunction : public torch::autograd::Function<GluFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(
      AutogradContext* ctx, const Tensor& gate, const Tensor& up, const std::string& approximate) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({gate, up});
    ctx->saved_data["approximate"] = approximate;
    ctx->set_materialize_grads(false);
    return {approximate == kSilu ? swiglu(gate, up) : geglu(gate, up, approximate)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(3);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const auto& approximate = ctx->saved_data["approximate"].toStringRef();
    auto [dgate, dup] = approximate == kSilu ? swiglu_backward(grads[0], saved[0], saved[1])
                                             : geglu_backward(grads[0], saved[0], saved[1], approximate);
    if (ctx->needs_input_grad(0)) result[0] = dgate;
    if (ctx->needs_input_grad(1)) result[1] = dup;
    return result;
  }
};

class PackedGluFunction : public torch::autograd::Function<PackedGluFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& gate_up, const std::string& approximate) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({gate_up});
    ctx->saved_data["approximate"] = approximate;
    ctx->set_materialize_grads(false);
    return {approximate == kSilu ? swiglu_packed(gate_up) : geglu_packed(gate_up, approximate)};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(2);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const auto& approximate = ctx->saved_data["approximate"].toStringRef();
    result[0] = approximate == kSilu ? swiglu_packed_backward(grads[0], saved[0])
                                     : geglu_packed_backward(grads[0], saved[0], approximate);
    return result;
  }
};

}  // namespace

Tensor swiglu_autograd(const Tensor& gate, const Tensor& up) {
  return GluFunction::apply(gate, up, std::string(kSilu))[0];
}

Tensor geglu_autograd(const Tensor& gate, const Tensor& up, std::string_view approximate) {
  gelu_named("geglu", approximate);
  return GluFunction::apply(gate, up, std::string(approximate))[0];
}

Tensor swiglu_packed_autograd(const Tensor& gate_up) {
  return PackedGluFunction::apply(gate_up, std::string(kSilu))[0];
}

Tensor geglu_packed_autograd(const Tensor& gate_up, std::string_view approximate) {
  gelu_named("geglu_packed", approximate);
  return PackedGluFunction::apply(gate_up, std::string(approximate))[0];
}

}  // namespace liger
