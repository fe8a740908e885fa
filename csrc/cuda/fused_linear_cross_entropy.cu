#include <ATen/ops/addmm.h>

#include <algorithm>

#include "cuda/launch.h"
#include "ops/fused_linear_cross_entropy_chunks.h"

namespace liger {

namespace {

// cuBLAS widens in the product itself from Ampere on.
void addmm_float32(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double beta, double alpha) {
  if (at::cuda::getCurrentDeviceProperties()->major >= 8) {
    at::addmm_out(out, out, a, b, at::kFloat, beta, alpha);
  } else {
    addmm_float32_by_blocks(out, a, b, beta, alpha);
  }
}

// 2048 rows of 128 256 classes in 16 bits: below about a thousand rows, accumulating the weight's gradient
// costs more than the products save (docs/performance.md).
int64_t default_workspace(const at::Tensor& /*weight*/) { return int64_t{512} << 20; }

}  // namespace

const FusedLinearCrossEntropyDevice kFusedLinearCrossEntropyCuda = {
    .rows = kCrossEntropyCuda,
    .addmm_float32 = addmm_float32,
    .default_workspace = default_workspace,
    .row_alignment_bytes = 128,
};

}  // namespace liger
