// Lean activations: after the forward of a layer, what its nodes have saved of the results of our norms and
// gated activations is dropped, and computed again when backward asks for it.
//
// The graph itself says what may be dropped: a saved tensor knows the node that made it. Its place is taken
// by the shape and the node, which whoever saved it keeps alive anyway, by the edge that leads there. So
// everything here ends with the graph, and nothing has to be watched while the forward runs.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/flat_hash_map.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstring>
#include <mutex>
#include <typeindex>
#include <unordered_map>

#include "ops/dispatch.h"
#include "ops/rebuildable.h"

namespace liger {

using torch::autograd::Node;

namespace {

std::optional<c10::Stream> current_stream(const at::Tensor& tensor) {
  if (tensor.device().is_cpu()) return std::nullopt;
  return c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device());
}

}  // namespace

// A node's result and its copies in other dtypes, each computed once in a backward pass for all who saved it,
// and let go after the last of them, at the latest at the end of the pass.
class Rebuilt : public std::enable_shared_from_this<Rebuilt> {
 public:
  explicit Rebuilt(std::shared_ptr<Rebuildable> node)
      : node_(std::move(node)), dtype_(node_->input_metadata(0).options().dtype().toScalarType()) {}

  // Announces somebody who will ask for it in each backward pass.
  void expect(at::ScalarType dtype) {
    std::lock_guard lock(mutex_);
    if (auto* copy = find(dtype)) {
      ++copy->uses;
    } else {
      copies_.push_back({.dtype = dtype, .uses = 1});
    }
  }

  // No lock is held while anything is computed, which may wait for Python.
  at::Tensor get(at::ScalarType dtype) {
    const int pass = torch::autograd::get_current_graph_task_id();
    if (auto tensor = take(dtype, pass); tensor.defined()) return tensor;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    NoAutocast keep_dtypes;
    auto tensor = dtype == dtype_ ? node_->rebuild() : original(pass).to(dtype);
    keep(dtype, pass, tensor);
    return tensor;
  }

 private:
  struct Copy {
    at::ScalarType dtype;
    int uses = 0;                         // in a whole backward pass
    int left = 0;                         // of them, in this one
    int pass = -1;                        // which that is
    at::Tensor tensor;                    // from the first use to the last
    std::optional<c10::Stream> stream{};  // where it was made; others make their own

    void enter(int current) {
      if (left > 0 && pass == current) return;
      left = uses;
      pass = current;
      tensor.reset();
    }
    at::Tensor there() const {
      return tensor.defined() && stream == current_stream(tensor) ? tensor : at::Tensor();
    }
  };

  Copy* find(at::ScalarType dtype) {
    for (auto& copy : copies_) {
      if (copy.dtype == dtype) return &copy;
    }
    return nullptr;
  }

  at::Tensor take(at::ScalarType dtype, int pass) {
    std::lock_guard lock(mutex_);
    auto* copy = find(dtype);
    copy->enter(pass);
    auto tensor = copy->there();
    if (--copy->left <= 0) copy->tensor.reset();
    return tensor;
  }

  // What copies in other dtypes are made from.
  at::Tensor original(int pass) {
    {
      std::lock_guard lock(mutex_);
      if (auto* copy = find(dtype_)) {
        copy->enter(pass);
        if (auto tensor = copy->there(); tensor.defined()) return tensor;
      }
    }
    auto tensor = node_->rebuild();
    keep(dtype_, pass, tensor);
    return tensor;
  }

  void keep(at::ScalarType dtype, int pass, const at::Tensor& tensor) {
    if (pass < 0) return;
    {
      std::lock_guard lock(mutex_);
      auto* copy = find(dtype);
      if (copy == nullptr || copy->left <= 0 || copy->pass != pass || copy->tensor.defined()) return;
      copy->tensor = tensor;
      copy->stream = current_stream(tensor);
    }
    torch::autograd::Engine::get_default_engine().queue_callback([weak = weak_from_this(), dtype, pass] {
      if (auto self = weak.lock()) self->leave(dtype, pass);
    });
  }

