#include "ops/rope.h"

#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/checks.h"
#include "ops/dispatch.h"

namespace liger {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

TensorPair rope(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin) {
  static const auto op = find_operator("liger::rope", rope);
  return op.call(q, k, cos, sin);
}

TensorPair rope_backward(
    const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos, const at::Tensor& sin) {
  static const auto op = find_operator("liger::rope_backward", rope_backward);
  return op.call(dq, dk, cos, sin);
}

namespace {

bool equal(const c10::SymInt& a, const c10::SymInt& b) { return a.sym_eq(b).expect_true(__FILE__, __LINE__); }

void check_angles(const Argument& angle, const Argument& q) {
  check_same_device(angle, q);
  check_same_dtype_or_float32(angle, q);
  const auto& t = angle.tensor;
  const auto& x = q.tensor;
  const bool batched = t.dim() == 3;
  TORCH_CHECK_VALUE((batched || t.dim() == 2) && equal(t.sym_size(-2), x.sym_size(2)) &&
          (!batched || equal(t.sym_size(0), 1) || equal(t.sym_size(0), x.sym_size(0))),
      "liger::", q.op, ": ", angle.name, " must have shape [1 or ", x.sym_size(0), ", ", x.sym_size(2),
      ", rotary_dim] or [", x.sym_size(2), ", rotary_dim] (batch and positions of ", q.name, "), got ",
      t.sym_sizes());
}

}  // namespace

void check_rope(
    const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin) {
  const bool backward = std::string_view(op) == "rope_backward";
  const Argument q_arg{op, backward ? "dq" : "q", q};
  const Argument k_arg{op, backward ? "dk" : "k", k};
  const Argument cos_arg{op, "cos", cos};
  const Argument sin_arg{op, "sin", sin};
  check_floating(q_arg);
  check_dim(q_arg, 4);
  check_dim(k_arg, 4);
  check_same_device(k_arg, q_arg);
  check_same_dtype(k_arg, q_arg);
  TORCH_CHECK_VALUE(equal(k.sym_size(0), q.sym_size(0)) && equal(k.sym_size(2), q.sym_size(2)) &&
          equal(k.sym_size(3), q.sym_size(3)),
      "liger::", op, ": ", k_arg.name, " must have shape [", q.sym_size(0), ", heads, ", q.sym_size(2), ", ",
      q.sym_size(3), "] (batch, positions and head_dim of ", q_arg.name, "), got ", k.sym_sizes());
  check_angles(cos_arg, q_arg);
  check_same_device(sin_arg, q_arg);
  check_same_dtype(sin_arg, cos_arg);
  check_same_shape(sin_arg, cos_arg);
  const auto rotary_dim = cos.sym_size(-1);
  TORCH_CHECK_VALUE(
      rotary_dim.sym_le(q.sym_size(3)).expect_true(__FILE__, __LINE__) && equal(rotary_dim % 2, 0),
      "liger::", op, ": the last dimension of cos must be even and at most head_dim ", q.sym_size(3),
      ", got ", rotary_dim);
}

TensorPair rope_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin) {
  check_rope("rope", q, k, cos, sin);
  return {at::empty_like(q), at::empty_like(k)};
}

TensorPair rope_backward_meta(
    const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos, const at::Tensor& sin) {
  check_rope("rope_backward", dq, dk, cos, sin);
  return {at::empty_like(dq), at::empty_like(dk)};
}

namespace {

class RopeFunction : public torch::autograd::Function<RopeFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
      const at::Tensor& cos, const at::Tensor& sin) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [q_out, k_out] = rope(q, k, cos, sin);
    ctx->save_for_backward({cos, sin});
    return {q_out, k_out};
  }

  // A rotation is undone by its transpose. Gradients that nobody sent arrive as zeros: q and k share a
  // kernel.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [dq, dk] = rope_backward(grads[0], grads[1], saved[0], saved[1]);
    variable_list result(4);
    if (ctx->needs_input_grad(0)) result[0] = dq;
    if (ctx->needs_input_grad(1)) result[1] = dk;
    return result;
  }
};

}  // namespace

TensorPair rope_autograd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin) {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled() || !(cos.requires_grad() || sin.requires_grad()),
      "liger::rope: gradients with respect to cos and sin are not implemented; detach() them");
  auto out = RopeFunction::apply(q, k, cos, sin);
  return {out[0], out[1]};
}

}  // namespace liger
