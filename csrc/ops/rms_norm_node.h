#pragma once

// The autograd node of rms_norm.

#include <string>

#include "ops/rebuildable.h"

namespace liger {

struct RmsNormBackward : RebuildableNode<RmsNormBackward> {
  static constexpr size_t kInputs = 2;  // x, weight

  SavedVariable x, weight, rstd;
  double offset = 0;
  std::string casting_mode;
  double eps = 0;  // for rebuild() alone

  template <typename Self>
  static auto members(Self& self) {
    return std::tie(self.x, self.weight, self.rstd, self.offset, self.casting_mode);
  }

  // d x = rstd * (m - n * mean(m * n)) with m = dy * (offset + weight);  d weight = sum over rows of dy * n.
  static variable_list backward(const variable_list& grads, Wanted wanted, const at::Tensor& x,
      const at::Tensor& weight, const at::Tensor& rstd, double offset, const std::string& casting_mode);
  at::Tensor rebuild() override;
};

}  // namespace liger