  void leave(at::ScalarType dtype, int pass) {
    std::lock_guard lock(mutex_);
    auto* copy = find(dtype);
    if (copy->pass != pass) return;
    copy->left = 0;
    copy->tensor.reset();
  }

  const std::shared_ptr<Rebuildable> node_;
  const at::ScalarType dtype_;
  std::mutex mutex_;
  c10::SmallVector<Copy, 1> copies_;
};

namespace {

// What is kept in place of a saved tensor: a result, a view of one, or of its copy in another dtype.
struct Recipe {
  std::shared_ptr<Rebuilt> rebuilt;
  at::ScalarType dtype;
  c10::DimVector sizes, strides;
  int64_t offset;

  at::Tensor tensor() const {
    const auto whole = rebuilt->get(dtype);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return whole.as_strided(sizes, strides, offset);
  }
};

class Hooks final : public torch::autograd::SavedVariableHooks {
 public:
  explicit Hooks(Recipe recipe) : recipe_(std::move(recipe)) {}
  void call_pack_hook(const at::Tensor& /*tensor*/) override {}
  at::Tensor call_unpack_hook() override { return recipe_.tensor(); }
  // Compiled autograd asks, and unpacks before its graph when there is nothing to trace.
  std::optional<std::pair<c10::SafePyObject, c10::SafePyObject>> retrieve_unpack_hook_data() const override {
    return std::nullopt;
  }

