#pragma once

// The autograd nodes of swiglu and swiglu_packed.

#include "ops/rebuildable.h"

namespace liger {

struct SwigluBackward : RebuildableNode<SwigluBackward> {
  static constexpr size_t kInputs = 2;  // gate, up
  static constexpr bool kOverwritesSaved = true;

  SavedVariable gate, up;

  template <typename Self>
  static auto members(Self& self) {
    return std::tie(self.gate, self.up);
  }

  // With s = sigmoid(gate):  d gate = dout * up * s * (1 + gate * (1 - s)),  d up = dout * silu(gate).
  static variable_list backward(
      const variable_list& grads, Wanted wanted, const at::Tensor& gate, const at::Tensor& up);
  at::Tensor rebuild() override;
};

struct SwigluPackedBackward : RebuildableNode<SwigluPackedBackward> {
  static constexpr size_t kInputs = 1;  // gate_up
  static constexpr bool kOverwritesSaved = true;

  SavedVariable gate_up;

  template <typename Self>
  static auto members(Self& self) {
    return std::tie(self.gate_up);
  }

  static variable_list backward(const variable_list& grads, Wanted wanted, const at::Tensor& gate_up);
  at::Tensor rebuild() override;
};

}  // namespace liger
