#include "cuda/rope.cuh"

#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "cuda/launch.h"
#include "ops/rope.h"
#include "ops/rows.h"

namespace liger {

namespace {

template <typename T>
cuda::RopeTensor<T> describe(const at::Tensor& x, const at::Tensor& out) {
  return {static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(out.mutable_data_ptr()),
      cuda::size_int32("rope", "the number of heads", x.size(1)), x.stride(0), x.stride(1), x.stride(2),
      out.stride(0), out.stride(1), out.stride(2)};
}

template <typename T>
bool aligned(const cuda::RopeTensor<T>& t) {
  return cuda::aligned_pointers(t.x, t.out) &&
      cuda::aligned_strides(
          sizeof(T), t.x_batch, t.x_head, t.x_position, t.out_batch, t.out_head, t.out_position);
}

template <typename C>
bool aligned(const cuda::RopeAngles<C>& a) {
  return cuda::aligned_pointers(a.cos, a.sin) &&
      cuda::aligned_strides(sizeof(C), a.cos_batch, a.cos_position, a.sin_batch, a.sin_position);
}

TensorPair rotate(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin, bool inverse) {
  const c10::cuda::CUDAGuard device_guard(q.device());
  auto q_out = at::empty_like(q);
  auto k_out = at::empty_like(k);
  const int64_t tokens = q.size(0) * q.size(2);
  const int head_dim = cuda::size_int32("rope", "head_dim", q.size(3));
  const int64_t heads = q.size(1) + k.size(1);
  if (tokens == 0 || heads == 0 || head_dim == 0) return {q_out, k_out};
  // An output lacks a unit last stride only where its input does; it is then filled through a buffer that
  // has.
  const auto q_in = with_unit_last_stride(q), k_in = with_unit_last_stride(k);
  const auto q_dense = with_unit_last_stride(q_out), k_dense = with_unit_last_stride(k_out);
  const auto cos_in = with_unit_last_stride(cos), sin_in = with_unit_last_stride(sin);
  const int rotary_dim = static_cast<int>(cos.size(-1));
  const auto batch_stride = [](const at::Tensor& t) {
    return t.dim() == 3 && t.size(0) > 1 ? t.stride(0) : 0;
  };
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto blocks = cuda::grid_size("rope", tokens, 1);

  cuda::dispatch_floating_pair(q.scalar_type(), cos.scalar_type(), [&](auto element, auto angle) {
    using T = decltype(element);
    using C = decltype(angle);
    const auto q_args = describe<T>(q_in, q_dense);
    const auto k_args = describe<T>(k_in, k_dense);
    const cuda::RopeAngles<C> angles = {static_cast<const C*>(cos_in.const_data_ptr()),
        static_cast<const C*>(sin_in.const_data_ptr()), batch_stride(cos_in), cos_in.stride(-2),
        batch_stride(sin_in), sin_in.stride(-2)};
    const auto launch = [&](auto vec) {
      const int columns = std::max(1, rotary_dim / 2 / vec());
      const int lanes = std::min(columns, cuda::kRopeThreads);
      const dim3 threads(lanes, std::max(1, std::min<int>(cuda::kRopeThreads / lanes, heads)));
      const auto kernel =
          inverse ? cuda::rope_kernel<T, C, vec(), true> : cuda::rope_kernel<T, C, vec(), false>;
      kernel<<<blocks, threads, 0, stream>>>(q_args, k_args, angles, q.size(2), head_dim, rotary_dim);
    };
    constexpr int kVec = cuda::kVecSize<T>;
    const bool vectorizable =
        rotary_dim / 2 % kVec == 0 && aligned(q_args) && aligned(k_args) && aligned(angles);
    vectorizable ? launch(std::integral_constant<int, kVec>{}) : launch(std::integral_constant<int, 1>{});
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (!q_dense.is_same(q_out)) q_out.copy_(q_dense);
  if (!k_dense.is_same(k_out)) k_out.copy_(k_dense);
  return {q_out, k_out};
}

}  // namespace

TensorPair rope_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin) {
  check_rope("rope", q, k, cos, sin);
  return rotate(q, k, cos, sin, /*inverse=*/false);
}

TensorPair rope_backward_cuda(
    const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& cos, const at::Tensor& sin) {
  check_rope("rope_backward", dq, dk, cos, sin);
  return rotate(dq, dk, cos, sin, /*inverse=*/true);
}

}  // namespace liger
