#pragma once

// The autograd nodes of geglu and geglu_packed.

#include <string>

#include "ops/rebuildable.h"

namespace liger {

struct GegluBackward : RebuildableNode<GegluBackward> {
  static constexpr size_t kInputs = 2;  // gate, up
  static constexpr bool kOverwritesSaved = true;

  SavedVariable gate, up;
  std::string approximate;

  template <typename Self>
  static auto members(Self& self) {
    return std::tie(self.gate, self.up, self.approximate);
  }

  // d gate = dout * up * gelu'(gate),  d up = dout * gelu(gate).
  static variable_list backward(const variable_list& grads, Wanted wanted, const at::Tensor& gate,
      const at::Tensor& up, const std::string& approximate);
  at::Tensor rebuild() override;
};

struct GegluPackedBackward : RebuildableNode<GegluPackedBackward> {
  static constexpr size_t kInputs = 1;  // gate_up
  static constexpr bool kOverwritesSaved = true;

  SavedVariable gate_up;
  std::string approximate;

  template <typename Self>
  static auto members(Self& self) {
    return std::tie(self.gate_up, self.approximate);
  }

  static variable_list backward(
      const variable_list& grads, Wanted wanted, const at::Tensor& gate_up, const std::string& approximate);
  at::Tensor rebuild() override;
};

}  // namespace liger
