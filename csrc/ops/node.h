#pragma once

// The operators' autograd nodes, in the form that PyTorch's own operators have: members instead of the lists
// and dictionaries of torch::autograd::Function, which take longer than the operator itself.
//
// A node derives from BackwardNode, lists its members, and computes gradients from their plain values (a
// SavedVariable's is a tensor, undefined where there was none):
//
//   struct ScaleBackward : BackwardNode<ScaleBackward> {
//     static constexpr size_t kInputs = 1;
//     SavedVariable x;
//     double factor = 0;
//     template <typename Self>
//     static auto members(Self& self) { return std::tie(self.x, self.factor); }
//     static variable_list backward(
//         const variable_list& grads, Wanted wanted, const at::Tensor& x, double factor);
//   };
//
// backward is called with at least one defined gradient, and returns one for each of the kInputs tensors that
// make_node got. A node with kOverwritesSaved lets go of what it has saved before its last backward, which
// may then own it alone (ops/reuse.h).

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace liger {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Which gradients backward has to compute, by position among the tensors that make_node got.
class Wanted {
 public:
  explicit Wanted(int64_t bits) : bits_(bits) {}
  bool operator[](size_t i) const { return (bits_ >> i & 1) != 0; }
  int64_t bits() const { return bits_; }

 private:
  int64_t bits_;
};

// What operators take for a tensor that may be missing.
inline std::optional<at::Tensor> optional_tensor(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

namespace detail {

template <typename Member>
using Plain =
    std::conditional_t<std::is_same_v<std::decay_t<Member>, SavedVariable>, at::Tensor, std::decay_t<Member>>;

inline at::Tensor plain(const SavedVariable& saved, const std::shared_ptr<torch::autograd::Node>& node) {
  return saved.unpack(node);
}
template <typename T>
const T& plain(const T& value, const std::shared_ptr<torch::autograd::Node>& /*node*/) {
  return value;
}

// The plain values of a node's members: as one tuple out of a packed list, and their types in such a list.
template <typename Tuple>
struct PlainValues;
template <typename... Member>
struct PlainValues<std::tuple<Member...>> {
  static std::tuple<Plain<Member>...> unpack(torch::dynamo::autograd::PackedArgs& args) {
    // Braces: in the order in which they were packed.
    return std::tuple<Plain<Member>...>{args.template unpack<Plain<Member>>()...};
  }
  static std::vector<at::TypePtr> types() {
    using torch::dynamo::autograd::IValuePacker;
    return {IValuePacker<int64_t>::packed_type(), IValuePacker<Plain<Member>>::packed_type()...};
  }
};

inline void release(SavedVariable& saved) { saved.reset_data(); }
template <typename T>
void release(T& /*value*/) {}

inline void collect(torch::dynamo::autograd::CompiledNodeArgs& args, const SavedVariable& saved) {
  args.collect(saved, /*is_output=*/true);  // unpacked with its node, as plain() does
}
template <typename T>
void collect(torch::dynamo::autograd::CompiledNodeArgs& args, const T& value) {
  args.collect(value);
}

inline bool any_defined(const variable_list& tensors) {
  for (const auto& tensor : tensors) {
    if (tensor.defined()) return true;
  }
  return false;
}

inline bool has_tangent(const at::Tensor& tensor) {
  return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
}
inline bool has_tangent(const std::optional<at::Tensor>& tensor) { return tensor && has_tangent(*tensor); }

}  // namespace detail

template <typename Derived, typename Base = torch::autograd::Node>
struct BackwardNode : Base {
  static constexpr bool kOverwritesSaved = false;

  void release_variables() override {
    std::lock_guard<std::mutex> lock(this->mutex_);
    release_saved();
  }

  // Compiled autograd: what the graph depends on, and a call of functional() in the graph.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    std::apply([&](const auto&... member) { (detail::collect(args, member), ...); },
        Derived::members(static_cast<const Derived&>(*this)));
  }

  variable_list apply_with_saved(
      const variable_list& grads, torch::dynamo::autograd::SwapSavedVariables& saved) override {
    namespace compiled = torch::dynamo::autograd;
    const auto members = Derived::members(self());
    using Values = detail::PlainValues<std::decay_t<decltype(members)>>;
    std::apply([&](auto&... member) { (saved.before(member), ...); }, members);
    compiled::PackedArgs args;
    args.pack(static_cast<int64_t>(wanted().bits()));
    std::apply(
        [&](auto&... member) {
          (args.pack<detail::Plain<decltype(member)>>(detail::plain(member, this->getptr())), ...);
        },
        members);
    const auto& compiler = compiled::getPyCompilerInterface();
    // The name that the function has in graphs; once for the process.
    static const std::string function = compiler->bind_function(saved.get_py_compiler(),
        typeid(Derived).name(), functional, Values::types(), /*is_custom_function=*/true,
        /*is_traceable=*/true);
    using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
    auto results = compiler->call_function(saved.get_py_compiler(), "apply_functional", function, grads,
        args.vec(), compiled::IValuePacker<Metadata>::pack(compiled::get_input_metadata(this->next_edges())));
    std::apply([&](auto&... member) { (saved.after(member), ...); }, members);
    return results;
  }

 protected:
  // With the node's lock held.
  virtual void release_saved() {
    std::apply([](auto&... member) { (detail::release(member), ...); }, Derived::members(self()));
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(this->mutex_);
    if (!detail::any_defined(grads)) return variable_list(Derived::kInputs);
    // Before the guard: the hooks of saved tensors may run anything, such as the forward pass of a
    // checkpoint.
    const auto values = std::apply(
        [&](const auto&... member) {
          return std::tuple<detail::Plain<decltype(member)>...>{detail::plain(member, this->getptr())...};
        },
        Derived::members(self()));
    if (Derived::kOverwritesSaved && !torch::autograd::get_current_graph_task_keep_graph()) release_saved();
    // Nobody will differentiate the gradients, so the Autograd kernels of the operators below, which are
    // there to say that this is not implemented, can be left out.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
    if (!at::GradMode::is_enabled() && !any_tangent(grads)) below_autograd.emplace();
    return std::apply(
        [&](const auto&... value) { return Derived::backward(grads, wanted(), value...); }, values);
  }

 private:
  Derived& self() { return static_cast<Derived&>(*this); }

  static bool any_tangent(const variable_list& grads) {
    for (const auto& grad : grads) {
      if (detail::has_tangent(grad)) return true;
    }
    return false;
  }

  Wanted wanted() const {
    int64_t bits = 0;
    for (size_t i = 0; i < Derived::kInputs; ++i) bits |= int64_t{this->task_should_compute_output(i)} << i;
    return Wanted(bits);
  }

  // backward as a function of values, for graphs.
  static variable_list functional(const variable_list& grads, const std::vector<c10::IValue>& values) {
    using Values = detail::PlainValues<decltype(Derived::members(std::declval<Derived&>()))>;
    torch::dynamo::autograd::PackedArgs args(values);
    const Wanted wanted(args.unpack<int64_t>());
    if (!detail::any_defined(grads)) return variable_list(Derived::kInputs);
    return std::apply([&](const auto&... value) { return Derived::backward(grads, wanted, value...); },
        Values::unpack(args));
  }
};

// Refuses tensors with tangents (forward-mode differentiation), whose derivative would be lost.
template <typename... Inputs>
void check_no_tangent(const char* op, const Inputs&... inputs) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(detail::has_tangent(inputs) || ...), "liger::", op,
      ": forward-mode differentiation is not implemented; use reverse mode (torch.autograd.grad)");
}

// Refuses an argument that wants a gradient which the operator does not compute. With gradients enabled.
inline void check_no_gradient(const char* op, const char* name, const std::optional<at::Tensor>& argument) {
  TORCH_CHECK_NOT_IMPLEMENTED(!argument || !argument->requires_grad(), "liger::", op,
      ": the gradient with respect to ", name, " is not implemented; detach() it");
}

// A node that leads to the inputs, or null when none of them wants a gradient.
template <typename Node, typename... Inputs>
std::shared_ptr<Node> make_node(const char* op, const Inputs&... inputs) {
  check_no_tangent(op, inputs...);
  if (!torch::autograd::compute_requires_grad(inputs...)) return nullptr;
  static_assert(sizeof...(Inputs) == Node::kInputs);
  std::shared_ptr<Node> node(new Node(), torch::autograd::deleteNode);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

}  // namespace liger
