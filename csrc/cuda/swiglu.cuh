#pragma once

// out = silu(gate) * up, with silu(gate) rounded to T before the product (ops/swiglu.h).
//
// One thread owns VEC neighbouring columns of one row; a row is one tensor's worth when everything is
// contiguous. Bytes: 3 elements moved forward (2 read, 1 written), 5 backward (3 read, 2 written); bound by
// memory. No reductions, so results are the same from GPU to GPU up to the exponential.

#include "cuda/common/vec.cuh"

namespace liger::cuda {

constexpr int kSwigluThreads = 256;

// 16-bit results hide the error of the fast exponential and division (2 ulp of float32); wider ones do not.
template <typename T>
__device__ __forceinline__ Accumulate<T> sigmoid(Accumulate<T> x) {
  if constexpr (sizeof(T) == 2) {
    return __fdividef(1.0f, 1.0f + __expf(-x));
  } else if constexpr (sizeof(T) == 4) {
    return 1.0f / (1.0f + expf(-x));
  } else {
    return 1.0 / (1.0 + exp(-x));
  }
}

// Where the thread works: row, and its first column. blocks_per_row blocks share a row.
template <int VEC>
struct RowPosition {
  int64_t row, col;

  __device__ __forceinline__ explicit RowPosition(int64_t blocks_per_row) {
    row = blockIdx.x / blocks_per_row;
    const int64_t block = blockIdx.x - row * blocks_per_row;
    col = (block * blockDim.x + threadIdx.x) * VEC;
  }
};

template <typename T, int VEC>
__global__ void __launch_bounds__(kSwigluThreads)
    swiglu_forward_kernel(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ out,
        int64_t cols, int64_t gate_stride, int64_t up_stride, int64_t blocks_per_row) {
  const RowPosition<VEC> at(blocks_per_row);
  if (at.col >= cols) return;
  const auto g = Vec<T, VEC>::load(gate + at.row * gate_stride + at.col);
  const auto u = Vec<T, VEC>::load(up + at.row * up_stride + at.col);
  Vec<T, VEC> result;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const auto x = widen(g.data[i]);
    const auto silu = rounded<T>(x * sigmoid<T>(x));
    result.data[i] = narrow<T>(silu * widen(u.data[i]));
  }
  result.store(out + at.row * cols + at.col);
}

// With s = sigmoid(gate):  d gate = dout * up * (s + silu * (1 - s)),  d up = dout * silu.
template <typename T, int VEC>
__global__ void __launch_bounds__(kSwigluThreads) swiglu_backward_kernel(const T* __restrict__ dout,
    const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ dgate, T* __restrict__ dup,
    int64_t cols, int64_t dout_stride, int64_t gate_stride, int64_t up_stride, int64_t blocks_per_row) {
  const RowPosition<VEC> at(blocks_per_row);
  if (at.col >= cols) return;
  const auto d = Vec<T, VEC>::load(dout + at.row * dout_stride + at.col);
  const auto g = Vec<T, VEC>::load(gate + at.row * gate_stride + at.col);
  const auto u = Vec<T, VEC>::load(up + at.row * up_stride + at.col);
  Vec<T, VEC> gate_gradient, up_gradient;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const auto x = widen(g.data[i]);
    const auto dy = widen(d.data[i]);
    const auto s = sigmoid<T>(x);
    const auto silu = x * s;
    up_gradient.data[i] = narrow<T>(dy * silu);
    gate_gradient.data[i] = narrow<T>(dy * widen(u.data[i]) * (s + silu * (1 - s)));
  }
  gate_gradient.store(dgate + at.row * cols + at.col);
  up_gradient.store(dup + at.row * cols + at.col);
}

}  // namespace liger::cuda
