#pragma once

// What lean activations (lean.cpp) ask of an operator whose result backward can compute again instead of
// keeping it.

#include <c10/util/SmallVector.h>

#include <memory>

#include "ops/node.h"

namespace liger {

class Rebuilt;

// A node that can compute its operator's first result from what it has saved.
struct Rebuildable : torch::autograd::Node {
  // The result once more, bit by bit: new, contiguous, without history. Runs below autograd.
  virtual at::Tensor rebuild() = 0;
  virtual c10::SmallVector<SavedVariable*, 4> saved() = 0;

  // To be called with the result, when it has its history.
  void watch(const at::Tensor& result) { version_ = result.unsafeGetTensorImpl()->version_counter(); }
  // Whether somebody wrote to the result, which may be gone.
  bool written_to() const { return version_.enabled() && version_.current_version() != 0; }

  // Shared by those for whom the result is computed again. It keeps this node alive, not the other way round.
  std::weak_ptr<Rebuilt> rebuilt;

 private:
  c10::VariableVersion version_{c10::VariableVersion::DISABLED};
};

template <typename Derived>
struct RebuildableNode : BackwardNode<Derived, Rebuildable> {
  c10::SmallVector<SavedVariable*, 4> saved() override {
    c10::SmallVector<SavedVariable*, 4> found;
    const auto add = [&](auto& member) {
      if constexpr (std::is_same_v<std::decay_t<decltype(member)>, SavedVariable>) found.push_back(&member);
    };
    std::apply([&](auto&... member) { (add(member), ...); }, Derived::members(static_cast<Derived&>(*this)));
    return found;
  }

 protected:
  // Not while somebody whose own backward is still to come may ask for the result.
  void release_saved() override {
    if (this->rebuilt.expired()) BackwardNode<Derived, Rebuildable>::release_saved();
  }
};

// For rebuild(), which runs before the backward of the module that holds the parameter.
inline std::optional<at::Tensor> unpack_parameter(const SavedVariable& saved) {
  auto parameter = optional_tensor(saved.unpack());
  TORCH_CHECK(!parameter || parameter->numel() == 0 || parameter->storage().data() != nullptr,
      "a parameter was freed before backward could use it to compute a result again, which lean activations "
      "do earlier than the module's own backward: shard whole layers, or leave lean_activations off");
  return parameter;
}

}  // namespace liger
