#pragma once

// Gated linear units: out = act(gate) * up, with act(gate) rounded to T before the product. Formulas:
// ops/swiglu.h, ops/geglu.h; what gate, up and their gradients are in memory: ops/glu_rows.h.
//
// One thread owns VEC neighbouring columns of one row, whatever the width of a row, so no thread of a block
// idles; a row is one tensor's worth when everything is contiguous. Bytes: 3 elements moved forward (2 read,
// 1 written), 5 backward (3 read, 2 written); bound by memory. No reductions, so results are the same from
// run to run, and from GPU to GPU up to the exponential.

#include "cuda/common/vec.cuh"
#include "ops/normal_tail.h"

namespace liger::cuda {

constexpr int kGluThreads = 256;

// 16-bit results hide the error of the fast exponential and division (2 ulp of float32, near the arguments
// where the result is not 0); wider ones do not.
template <typename T>
__device__ __forceinline__ Accumulate<T> exponential(Accumulate<T> x) {
  if constexpr (sizeof(T) == 2) {
    return __expf(x);
  } else if constexpr (sizeof(T) == 4) {
    return expf(x);
  } else {
    return exp(x);
  }
}

template <typename T>
__device__ __forceinline__ Accumulate<T> quotient(Accumulate<T> a, Accumulate<T> b) {
  if constexpr (sizeof(T) == 2) {
    return __fdividef(a, b);
  } else {
    return a / b;
  }
}

// Activations: the value, and for backward the value and the derivative.

struct Silu {
  template <typename T>
  __device__ __forceinline__ static Accumulate<T> sigmoid(Accumulate<T> x) {
    return quotient<T>(1, 1 + exponential<T>(-x));
  }

  template <typename T>
  __device__ __forceinline__ static Accumulate<T> value(Accumulate<T> x) {
    return x * sigmoid<T>(x);
  }

  template <typename T>
  __device__ __forceinline__ static void value_and_slope(
      Accumulate<T> x, Accumulate<T>& value, Accumulate<T>& slope) {
    const auto s = sigmoid<T>(x);
    value = x * s;
    slope = s + value * (1 - s);
  }
};

// A distribution function from its tail, the smaller of Phi(x) and 1 - Phi(x).
template <typename A>
__device__ __forceinline__ A distribution(A x, A tail) {
  return x < 0 ? tail : 1 - tail;
}

// Phi(x) = sigmoid(2 u), and with e = exp(-2 |u|):  tail = e / (1 + e),  Phi' = tail (1 - tail) 2 u'.
struct GeluTanh {
  // 2 sqrt(2 / pi), and 0.044715 times that.
  static constexpr double kLinear = 1.5957691216057308;
  static constexpr double kCubic = 0.044715 * kLinear;

  template <typename T>
  __device__ __forceinline__ static Accumulate<T> tail(Accumulate<T> x) {
    using A = Accumulate<T>;
    const A size = fabs(x);
    const A e = exponential<T>(-size * (A(kLinear) + A(kCubic) * size * size));
    return quotient<T>(e, 1 + e);
  }

  template <typename T>
  __device__ __forceinline__ static Accumulate<T> value(Accumulate<T> x) {
    return x * distribution(x, tail<T>(x));
  }

  template <typename T>
  __device__ __forceinline__ static void value_and_slope(
      Accumulate<T> x, Accumulate<T>& value, Accumulate<T>& slope) {
    using A = Accumulate<T>;
    const A t = tail<T>(x);
    const A phi = distribution(x, t);
    // The tail is 0 long before this bound, beyond which u' could overflow and 0 * infinity is no slope.
    const A bounded = x < -64 ? A(-64) : x > 64 ? A(64) : x;
    const A inner_slope = A(kLinear) + A(3 * kCubic) * bounded * bounded;
    value = x * phi;
    slope = phi + bounded * inner_slope * (t * (1 - t));
  }
};

// Phi' is the normal density.
struct GeluErf {
  static constexpr double kSqrtHalf = 0.7071067811865476;
  static constexpr double kInvSqrtTwoPi = 0.3989422804014327;

