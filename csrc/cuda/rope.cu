#include "cuda/rope.cuh"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <limits>

#include "cuda/launch.h"
#include "ops/rope.h"
#include "ops/rows.h"

namespace liger {

using at::Tensor;

namespace {

template <typename T>
cuda::RopeTensor<T> describe(const Tensor& x, const Tensor& out) {
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
      cuda::aligned_strides(
          sizeof(C), a.cos_plane, a.cos_batch, a.cos_position, a.sin_plane, a.sin_batch, a.sin_position);
}

TensorPair rotate(const Rotation& rotation) {
  check_rotation(rotation);
  const Tensor &q = rotation.q, &k = rotation.k, &cos = rotation.cos, &sin = rotation.sin;
  const c10::cuda::CUDAGuard device_guard(q.device());
  auto q_out = at::empty_like(q);
  auto k_out = at::empty_like(k);
  const int64_t tokens = q.size(0) * q.size(2);
  const int head_dim = cuda::size_int32(rotation.op, "head_dim", q.size(3));
  const int64_t heads = q.size(1) + k.size(1);
  if (tokens == 0 || heads == 0 || head_dim == 0) return {q_out, k_out};
  // An output lacks a unit last stride only where its input does; it is then filled through a buffer that
  // has.
  const auto q_in = with_unit_last_stride(q), k_in = with_unit_last_stride(k);
  const auto writable = [](const Tensor& out) {
    return out.size(-1) <= 1 || out.stride(-1) == 1 ? out : at::empty(out.sizes(), out.options());
  };
  const auto q_dense = writable(q_out), k_dense = writable(k_out);
  const auto cos_in = with_unit_last_stride(cos), sin_in = with_unit_last_stride(sin);
  const int rotary_dim = static_cast<int>(cos.size(-1));
  const auto ends = rotation.section_ends();
  const int section_ends[2] = {static_cast<int>(ends.first), static_cast<int>(ends.second)};
  const auto stream = at::cuda::getCurrentCUDAStream();

  cuda::dispatch_floating_pair(q.scalar_type(), cos.scalar_type(), [&](auto element, auto angle) {
    using T = decltype(element);
    using C = decltype(angle);
    const auto q_args = describe<T>(q_in, q_dense);
    const auto k_args = describe<T>(k_in, k_dense);
    const cuda::RopeAngles<C> angles = {static_cast<const C*>(cos_in.const_data_ptr()),
        static_cast<const C*>(sin_in.const_data_ptr()), plane_stride(cos_in), batch_stride(cos_in),
        cos_in.stride(-2), plane_stride(sin_in), batch_stride(sin_in), sin_in.stride(-2), section_ends[0],
        section_ends[1]};
    const auto launch = [&](auto vec) {
      using Index = cuda::RopeIndex<vec()>;
      const int rotated_lanes = rotary_dim / 2 / vec();
      const int lanes = rotated_lanes + (head_dim - rotary_dim + 2 * vec() - 1) / (2 * vec());
      const int64_t units = tokens * heads * lanes;
      TORCH_CHECK_VALUE(heads * lanes <= std::numeric_limits<int>::max() &&
              static_cast<uint64_t>(units) <= std::numeric_limits<Index>::max(),
          "liger::", rotation.op, ": the input is too large for one launch (", units, " threads)");
      const cuda::RopeShape<vec()> shape = {.units = static_cast<Index>(units),
          .positions = static_cast<Index>(q.size(2)),
          .lanes = lanes,
          .rotated_lanes = rotated_lanes,
          .half = rotary_dim / 2,
          .head_dim = head_dim};
      const auto kernel = rotation.interleaved
          ? (rotation.backward ? cuda::rope_kernel<T, C, vec(), true, true>
                               : cuda::rope_kernel<T, C, vec(), true, false>)
          : (rotation.backward ? cuda::rope_kernel<T, C, vec(), false, true>
                               : cuda::rope_kernel<T, C, vec(), false, false>);
      const auto blocks = cuda::grid_size(rotation.op, units, cuda::kRopeThreads);
      kernel<<<blocks, cuda::kRopeThreads, 0, stream>>>(q_args, k_args, angles, shape);
    };
    constexpr int kVec = cuda::kVecSize<T>;
    const bool vectorizable = rotary_dim / 2 % kVec == 0 && section_ends[0] % kVec == 0 &&
        section_ends[1] % kVec == 0 && aligned(q_args) && aligned(k_args) && aligned(angles);
    vectorizable ? launch(std::integral_constant<int, kVec>{}) : launch(std::integral_constant<int, 1>{});
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (!q_dense.is_same(q_out)) q_out.copy_(q_dense);
  if (!k_dense.is_same(k_out)) k_out.copy_(k_dense);
  return {q_out, k_out};
}

}  // namespace

TensorPair rope_cuda(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return rotate({.op = "rope", .q = q, .k = k, .cos = cos, .sin = sin, .interleaved = interleaved});
}

TensorPair rope_backward_cuda(
    const Tensor& dq, const Tensor& dk, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return rotate({.op = "rope_backward",
      .q = dq,
      .k = dk,
      .cos = cos,
      .sin = sin,
      .interleaved = interleaved,
      .backward = true});
}

TensorPair mrope_cuda(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, at::IntArrayRef mrope_section) {
  return rotate({.op = "mrope", .q = q, .k = k, .cos = cos, .sin = sin, .mrope_section = mrope_section});
}

TensorPair mrope_backward_cuda(
    const Tensor& dq, const Tensor& dk, const Tensor& cos, const Tensor& sin, at::IntArrayRef mrope_section) {
  return rotate({.op = "mrope_backward",
      .q = dq,
      .k = dk,
      .cos = cos,
      .sin = sin,
      .mrope_section = mrope_section,
      .backward = true});
}

}  // namespace liger
