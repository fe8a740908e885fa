#include "cuda/fused_linear_cross_entropy.cuh"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "cuda/launch.h"
#include "ops/fused_linear_cross_entropy.h"
#include "ops/fused_linear_cross_entropy_chunks.h"

namespace liger {

namespace {

// grad and out are contiguous; out may be grad.
void launch_scale(const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& out) {
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

void scale_in_place(at::Tensor& grad, const at::Tensor& scale) {
  const auto dense = grad.contiguous();
  launch_scale(dense, scale, dense);
  if (!dense.is_same(grad)) grad.copy_(dense);
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

const FusedLinearCrossEntropyDevice kCuda = {
    .rows = kCrossEntropyCuda,
    .addmm_float32 = addmm_float32,
    .scale = scale_in_place,
    .default_workspace = default_workspace,
    .row_alignment_bytes = 128,
};

}  // namespace

TensorTriple fused_linear_cross_entropy_cuda(const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, std::optional<at::ScalarType> compute_dtype) {
  auto [loss, z_loss, lse, dinput, dweight, dbias, grad_scale] = fused_linear_cross_entropy_forward_cuda(
      input, weight, target, bias, ce_weight, ignore_index, label_smoothing, lse_square_scale, softcap,
      reduction, num_items, accum_dtype, workspace_bytes, compute_dtype, false, false, false);
  return {loss, z_loss, lse};
}

FusedLinearCrossEntropyForward fused_linear_cross_entropy_forward_cuda(const at::Tensor& input,
    const at::Tensor& weight, const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::string_view reduction,
    const std::optional<at::Tensor>& num_items, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, std::optional<at::ScalarType> compute_dtype, bool need_dinput,
    bool need_dweight, bool need_dbias) {
  constexpr auto op = "fused_linear_cross_entropy";
  const auto options = check_fused_linear_cross_entropy(op, input, weight, target, bias, ce_weight,
      ignore_index, label_smoothing, lse_square_scale, softcap, reduction, num_items, accum_dtype,
      workspace_bytes, compute_dtype);
  check_wanted_gradients(op, bias, need_dbias);
  const c10::cuda::CUDAGuard device_guard(input.device());
  return fused_linear_cross_entropy_forward_chunks(kCuda,
      {op, input, weight, target, bias, ce_weight, num_items, options, need_dinput, need_dweight,
          need_dbias});
}

TensorTriple fused_linear_cross_entropy_backward_cuda(const at::Tensor& dloss, const at::Tensor& input,
    const at::Tensor& weight, const at::Tensor& target, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& ce_weight, int64_t ignore_index, double label_smoothing,
    double lse_square_scale, std::optional<double> softcap, std::optional<at::ScalarType> accum_dtype,
    std::optional<int64_t> workspace_bytes, std::optional<at::ScalarType> compute_dtype, bool need_dinput,
    bool need_dweight, bool need_dbias) {
  constexpr auto op = "fused_linear_cross_entropy_backward";
  const auto options =
      check_fused_linear_cross_entropy_backward(dloss, input, weight, target, bias, ce_weight, ignore_index,
          label_smoothing, lse_square_scale, softcap, accum_dtype, workspace_bytes, compute_dtype);
  check_wanted_gradients(op, bias, need_dbias);
  const c10::cuda::CUDAGuard device_guard(input.device());
  const std::optional<at::Tensor> no_num_items;
  return fused_linear_cross_entropy_backward_chunks(kCuda,
      {op, input, weight, target, bias, ce_weight, no_num_items, options, need_dinput, need_dweight,
          need_dbias},
      dloss);
}

at::Tensor fused_linear_cross_entropy_scale_cuda(const at::Tensor& grad, const at::Tensor& scale) {
  check_fused_linear_cross_entropy_scale(grad, scale);
  const c10::cuda::CUDAGuard device_guard(grad.device());
  auto out = at::empty(grad.sizes(), grad.options());
  launch_scale(grad.contiguous(), scale, out);
  return out;
}

void fused_linear_cross_entropy_scale_inplace_cuda(at::Tensor& grad, const at::Tensor& scale) {
  check_fused_linear_cross_entropy_scale(grad, scale);
  const c10::cuda::CUDAGuard device_guard(grad.device());
  scale_in_place(grad, scale);
}

}  // namespace liger
