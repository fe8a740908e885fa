#pragma once

// Rotary position embedding of q and k in one launch (ops/rope.h).
//
// A block owns one token (batch and position). threadIdx.x owns VEC columns of the first half of the rotated
// width and the VEC columns half a width further, so both inputs of each rotation sit in one thread;
// threadIdx.y walks the heads, q's and then k's, and reuses the cosines and sines it holds. Bytes: every
// element of q and k read and written once, cos and sin read once a token. No reductions: deterministic.

#include "cuda/common/vec.cuh"

namespace liger::cuda {

constexpr int kRopeThreads = 128;

// The strides are in elements; the last dimension of x and out has stride 1.
template <typename T>
struct RopeTensor {
  const T* x;
  T* out;
  int heads;
  int64_t x_batch, x_head, x_position;
  int64_t out_batch, out_head, out_position;
};

template <typename C>
struct RopeAngles {
  const C* cos;
  const C* sin;
  int64_t cos_batch, cos_position;  // batch strides are 0 when shared by the batch
  int64_t sin_batch, sin_position;
};

// INVERSE applies the transposed rotation, which is the backward pass.
template <typename T, typename C, int VEC, bool INVERSE>
__global__ void __launch_bounds__(kRopeThreads) rope_kernel(
    RopeTensor<T> q, RopeTensor<T> k, RopeAngles<C> angles, int64_t positions, int head_dim, int rotary_dim) {
  using A = Accumulate<T>;
  const int64_t batch = blockIdx.x / positions;
  const int64_t position = blockIdx.x - batch * positions;
  const int half = rotary_dim / 2;
  const C* cos = angles.cos + batch * angles.cos_batch + position * angles.cos_position;
  const C* sin = angles.sin + batch * angles.sin_batch + position * angles.sin_position;
  const T* q_in = q.x + batch * q.x_batch + position * q.x_position;
  const T* k_in = k.x + batch * k.x_batch + position * k.x_position;
  T* q_out = q.out + batch * q.out_batch + position * q.out_position;
  T* k_out = k.out + batch * k.out_batch + position * k.out_position;

  for (int col = threadIdx.x * VEC; col < half; col += blockDim.x * VEC) {
    Accumulate<C> cos1[VEC], cos2[VEC], sin1[VEC], sin2[VEC];
    load_wide<C, VEC>(cos + col, cos1);
    load_wide<C, VEC>(cos + half + col, cos2);
    load_wide<C, VEC>(sin + col, sin1);
    load_wide<C, VEC>(sin + half + col, sin2);
    for (int head = threadIdx.y; head < q.heads + k.heads; head += blockDim.y) {
      const bool is_q = head < q.heads;
      const T* x = is_q ? q_in + head * q.x_head : k_in + (head - q.heads) * k.x_head;
      T* out = is_q ? q_out + head * q.out_head : k_out + (head - q.heads) * k.out_head;
      const auto x1 = Vec<T, VEC>::load(x + col);
      const auto x2 = Vec<T, VEC>::load(x + half + col);
      Vec<T, VEC> y1, y2;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const A a = widen(x1.data[i]), b = widen(x2.data[i]);
        const A c1 = cos1[i], c2 = cos2[i], s1 = sin1[i], s2 = sin2[i];
        y1.data[i] = narrow<T>(INVERSE ? a * c1 + b * s2 : a * c1 - b * s1);
        y2.data[i] = narrow<T>(INVERSE ? b * c2 - a * s1 : b * c2 + a * s2);
      }
      y1.store(out + col);
      y2.store(out + half + col);
    }
  }

  // Columns beyond the rotated width pass through.
  for (int head = threadIdx.y; head < q.heads + k.heads; head += blockDim.y) {
    const bool is_q = head < q.heads;
    const T* x = is_q ? q_in + head * q.x_head : k_in + (head - q.heads) * k.x_head;
    T* out = is_q ? q_out + head * q.out_head : k_out + (head - q.heads) * k.out_head;
    for (int col = rotary_dim + threadIdx.x; col < head_dim; col += blockDim.x) out[col] = x[col];
  }
}

}  // namespace liger::cuda
