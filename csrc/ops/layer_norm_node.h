#pragma once

// The autograd node of layer_norm.

#include "ops/rebuildable.h"

namespace liger {

struct LayerNormBackward : RebuildableNode<LayerNormBackward> {
  static constexpr size_t kInputs = 3;  // x, weight, bias

  SavedVariable x, weight, mean, rstd;
  at::ScalarType bias_dtype = at::kFloat;
  SavedVariable bias;  // this and eps for rebuild() alone
  double eps = 0;

  template <typename Self>
  static auto members(Self& self) {
    return std::tie(self.x, self.weight, self.mean, self.rstd, self.bias_dtype);
  }

  // With m = dy * weight:  d x = rstd * (m - mean(m) - n * mean(m * n));  d weight and d bias are the sums
  // over rows of dy * n and dy.
  static variable_list backward(const variable_list& grads, Wanted wanted, const at::Tensor& x,
      const at::Tensor& weight, const at::Tensor& mean, const at::Tensor& rstd, at::ScalarType bias_dtype);
  at::Tensor rebuild() override;
};

}  // namespace liger
