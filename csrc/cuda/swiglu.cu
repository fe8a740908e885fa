#include "cuda/swiglu.cuh"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <initializer_list>

#include "cuda/launch.h"
#include "ops/rows.h"
#include "ops/swiglu.h"

namespace liger {

namespace {

// The common shape of gate, up, out and their gradients: one row when all inputs are contiguous.
struct Grid {
  int64_t rows, cols;

  Grid(std::initializer_list<Rows> inputs) {
    const Rows& first = *inputs.begin();
    const bool flat = std::all_of(inputs.begin(), inputs.end(), [](const Rows& t) { return t.dense(); });
    rows = flat ? 1 : first.rows;
    cols = flat ? first.rows * first.cols : first.cols;
  }

  int64_t blocks_per_row(int vec) const {
    const int64_t per_block = static_cast<int64_t>(cuda::kSwigluThreads) * vec;
    return (cols + per_block - 1) / per_block;
  }
};

template <typename... Outputs>
bool vectorizable(
    const Grid& grid, int64_t element_size, std::initializer_list<Rows> inputs, const Outputs*... outputs) {
  bool aligned = grid.cols * element_size % 16 == 0 && cuda::aligned_pointers(outputs...);
  for (const Rows& t : inputs) {
    aligned = aligned && cuda::aligned_pointers(t.data()) &&
        (grid.rows == 1 || cuda::aligned_strides(element_size, t.stride));
  }
  return aligned;
}

}  // namespace

at::Tensor swiglu_cuda(const at::Tensor& gate, const at::Tensor& up) {
  check_swiglu(gate, up);
  const c10::cuda::CUDAGuard device_guard(gate.device());
  auto out = at::empty(gate.sizes(), gate.options());
  if (out.numel() == 0) return out;
  const auto gate_rows = as_rows(gate), up_rows = as_rows(up);
  const Grid grid({gate_rows, up_rows});
  const auto stream = at::cuda::getCurrentCUDAStream();
  cuda::dispatch_floating(gate.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto launch = [&](auto vec) {
      const int64_t blocks_per_row = grid.blocks_per_row(vec());
      const auto blocks = cuda::grid_size("swiglu", grid.rows * blocks_per_row, 1);
      cuda::swiglu_forward_kernel<T, vec()>
          <<<blocks, cuda::kSwigluThreads, 0, stream>>>(static_cast<const T*>(gate_rows.data()),
              static_cast<const T*>(up_rows.data()), static_cast<T*>(out.mutable_data_ptr()), grid.cols,
              gate_rows.stride, up_rows.stride, blocks_per_row);
    };
    vectorizable(grid, sizeof(T), {gate_rows, up_rows}, out.const_data_ptr())
        ? launch(std::integral_constant<int, cuda::kVecSize<T>>{})
        : launch(std::integral_constant<int, 1>{});
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

TensorPair swiglu_backward_cuda(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up) {
  check_swiglu_backward(dout, gate, up);
  const c10::cuda::CUDAGuard device_guard(gate.device());
  auto dgate = at::empty(gate.sizes(), gate.options());
  auto dup = at::empty(gate.sizes(), gate.options());
  if (dgate.numel() == 0) return {dgate, dup};
  const auto dout_rows = as_rows(dout), gate_rows = as_rows(gate), up_rows = as_rows(up);
  const Grid grid({dout_rows, gate_rows, up_rows});
  const auto stream = at::cuda::getCurrentCUDAStream();
  cuda::dispatch_floating(gate.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto launch = [&](auto vec) {
      const int64_t blocks_per_row = grid.blocks_per_row(vec());
      const auto blocks = cuda::grid_size("swiglu_backward", grid.rows * blocks_per_row, 1);
      cuda::swiglu_backward_kernel<T, vec()>
          <<<blocks, cuda::kSwigluThreads, 0, stream>>>(static_cast<const T*>(dout_rows.data()),
              static_cast<const T*>(gate_rows.data()), static_cast<const T*>(up_rows.data()),
              static_cast<T*>(dgate.mutable_data_ptr()), static_cast<T*>(dup.mutable_data_ptr()), grid.cols,
              dout_rows.stride, gate_rows.stride, up_rows.stride, blocks_per_row);
    };
    vectorizable(
        grid, sizeof(T), {dout_rows, gate_rows, up_rows}, dgate.const_data_ptr(), dup.const_data_ptr())
        ? launch(std::integral_constant<int, cuda::kVecSize<T>>{})
        : launch(std::integral_constant<int, 1>{});
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dgate, dup};
}

}  // namespace liger
