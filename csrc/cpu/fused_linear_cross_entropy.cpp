#include <algorithm>

#include "cpu/kernels.h"
#include "ops/fused_linear_cross_entropy_chunks.h"

namespace liger {

namespace {

void scale(const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& out) {
  const double factor =
      scale.scalar_type() == at::kDouble ? *scale.const_data_ptr<double>() : *scale.const_data_ptr<float>();
  if (factor == 1 && out.is_same(grad)) return;
  cpu::kernels().scale({.dtype = grad.scalar_type(),
      .in = grad.const_data_ptr(),
      .out = out.mutable_data_ptr(),
      .size = grad.numel(),
      .factor = factor});
}

// Enough rows that reading and writing the weight's gradient once a chunk costs little beside the products.
int64_t default_workspace(const at::Tensor& weight) {
  constexpr int64_t kLeast = int64_t{64} << 20;
  return std::max<int64_t>(kLeast, static_cast<int64_t>(weight.nbytes()) / 4);
}

}  // namespace

const FusedLinearCrossEntropyDevice kFusedLinearCrossEntropyCpu = {
    .rows = kCrossEntropyCpu,
    .addmm_float32 = addmm_float32_by_blocks,
    .scale = scale,
    .default_workspace = default_workspace,
    .row_alignment_bytes = 1,
};

}  // namespace liger
