#pragma once

// The autograd node of add_rms_norm.

#include <string>

#include "ops/rebuildable.h"

namespace liger {

struct AddRmsNormBackward : RebuildableNode<AddRmsNormBackward> {
  static constexpr size_t kInputs = 3;  // x, residual, weight

  SavedVariable sum, weight, rstd;
  double offset = 0;
  std::string casting_mode;
  double eps = 0;  // for rebuild() alone

  template <typename Self>
  static auto members(Self& self) {
    return std::tie(self.sum, self.weight, self.rstd, self.offset, self.casting_mode);
  }

  // dx, for x and residual alike, = dsum + the gradient of RMSNorm, added in float32 and rounded once.
  static variable_list backward(const variable_list& grads, Wanted wanted, const at::Tensor& sum,
      const at::Tensor& weight, const at::Tensor& rstd, double offset, const std::string& casting_mode);
  at::Tensor rebuild() override;
};

}  // namespace liger
