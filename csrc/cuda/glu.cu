#include "cuda/glu.cuh"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <initializer_list>

#include "cuda/launch.h"
#include "ops/glu.h"
#include "ops/rows.h"

namespace liger {

using at::Tensor;

namespace {

// The common shape of gate, up, out and their gradients: one row when all of them are contiguous.
struct Grid {
  int64_t rows, cols;

  Grid(std::initializer_list<Rows> tensors) {
    const Rows& first = *tensors.begin();
    const bool flat = std::all_of(tensors.begin(), tensors.end(), [](const Rows& t) { return t.dense(); });
    rows = flat ? 1 : first.rows;
    cols = flat ? first.rows * first.cols : first.cols;
  }

  int64_t blocks_per_row(int vec) const {
    const int64_t per_block = static_cast<int64_t>(cuda::kGluThreads) * vec;
    return (cols + per_block - 1) / per_block;
  }

  bool vectorizable(int64_t element_size, std::initializer_list<Rows> tensors) const {
    return cols * element_size % 16 == 0 && std::all_of(tensors.begin(), tensors.end(), [&](const Rows& t) {
      return cuda::aligned_pointers(t.data()) && (rows == 1 || cuda::aligned_strides(element_size, t.stride));
    });
  }
};

// f(T{}, Act{}) for the dtype and the activation.
template <typename F>
void dispatch(const Glu& glu, const F& f) {
  cuda::dispatch_floating(glu.gate.scalar_type(), [&](auto element) {
    using T = decltype(element);
    switch (glu.activation) {
      case Activation::kSilu:
        return f(T{}, cuda::Silu<T>{});
      case Activation::kGeluTanh:
        return f(T{}, cuda::GeluTanh<T>{});
      case Activation::kGelu:
        return f(T{}, cuda::Gelu<T>{});
    }
  });
}

Tensor forward(const Glu& glu) {
  const c10::cuda::CUDAGuard device_guard(glu.gate.device());
  auto out = at::empty(glu.gate.sizes(), glu.gate.options());
  if (out.numel() == 0) return out;
  const auto gate = as_rows(glu.gate), up = as_rows(glu.up), result = as_rows(out);
  const Grid grid({gate, up});
  const auto stream = at::cuda::getCurrentCUDAStream();
  dispatch(glu, [&](auto element, auto act) {
    using T = decltype(element);
    const auto launch = [&](auto vec) {
      const int64_t blocks_per_row = grid.blocks_per_row(vec());
      const auto blocks = cuda::grid_size("glu", grid.rows * blocks_per_row, 1);
      cuda::glu_forward_kernel<T, decltype(act), vec()><<<blocks, cuda::kGluThreads, 0, stream>>>(
          static_cast<const T*>(gate.data()), static_cast<const T*>(up.data()),
          static_cast<T*>(out.mutable_data_ptr()), grid.cols, gate.stride, up.stride, blocks_per_row);
    };
    grid.vectorizable(sizeof(T), {gate, up, result})
        ? launch(std::integral_constant<int, cuda::kVecSize<T>>{})
        : launch(std::integral_constant<int, 1>{});
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// dgate and dup have rows of one stride: tensors of their own, or the halves of a buffer.
void backward_into(const Glu& glu, const Tensor& dgate, const Tensor& dup) {
  if (dgate.numel() == 0) return;
  const auto dout = as_rows(glu.dout), gate = as_rows(glu.gate), up = as_rows(glu.up);
  const auto gate_gradient = as_rows(dgate), up_gradient = as_rows(dup);
  const Grid grid({dout, gate, up, gate_gradient});
  const auto stream = at::cuda::getCurrentCUDAStream();
  dispatch(glu, [&](auto element, auto act) {
    using T = decltype(element);
    const auto launch = [&](auto vec) {
      const int64_t blocks_per_row = grid.blocks_per_row(vec());
      const auto blocks = cuda::grid_size("glu_backward", grid.rows * blocks_per_row, 1);
      cuda::glu_backward_kernel<T, decltype(act), vec()>
          <<<blocks, cuda::kGluThreads, 0, stream>>>(static_cast<const T*>(dout.data()),
              static_cast<const T*>(gate.data()), static_cast<const T*>(up.data()),
              static_cast<T*>(dgate.mutable_data_ptr()), static_cast<T*>(dup.mutable_data_ptr()), grid.cols,
              dout.stride, gate.stride, up.stride, gate_gradient.stride, blocks_per_row);
    };
    grid.vectorizable(sizeof(T), {dout, gate, up, gate_gradient, up_gradient})
        ? launch(std::integral_constant<int, cuda::kVecSize<T>>{})
        : launch(std::integral_constant<int, 1>{});
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

TensorPair backward(const Glu& glu) {
  const c10::cuda::CUDAGuard device_guard(glu.gate.device());
  auto dgate = at::empty(glu.gate.sizes(), glu.gate.options());
  auto dup = at::empty(glu.gate.sizes(), glu.gate.options());
  backward_into(glu, dgate, dup);
  return {dgate, dup};
}

Tensor packed_backward(const Glu& glu, const Tensor& gate_up) {
  const c10::cuda::CUDAGuard device_guard(gate_up.device());
  auto gradient = at::empty(gate_up.sizes(), gate_up.options());
  const auto halves = gradient.chunk(2, -1);
  backward_into(glu, halves[0], halves[1]);
  return gradient;
}

}  // namespace

Tensor swiglu_cuda(const Tensor& gate, const Tensor& up) {
  return forward(check_glu("swiglu", gate, up, Activation::kSilu));
}

TensorPair swiglu_backward_cuda(const Tensor& dout, const Tensor& gate, const Tensor& up) {
  return backward(check_glu_backward("swiglu_backward", dout, gate, up, Activation::kSilu));
}

Tensor geglu_cuda(const Tensor& gate, const Tensor& up, std::string_view approximate) {
  return forward(check_glu("geglu", gate, up, gelu_named("geglu", approximate)));
}

TensorPair geglu_backward_cuda(
    const Tensor& dout, const Tensor& gate, const Tensor& up, std::string_view approximate) {
  return backward(
      check_glu_backward("geglu_backward", dout, gate, up, gelu_named("geglu_backward", approximate)));
}

Tensor swiglu_packed_cuda(const Tensor& gate_up) {
  return forward(check_glu_packed("swiglu_packed", gate_up, Activation::kSilu));
}

Tensor swiglu_packed_backward_cuda(const Tensor& dout, const Tensor& gate_up) {
  return packed_backward(
      check_glu_packed_backward("swiglu_packed_backward", dout, gate_up, Activation::kSilu), gate_up);
}

Tensor geglu_packed_cuda(const Tensor& gate_up, std::string_view approximate) {
  return forward(check_glu_packed("geglu_packed", gate_up, gelu_named("geglu_packed", approximate)));
}

Tensor geglu_packed_backward_cuda(const Tensor& dout, const Tensor& gate_up, std::string_view approximate) {
  return packed_backward(check_glu_packed_backward("geglu_packed_backward", dout, gate_up,
                             gelu_named("geglu_packed_backward", approximate)),
      gate_up);
}

}  // namespace liger
