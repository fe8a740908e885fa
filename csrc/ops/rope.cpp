#include "ops/rope.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "ops/checks.h"
#include "ops/dispatch.h"
#include "ops/node.h"

namespace liger {

using at::Tensor;

namespace {
const auto& rope_operator() {
  static const auto op = find_operator("liger::rope", rope);
  return op;
}
const auto& mrope_operator() {
  static const auto op = find_operator("liger::mrope", mrope);
  return op;
}
}  // namespace

TensorPair rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return rope_operator().call(q, k, cos, sin, interleaved);
}

TensorPair rope_backward(
    const Tensor& dq, const Tensor& dk, const Tensor& cos, const Tensor& sin, bool interleaved) {
  static const auto op = find_operator("liger::rope_backward", rope_backward);
  return op.call(dq, dk, cos, sin, interleaved);
}

TensorPair mrope(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, at::IntArrayRef mrope_section) {
  return mrope_operator().call(q, k, cos, sin, mrope_section);
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
TensorPair backward_of(
    const Tensor& dq, const Tensor& dk, const Tensor& cos, const Tensor& sin, const Option& option) {
  if constexpr (std::is_same_v<Option, bool>) {
    return rope_backward(dq, dk, cos, sin, option);
  } else {
    return mrope_backward(dq, dk, cos, sin, option);
  }
}

}  // namespace

// The nodes have names outside of this file, which `grad_fn` shows.

// What both have.
template <typename Derived, typename Option>
struct RotationBackward : BackwardNode<Derived> {
  static constexpr size_t kInputs = 2;  // q, k

  SavedVariable cos, sin;
  c10::SymInt q_heads, k_heads;
  Option option{};

  template <typename Self>
  static auto members(Self& self) {
    return std::tie(self.cos, self.sin, self.q_heads, self.k_heads, self.option);
  }

  // A rotation is undone by its transpose. A gradient that nobody sent is zeros: q and k share a kernel.
  static variable_list backward(const variable_list& grads, Wanted wanted, const Tensor& cos,
      const Tensor& sin, const c10::SymInt& q_heads, const c10::SymInt& k_heads, const Option& option) {
    const auto or_zeros = [](const Tensor& grad, const Tensor& other, const c10::SymInt& heads) {
      if (grad.defined()) return grad;
      c10::SymDimVector shape(other.sym_sizes());
      shape[1] = heads;
      return at::zeros_symint(shape, other.options());
    };
    auto [dq, dk] = backward_of(
        or_zeros(grads[0], grads[1], q_heads), or_zeros(grads[1], grads[0], k_heads), cos, sin, option);
    return {wanted[0] ? dq : Tensor(), wanted[1] ? dk : Tensor()};
  }
};

struct RopeBackward : RotationBackward<RopeBackward, bool> {};
struct MropeBackward : RotationBackward<MropeBackward, std::vector<int64_t>> {};

namespace {

template <typename Node, typename Handle, typename Option>
TensorPair differentiable(const char* op, const Handle& handle, c10::DispatchKeySet keys, const Tensor& q,
    const Tensor& k, const Tensor& cos, const Tensor& sin, const Option& option) {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled() || !(cos.requires_grad() || sin.requires_grad()),
      "liger::", op, ": gradients with respect to cos and sin are not implemented; detach() them");
  check_no_tangent(op, cos, sin);
  const auto node = make_node<Node>(op, q, k);
  auto result = redispatch_below_autograd(handle, keys, q, k, cos, sin, option);
  if (node) {
    node->cos = SavedVariable(cos, /*is_output=*/false);
    node->sin = SavedVariable(sin, /*is_output=*/false);
    node->q_heads = q.sym_size(1);
    node->k_heads = k.sym_size(1);
    if constexpr (std::is_same_v<Option, bool>) {
      node->option = option;
    } else {
      node->option = option.vec();
    }
    const auto& [q_out, k_out] = result;
    torch::autograd::set_history(q_out, node);
    torch::autograd::set_history(k_out, node);
  }
  return result;
}

}  // namespace

TensorPair rope_autograd(c10::DispatchKeySet keys, const Tensor& q, const Tensor& k, const Tensor& cos,
    const Tensor& sin, bool interleaved) {
  return differentiable<RopeBackward>("rope", rope_operator(), keys, q, k, cos, sin, interleaved);
}

TensorPair mrope_autograd(c10::DispatchKeySet keys, const Tensor& q, const Tensor& k, const Tensor& cos,
    const Tensor& sin, at::IntArrayRef mrope_section) {
  return differentiable<MropeBackward>("mrope", mrope_operator(), keys, q, k, cos, sin, mrope_section);
}

}  // namespace liger
