#include <algorithm>

#include "cpu/kernels.h"
#include "ops/fused_linear_cross_entropy_chunks.h"

namespace liger {

namespace {

// Enough rows that reading and writing the weight's gradient once a chunk costs little beside the products.
int64_t default_workspace(const at::Tensor& weight) {
  constexpr int64_t kLeast = int64_t{64} << 20;
  return std::max<int64_t>(kLeast, static_cast<int64_t>(weight.nbytes()) / 4);
}

}  // namespace

const FusedLinearCrossEntropyDevice kFusedLinearCrossEntropyCpu = {
    .rows = kCrossEntropyCpu,
    .addmm_float32 = addmm_float32_by_blocks,
    .default_workspace = default_workspace,
    .row_alignment_bytes = 1,
};

}  // namespace liger
