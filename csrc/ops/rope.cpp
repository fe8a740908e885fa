#include "ops/rope.h"

#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/checks.h"
#include "ops/dispatch.h"

namespace liger {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

TensorPair rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  static const auto op = find_operator("liger::rope", rope);
  return op.call(q, k, cos, sin, interleaved);
}

TensorPair rope_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& cos, const Tensor& sin, bool interleaved) {
  static const auto op = find_operator("liger::rope_backward", rope_backward);
  return op.call(dq, dk, cos, sin, interleaved);
}

TensorPair mrope(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, at::IntArrayRef mrope_section) {
  static const auto op = find_operator("liger::mrope", mrope);
  return op.call(q, k, cos, sin, mrope_section);
}

TensorPair mrope_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& cos, const Tensor& sin, at::IntArrayRef mrope_section) {
  static const auto op = find_operator("liger::mrope_backward", mrope_backward);
  return op.call(dq, dk, cos, sin, mrope_section);
}

std::pair<int64_t, int64_t> Rotation::section_ends() const {
  if (!mrope_section) return {cos.size(-1) / 2, cos.size(-1) / 2};
  const auto& section = *mrope_section;
  return {section[0], section[0] + section[1]};
}

namespace {

bool equal(const c10::SymInt& a, const c10::SymInt& b) { return a.sym_eq(b).expect_true(__FILE__, __LINE__); }

void check_angles(const Argument& angle, const Argument& q, bool planes) {
  check_same_device(angle, q);
  check_same_dtype_or_float32(angle, q);
  const auto& t = angle.tensor;
  const auto& x = q.tensor;
  if (planes) {
    TORCH_CHECK_VALUE(t.dim() == 4 && equal(t.sym_size(0), 3) && equal(t.sym_size(2), x.sym_size(2)) &&
            (equal(t.sym_size(1), 1) || equal(t.sym_size(1), x.sym_size(0))),
        "liger::", q.op, ": ", angle.name, " must have shape [3, 1 or ", x.sym_size(0), ", ", x.sym_size(2),
        ", rotary_dim] (batch and positions of ", q.name, "), got ", t.sym_sizes());
    return;
  }
  const bool batched = t.dim() == 3;
  TORCH_CHECK_VALUE((batched || t.dim() == 2) && equal(t.sym_size(-2), x.sym_size(2)) &&
          (!batched || equal(t.sym_size(0), 1) || equal(t.sym_size(0), x.sym_size(0))),
      "liger::", q.op, ": ", angle.name, " must have shape [1 or ", x.sym_size(0), ", ", x.sym_size(2),
      ", rotary_dim] or [", x.sym_size(2), ", rotary_dim] (batch and positions of ", q.name, "), got ",
      t.sym_sizes());
}

void check_section(const char* op, at::IntArrayRef section, const c10::SymInt& rotary_dim) {
  int64_t pairs = 0;
  bool fits = section.size() == 3;
  for (const int64_t size : section) {
    fits = fits && size >= 0;
    pairs += size;
  }
  TORCH_CHECK_VALUE(fits && equal(rotary_dim, 2 * pairs), "liger::", op,
      ": mrope_section must be three sizes whose sum is half the last dimension of cos, ", rotary_dim / 2,
      ", got ", section);
}

}  // namespace

void check_rotation(const Rotation& rotation) {
  const char* op = rotation.op;
  const Argument q{op, rotation.backward ? "dq" : "q", rotation.q};
  const Argument k{op, rotation.backward ? "dk" : "k", rotation.k};
  const Argument cos{op, "cos", rotation.cos};
  const Argument sin{op, "sin", rotation.sin};
  check_floating(q);
  check_dim(q, 4);
  check_dim(k, 4);
  check_same_device(k, q);
  check_same_dtype(k, q);
  const auto q_sizes = q.tensor.sym_sizes(), k_sizes = k.tensor.sym_sizes();
  TORCH_CHECK_VALUE(
      equal(k_sizes[0], q_sizes[0]) && equal(k_sizes[2], q_sizes[2]) && equal(k_sizes[3], q_sizes[3]),
      "liger::", op, ": ", k.name, " must have shape [", q_sizes[0], ", heads, ", q_sizes[2], ", ",
      q_sizes[3], "] (batch, positions and head_dim of ", q.name, "), got ", k_sizes);
  check_angles(cos, q, rotation.mrope_section.has_value());
  check_same_device(sin, q);
  check_same_dtype(sin, cos);
  check_same_shape(sin, cos);
  const auto rotary_dim = cos.tensor.sym_size(-1);
  TORCH_CHECK_VALUE(rotary_dim.sym_le(q_sizes[3]).expect_true(__FILE__, __LINE__) && equal(rotary_dim % 2, 0),
      "liger::", op, ": the last dimension of cos must be even and at most head_dim ", q_sizes[3], ", got ",
      rotary_dim);
  if (rotation.mrope_section) check_section(op, *rotation.mrope_section, rotary_dim);
}