  template <typename T>
  __device__ __forceinline__ static void tail_and_density(
      Accumulate<T> x, Accumulate<T>& tail, Accumulate<T>& density) {
    using A = Accumulate<T>;
    const A size = fabs(x);
    const A bell = exponential<T>(A(-0.5) * size * size);
    density = A(kInvSqrtTwoPi) * bell;
    if constexpr (sizeof(T) == 2) {
      tail = bell * normal_tail_polynomial(__fdividef(1.0f, 1.0f + kNormalTailScale * size));
    } else if constexpr (sizeof(T) == 4) {
      tail = 0.5f * erfcf(size * float(kSqrtHalf));
    } else {
      tail = 0.5 * erfc(size * kSqrtHalf);
    }
  }

  template <typename T>
  __device__ __forceinline__ static Accumulate<T> value(Accumulate<T> x) {
    Accumulate<T> tail, density;
    tail_and_density<T>(x, tail, density);
    return x * distribution(x, tail);
  }

  template <typename T>
  __device__ __forceinline__ static void value_and_slope(
      Accumulate<T> x, Accumulate<T>& value, Accumulate<T>& slope) {
    Accumulate<T> tail, density;
    tail_and_density<T>(x, tail, density);
    const auto phi = distribution(x, tail);
    value = x * phi;
    slope = phi + x * density;
  }
};

// Where the thread works.
template <int VEC>
struct GluPosition {
  int64_t row, col;
  bool inside;

  __device__ __forceinline__ GluPosition(int64_t rows, int64_t cols) {
    const uint64_t per_row = static_cast<uint64_t>(cols) / VEC;
    const uint64_t index = static_cast<uint64_t>(blockIdx.x) * kGluThreads + threadIdx.x;
    // One row has no need of the division, which takes as long as a load from L2.
    row = rows == 1 ? 0 : static_cast<int64_t>(index / per_row);
    const uint64_t vector = index - row * per_row;
    col = static_cast<int64_t>(vector) * VEC;
    inside = row < rows && vector < per_row;
  }
};

template <typename Activation, typename T, int VEC>
__global__ void __launch_bounds__(kGluThreads)
    glu_forward_kernel(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ out,
        int64_t rows, int64_t cols, int64_t gate_stride, int64_t up_stride) {
  const GluPosition<VEC> at(rows, cols);
  if (!at.inside) return;
  const auto g = Vec<T, VEC>::load(gate + at.row * gate_stride + at.col);
  const auto u = Vec<T, VEC>::load(up + at.row * up_stride + at.col);
  Vec<T, VEC> result;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const auto value = rounded<T>(Activation::template value<T>(widen(g.data[i])));
    result.data[i] = narrow<T>(value * widen(u.data[i]));
  }
  result.store(out + at.row * cols + at.col);
}

// d gate = dout * up * act'(gate),  d up = dout * act(gate). Gradients may be written over gate and up: a
// thread has read all of its elements before it writes any.
template <typename Activation, typename T, int VEC>
__global__ void __launch_bounds__(kGluThreads) glu_backward_kernel(const T* __restrict__ dout, const T* gate,
    const T* up, T* dgate, T* dup, int64_t rows, int64_t cols, int64_t dout_stride, int64_t gate_stride,
    int64_t up_stride, int64_t grad_stride) {
  const GluPosition<VEC> at(rows, cols);
  if (!at.inside) return;
  const auto d = Vec<T, VEC>::load(dout + at.row * dout_stride + at.col);
  const auto g = Vec<T, VEC>::load(gate + at.row * gate_stride + at.col);
  const auto u = Vec<T, VEC>::load(up + at.row * up_stride + at.col);
  Vec<T, VEC> gate_gradient, up_gradient;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const auto dy = widen(d.data[i]);
    Accumulate<T> value, slope;
    Activation::template value_and_slope<T>(widen(g.data[i]), value, slope);
    up_gradient.data[i] = narrow<T>(dy * value);
    gate_gradient.data[i] = narrow<T>(dy * widen(u.data[i]) * slope);
  }
  gate_gradient.store(dgate + at.row * grad_stride + at.col);
  up_gradient.store(dup + at.row * grad_stride + at.col);
}

}  // namespace liger::cuda
