#include "cuda/fused_linear_cross_entropy.cuh"

#include <ATen/ops/addmm.h>

#include <algorithm>

#include "cuda/launch.h"
#include "ops/fused_linear_cross_entropy_chunks.h"

namespace liger {

namespace {

void scale(const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& out) {
  const int64_t size = grad.numel();
  if (size == 0) return;
  cuda::dispatch_floating(grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto* from = static_cast<const T*>(grad.const_data_ptr());
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    const auto launch = [&](auto vec) {
      const int64_t per_block = static_cast<int64_t>(cuda::kScaleThreads) * vec();
      const int64_t wanted = (size + per_block - 1) / per_block;
      const auto blocks = static_cast<unsigned int>(std::min<int64_t>(wanted, 8 * cuda::multiprocessors()));
      cuda::scale_kernel<T, vec()><<<blocks, cuda::kScaleThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
          from, scale.const_data_ptr<cuda::Accumulate<T>>(), to, size);
    };
    size % cuda::kVecSize<T> == 0 && cuda::aligned_pointers(from, to)
        ? launch(std::integral_constant<int, cuda::kVecSize<T>>{})
        : launch(std::integral_constant<int, 1>{});
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

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
    .scale = scale,
    .default_workspace = default_workspace,
    .row_alignment_bytes = 128,
};

}  // namespace liger
