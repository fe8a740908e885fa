#pragma once

// out = act(gate) * up, with act(gate) rounded to T before the product (ops/glu.h).
//
// One thread owns VEC neighbouring columns of one row; a row is one tensor's worth when everything is
// contiguous, and half a row of the buffer when gate and up share one. Bytes: 3 elements moved forward (2
// read, 1 written), 5 backward (3 read, 2 written); bound by memory. No reductions: deterministic.

#include "cuda/common/vec.cuh"

namespace liger::cuda {

constexpr int kGluThreads = 256;

// 1 / (1 + exp(-x)) and x / (1 + exp(-x)). 16-bit results hide the error of the fast exponential and division
// (2 ulp of float32); wider ones do not.
template <typename T>
__device__ __forceinline__ Accumulate<T> over_one_plus_exp(Accumulate<T> numerator, Accumulate<T> x) {
  if constexpr (sizeof(T) == 2) {
    return __fdividef(numerator, 1.0f + __expf(-x));
  } else if constexpr (sizeof(T) == 4) {
    return numerator / (1.0f + expf(-x));
  } else {
    return numerator / (1.0 + exp(-x));
  }
}

// value(x) is act(x); value_and_slope(x, value, slope) adds act'(x).
template <typename T>
struct Silu {
  using A = Accumulate<T>;

  __device__ __forceinline__ static A value(A x) { return over_one_plus_exp<T>(x, x); }

  __device__ __forceinline__ static void value_and_slope(A x, A& value, A& slope) {
    const A s = over_one_plus_exp<T>(A(1), x);
    value = x * s;
    slope = s + value * (1 - s);
  }
};

// (1 + tanh(u)) / 2 is sigmoid(2u), which keeps its digits where it is small.
template <typename T>
struct GeluTanh {
  using A = Accumulate<T>;
  static constexpr A kScale = 1.5957691216057307;  // 2 sqrt(2 / pi)
  static constexpr A kCubic = 0.044715;

  // Beyond 30 the sigmoid is 0 or 1, and x^3 could overflow.
  __device__ __forceinline__ static A clamped(A x) { return x < -30 ? A(-30) : x > 30 ? A(30) : x; }

  __device__ __forceinline__ static A sigmoid_of_2u(A x) {
    return over_one_plus_exp<T>(A(1), kScale * x * (1 + kCubic * x * x));
  }

  __device__ __forceinline__ static A value(A x) { return x * sigmoid_of_2u(clamped(x)); }

  __device__ __forceinline__ static void value_and_slope(A x, A& value, A& slope) {
    const A bounded = clamped(x), s = sigmoid_of_2u(bounded);
    value = x * s;
    slope = s + bounded * s * (1 - s) * kScale * (1 + 3 * kCubic * bounded * bounded);
  }
};

__device__ __forceinline__ float normal_cdf(float x) { return normcdff(x); }
__device__ __forceinline__ double normal_cdf(double x) { return normcdf(x); }
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

template <typename T>
struct Gelu {
  using A = Accumulate<T>;
  static constexpr A kDensity = 0.3989422804014327;  // 1 / sqrt(2 pi)

  __device__ __forceinline__ static A value(A x) { return x * normal_cdf(x); }

  __device__ __forceinline__ static void value_and_slope(A x, A& value, A& slope) {
    const A p = normal_cdf(x);
    value = x * p;
    slope = p + x * kDensity * exponential(A(-0.5) * x * x);
  }
};

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

template <typename T, typename Act, int VEC>
__global__ void __launch_bounds__(kGluThreads)
    glu_forward_kernel(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ out,
        int64_t cols, int64_t gate_stride, int64_t up_stride, int64_t blocks_per_row) {
  const RowPosition<VEC> at(blocks_per_row);
  if (at.col >= cols) return;
  const auto g = Vec<T, VEC>::load(gate + at.row * gate_stride + at.col);
  const auto u = Vec<T, VEC>::load(up + at.row * up_stride + at.col);
  Vec<T, VEC> result;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const auto activated = rounded<T>(Act::value(widen(g.data[i])));
    result.data[i] = narrow<T>(activated * widen(u.data[i]));
  }
  result.store(out + at.row * cols + at.col);
}

template <typename T, typename Act, int VEC>
__global__ void __launch_bounds__(kGluThreads)
    glu_backward_kernel(const T* __restrict__ dout, const T* __restrict__ gate, const T* __restrict__ up,
        T* __restrict__ dgate, T* __restrict__ dup, int64_t cols, int64_t dout_stride, int64_t gate_stride,
        int64_t up_stride, int64_t gradient_stride, int64_t blocks_per_row) {
  const RowPosition<VEC> at(blocks_per_row);
  if (at.col >= cols) return;
  const auto d = Vec<T, VEC>::load(dout + at.row * dout_stride + at.col);
  const auto g = Vec<T, VEC>::load(gate + at.row * gate_stride + at.col);
  const auto u = Vec<T, VEC>::load(up + at.row * up_stride + at.col);
  Vec<T, VEC> gate_gradient, up_gradient;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const auto dy = widen(d.data[i]);
    Accumulate<T> value, slope;
    Act::value_and_slope(widen(g.data[i]), value, slope);
    up_gradient.data[i] = narrow<T>(dy * value);
    gate_gradient.data[i] = narrow<T>(dy * widen(u.data[i]) * slope);
  }
  gate_gradient.store(dgate + at.row * gradient_stride + at.col);
  up_gradient.store(dup + at.row * gradient_stride + at.col);
}

}  // namespace liger::cuda
