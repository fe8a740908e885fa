#pragma once

// out = grad * scale with one factor on the device, the upstream gradient of a loss. A grid-stride loop over
// 16-byte vectors. In place, a factor of 1 leaves after reading the factor: the usual backward pass of a loss
// moves nothing. Otherwise every element is read and written once.

#include "cuda/common/vec.cuh"

namespace liger::cuda {

constexpr int kScaleThreads = 256;

template <typename T, int VEC>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(const T* grad, const Accumulate<T>* scale, T* out, int64_t size) {
  const Accumulate<T> factor = *scale;
  if (out == grad && factor == 1) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kScaleThreads * VEC;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x) * VEC; i < size;
      i += step) {
    const auto in = Vec<T, VEC>::load(grad + i);
    Vec<T, VEC> result;
#pragma unroll
    for (int j = 0; j < VEC; ++j) result.data[j] = narrow<T>(widen(in.data[j]) * factor);
    result.store(out + i);
  }
}

}  // namespace liger::cuda
