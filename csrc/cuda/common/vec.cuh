#pragma once

// Element types, conversions and 16-byte vectors.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace liger::cuda {

// float for 16-bit and float32 elements, double for float64.
template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(Accumulate<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// x rounded to T, as storing and loading it would.
template <typename T>
__device__ __forceinline__ Accumulate<T> rounded(Accumulate<T> x) {
  return widen(narrow<T>(x));
}

// N elements, loaded and stored at once; the address is a multiple of the size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T data[N];

  __device__ __forceinline__ static Vec load(const T* from) { return *reinterpret_cast<const Vec*>(from); }
  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<Vec*>(to) = *this; }
};

// W beside T may be wider (a float32 weight with bf16 activations): N elements as 16-byte loads.
template <typename T, int N>
__device__ __forceinline__ void load_wide(const T* from, Accumulate<T> (&to)[N]) {
  constexpr int kChunk = sizeof(T) * N > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int i = 0; i < N; i += kChunk) {
    const auto vec = Vec<T, kChunk>::load(from + i);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) to[i + j] = widen(vec.data[j]);
  }
}

// The N elements of `from` at `col`, or N times `absent` where from is null.
template <typename T, int N>
__device__ __forceinline__ void load_wide_or(
    const T* from, int col, Accumulate<T> absent, Accumulate<T> (&to)[N]) {
  if (from != nullptr) {
    load_wide<T, N>(from + col, to);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = absent;
  }
}

template <typename T>
constexpr int kVecSize = 16 / sizeof(T);

}  // namespace liger::cuda
