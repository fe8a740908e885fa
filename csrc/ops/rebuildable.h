#pragma once

// What lean activations (lean.cpp) ask of an operator whose result backward can compute again instead of
// keeping it.

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>

namespace liger {

class Rebuilt;

// The autograd node of an operator that computes its first result from what the node saves.
struct RebuildableNode : torch::autograd::Node {
  // The result once more, bit by bit: new, contiguous, without history. Runs below autograd.
  virtual at::Tensor rebuild() = 0;
  // What the node has saved of others' results.
  virtual c10::SmallVector<torch::autograd::SavedVariable*, 3> inputs() = 0;
  virtual void release() = 0;

  // Not while somebody whose own backward is still to come may ask for the result.
  void release_variables() final {
    if (rebuilt.expired()) release();
  }

  // To be called with the result, when it has its history.
  void watch(const at::Tensor& result) { version_ = result.unsafeGetTensorImpl()->version_counter(); }
  // Of the result, which may be gone.
  bool written_to() const { return version_.enabled() && version_.current_version() != 0; }

  // Shared by those for whom the result is computed again; keeps this node alive, not the other way round.
  std::weak_ptr<Rebuilt> rebuilt;

 private:
  c10::VariableVersion version_{c10::VariableVersion::DISABLED};
};

// A new node with edges to where the gradients of the inputs go, or null when none of them needs one.
template <class N, class... Inputs>
std::shared_ptr<N> make_node(const Inputs&... inputs) {
  if (!torch::autograd::compute_requires_grad(inputs...)) return nullptr;
  std::shared_ptr<N> node(new N(), torch::autograd::deleteNode);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

inline std::optional<at::Tensor> unpack_optional(const torch::autograd::SavedVariable& variable) {
  auto tensor = variable.unpack();
  return tensor.defined() ? std::optional<at::Tensor>(std::move(tensor)) : std::nullopt;
}

// For rebuild(), which runs before the backward of the module that holds the parameter.
inline std::optional<at::Tensor> unpack_parameter(const torch::autograd::SavedVariable& variable) {
  auto parameter = unpack_optional(variable);
  TORCH_CHECK(!parameter || parameter->numel() == 0 || parameter->storage().data() != nullptr,
      "a parameter was freed before backward could use it to compute a result again, which lean activations "
      "do earlier than the module's own backward: shard whole layers, or leave lean_activations off");
  return parameter;
}

}  // namespace liger