namespace {

TensorPair empty_results(const Rotation& rotation) {
  check_rotation(rotation);
  return {at::empty_like(rotation.q), at::empty_like(rotation.k)};
}

}  // namespace

TensorPair rope_meta(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return empty_results({.op = "rope", .q = q, .k = k, .cos = cos, .sin = sin, .interleaved = interleaved});
}

TensorPair rope_backward_meta(
    const Tensor& dq, const Tensor& dk, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return empty_results({.op = "rope_backward",
      .q = dq,
      .k = dk,
      .cos = cos,
      .sin = sin,
      .interleaved = interleaved,
      .backward = true});
}

TensorPair mrope_meta(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, at::IntArrayRef mrope_section) {
  return empty_results(
      {.op = "mrope", .q = q, .k = k, .cos = cos, .sin = sin, .mrope_section = mrope_section});
}

TensorPair mrope_backward_meta(
    const Tensor& dq, const Tensor& dk, const Tensor& cos, const Tensor& sin, at::IntArrayRef mrope_section) {
  return empty_results({.op = "mrope_backward",
      .q = dq,
      .k = dk,
      .cos = cos,
      .sin = sin,
      .mrope_section = mrope_section,
      .backward = true});
}

namespace {

// The pair layout of rope (a bool) or the sections of mrope (a vector), which their operators take last.
template <typename Option>
TensorPair forward_of(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const Option& option) {
  if constexpr (std::is_same_v<Option, bool>) {
    return rope(q, k, cos, sin, option);
  } else {
    return mrope(q, k, cos, sin, option);
  }
}

template <typename Option>
TensorPair backward_of(
    const Tensor& dq, const Tensor& dk, const Tensor& cos, const Tensor& sin, const Option& option) {
  if constexpr (std::is_same_v<Option, bool>) {
    return rope_backward(dq, dk, cos, sin, option);
  } else {
    return mrope_backward(dq, dk, cos, sin, option);
  }
}

template <typename Option>
class RotationFunction : public torch::autograd::Function<RotationFunction<Option>> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& cos,
      const Tensor& sin, const Option& option) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [q_out, k_out] = forward_of(q, k, cos, sin, option);
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["option"] = option;
    return {q_out, k_out};
  }

  // A rotation is undone by its transpose. Gradients that nobody sent arrive as zeros: q and k share a
  // kernel.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto option = ctx->saved_data["option"].template to<Option>();
    auto [dq, dk] = backward_of(grads[0], grads[1], saved[0], saved[1], option);
    variable_list result(5);
    if (ctx->needs_input_grad(0)) result[0] = dq;
    if (ctx->needs_input_grad(1)) result[1] = dk;
    return result;
  }
};

template <typename Option>
TensorPair differentiable(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos,
    const Tensor& sin, const Option& option) {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled() || !(cos.requires_grad() || sin.requires_grad()),
      "liger::", op, ": gradients with respect to cos and sin are not implemented; detach() them");
  auto out = RotationFunction<Option>::apply(q, k, cos, sin, option);
  return {out[0], out[1]};
}

}  // namespace

TensorPair rope_autograd(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return differentiable("rope", q, k, cos, sin, interleaved);
}

TensorPair mrope_autograd(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, at::IntArrayRef mrope_section) {
  return differentiable("mrope", q, k, cos, sin, mrope_section.vec());
}

}  // namespace liger