 private:
  Recipe recipe_;
};

// For what Python's Functions have saved, which takes hooks in Python.
struct PythonRecipe : torch::CustomClassHolder {
  explicit PythonRecipe(Recipe recipe) : recipe(std::move(recipe)) {}
  at::Tensor tensor() const { return recipe.tensor(); }
  Recipe recipe;
};

// By type: what a node has saved that may be one of our results.
using Visit = void (*)(Node&, c10::function_ref<void(SavedVariable&)>);

template <typename N, auto... Members>
std::pair<const std::type_index, Visit> saved_by() {
  return {typeid(N), [](Node& node, c10::function_ref<void(SavedVariable&)> visit) {
            (visit(static_cast<N&>(node).*Members), ...);
          }};
}

Visit visit_of(const std::type_info& type) {
  using namespace torch::autograd::generated;  // NOLINT(google-build-using-namespace)
  static const std::unordered_map<std::type_index, Visit> visits = {
      saved_by<MmBackward0, &MmBackward0::self_, &MmBackward0::mat2_>(),
      saved_by<AddmmBackward0, &AddmmBackward0::mat1_, &AddmmBackward0::mat2_>(),
      saved_by<BmmBackward0, &BmmBackward0::self_, &BmmBackward0::mat2_>(),
      saved_by<BaddbmmBackward0, &BaddbmmBackward0::batch1_, &BaddbmmBackward0::batch2_>(),
      saved_by<GroupedMmBackward0, &GroupedMmBackward0::self_>(),
      saved_by<MvBackward0, &MvBackward0::self_, &MvBackward0::vec_>(),
      saved_by<LinearBackward0, &LinearBackward0::input_>(),
      saved_by<MkldnnLinearBackward0, &MkldnnLinearBackward0::self_>(),
      saved_by<ConvolutionBackward0, &ConvolutionBackward0::input_>(),
      saved_by<MulBackward0, &MulBackward0::self_, &MulBackward0::other_>(),
      saved_by<ScaledDotProductFlashAttentionBackward0, &ScaledDotProductFlashAttentionBackward0::query_,
          &ScaledDotProductFlashAttentionBackward0::key_, &ScaledDotProductFlashAttentionBackward0::value_>(),
      saved_by<ScaledDotProductFlashAttentionForCpuBackward0,
          &ScaledDotProductFlashAttentionForCpuBackward0::query_,
          &ScaledDotProductFlashAttentionForCpuBackward0::key_,
          &ScaledDotProductFlashAttentionForCpuBackward0::value_>(),
      saved_by<ScaledDotProductEfficientAttentionBackward0,
          &ScaledDotProductEfficientAttentionBackward0::query_,
          &ScaledDotProductEfficientAttentionBackward0::key_,
          &ScaledDotProductEfficientAttentionBackward0::value_>(),
      saved_by<ScaledDotProductCudnnAttentionBackward0, &ScaledDotProductCudnnAttentionBackward0::query_,
          &ScaledDotProductCudnnAttentionBackward0::key_, &ScaledDotProductCudnnAttentionBackward0::value_>(),
  };
  const auto found = visits.find(type);
  return found == visits.end() ? nullptr : found->second;
}

// What a node's type says about it, looked up once per type and thread.
struct NodeType {
  Visit visit;
  bool rebuildable, in_python;
};

NodeType type_of(const Node& node) {
  thread_local ska::flat_hash_map<const std::type_info*, NodeType> known;
  const auto& type = typeid(node);
  if (const auto found = known.find(&type); found != known.end()) return found->second;
  // The type of Functions in Python is in libtorch_python, which this library does without.
  const bool in_python = std::strcmp(type.name(), "N5torch8autograd6PyNodeE") == 0;
  const bool rebuildable = dynamic_cast<const Rebuildable*>(&node) != nullptr;
  return known.emplace(&type, NodeType{visit_of(type), rebuildable, in_python}).first->second;
}

Rebuildable* as_rebuildable(const torch::autograd::Edge& edge) {
  auto* node = edge.function.get();
  return edge.input_nr == 0 && type_of(*node).rebuildable ? static_cast<Rebuildable*>(node) : nullptr;
}

// The node whose result this node's first argument is, but for its shape.
Rebuildable* reshaped_result(const torch::autograd::Edge& from) {
  using namespace torch::autograd::generated;  // NOLINT(google-build-using-namespace)
  const auto* edge = &from;
  while (edge->function && edge->input_nr == 0 &&
      (typeid(*edge->function) == typeid(ViewBackward0) ||
          typeid(*edge->function) == typeid(ReshapeAliasBackward0))) {
    edge = &edge->function->next_edge(0);
  }
  return edge->function ? as_rebuildable(*edge) : nullptr;
}

bool is_copy(const Node& node) {
  return typeid(node) == typeid(torch::autograd::generated::ToCopyBackward0) && node.num_outputs() == 1;
}

// The node that a saved tensor can be computed by, if it can.
Rebuildable* find_producer(const at::Tensor& saved) {
  if (!saved.defined() || saved.layout() != at::kStrided) return nullptr;
  // Tensors within tensors.
  constexpr c10::DispatchKeySet wrappers({at::DispatchKey::Python, at::DispatchKey::Functionalize,
      at::DispatchKey::FuncTorchGradWrapper, at::DispatchKey::FuncTorchBatched});
  if (saved.key_set().has_any(wrappers) || saved.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) {
    return nullptr;
  }
  const auto& whole = saved.is_view() ? saved._base() : saved;
  // What was written to after it was made is not what would be computed.
  if (whole.is_leaf() || whole._version() != 0 || whole.scalar_type() != saved.scalar_type()) return nullptr;
  if (!whole.is_contiguous() || whole.storage_offset() != 0) return nullptr;
  const auto& made_by = whole.grad_fn();
  if (!made_by) return nullptr;
  if (type_of(*made_by).rebuildable) {
    return whole.output_nr() == 0 ? static_cast<Rebuildable*>(made_by.get()) : nullptr;
  }
  if (!is_copy(*made_by)) return nullptr;
  auto* node = reshaped_result(made_by->next_edge(0));
  if (node == nullptr || node->written_to()) return nullptr;
  return node->input_metadata(0).device() == whole.device() ? node : nullptr;
}

std::optional<Recipe> find_recipe(const at::Tensor& saved) {
  auto* node = find_producer(saved);
  if (node == nullptr) return std::nullopt;
  auto rebuilt = node->rebuilt.lock();
  if (!rebuilt) {
    rebuilt = std::make_shared<Rebuilt>(std::static_pointer_cast<Rebuildable>(node->getptr()));
    node->rebuilt = rebuilt;
  }
  rebuilt->expect(saved.scalar_type());
  return Recipe{std::move(rebuilt), saved.scalar_type(), c10::DimVector(saved.sizes()),
      c10::DimVector(saved.strides()), saved.storage_offset()};
}

// Whether a Function in Python was given a result, or its copy.
bool takes_result(const Node& node) {
  for (const auto& edge : node.next_edges()) {
    if (!edge.is_valid()) continue;
    if (reshaped_result(edge) != nullptr) return true;
    if (is_copy(*edge.function) && reshaped_result(edge.function->next_edge(0)) != nullptr) return true;
  }
  return false;
}

// Drops what the nodes that were made since then, of those that the outputs lead to, have saved of results.
// Nodes of Functions in Python that were given results are returned, as tensors made by them.
std::vector<at::Tensor> drop_results(at::TensorList outputs, int64_t since) {
  // Registering hooks detaches, which is quicker so.
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  std::vector<at::Tensor> in_python;
  c10::SmallVector<Node*, 64> stack;
  ska::flat_hash_set<Node*> seen;
  seen.reserve(128);
  // Results that a node takes to compute its own.
  std::vector<std::tuple<Rebuildable*, std::shared_ptr<Rebuilt>, at::ScalarType>> nested;

  const auto reach = [&](Node* node) {
    // Without edges: the accumulation of a parameter's gradient.
    if (node != nullptr && node->num_outputs() > 0 && node->sequence_nr() >= static_cast<uint64_t>(since) &&
        seen.insert(node).second) {
      stack.push_back(node);
    }
  };
  for (const auto& output : outputs) {
    if (output.defined() && output.requires_grad()) reach(output.grad_fn().get());
  }
  while (!stack.empty()) {
    auto& node = *stack.back();
    stack.pop_back();
    for (const auto& edge : node.next_edges()) reach(edge.function.get());

    Rebuildable* takes = nullptr;
    const auto drop = [&](SavedVariable& variable) {
      const auto saved = variable.get_raw_data();
      if (!saved) return;
      auto recipe = find_recipe(*saved);
      if (!recipe) return;
      if (takes != nullptr) nested.emplace_back(takes, recipe->rebuilt, recipe->dtype);
      variable.register_hooks(std::make_unique<Hooks>(std::move(*recipe)));
    };
    const auto type = type_of(node);
    if (type.visit != nullptr) {
      type.visit(node, drop);
    } else if (type.rebuildable) {
      takes = static_cast<Rebuildable*>(&node);
      for (auto* variable : takes->saved()) drop(*variable);
    } else if (type.in_python && takes_result(node)) {
      in_python.push_back(at::empty({0}));
      torch::autograd::impl::set_gradient_edge(in_python.back(), {node.getptr(), 0});
    }
  }
  for (const auto& [node, rebuilt, dtype] : nested) {
    if (!node->rebuilt.expired()) rebuilt->expect(dtype);
  }
  return in_python;
}

std::optional<c10::intrusive_ptr<PythonRecipe>> recipe_of(const at::Tensor& saved) {
  auto recipe = find_recipe(saved);
  if (!recipe) return std::nullopt;
  return c10::make_intrusive<PythonRecipe>(std::move(*recipe));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(liger_ops, m) {
  m.class_<PythonRecipe>("Recipe").def("tensor", &PythonRecipe::tensor);
  m.def("drop_results", drop_results);
  m.def("recipe_of", recipe_of);
}

}  // namespace liger
