#pragma once

// Rotary position embedding of q and k in one launch (ops/rope.h).
//
// A block owns one token (batch and position). threadIdx.x owns VEC pairs of columns, so both inputs of each
// rotation sit in one thread: VEC columns of each half of the rotated width, or 2 VEC neighbouring columns.
// threadIdx.y walks the heads, q's and then k's, and reuses the cosines and sines it holds. Bytes: every
// element of q and k read and written once, cos and sin read once a token. No reductions: deterministic.

#include "cuda/common/vec.cuh"

namespace liger::cuda {

constexpr int kRopeThreads = 256;

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
  // Plane and batch strides are 0 where one plane or one row of the batch serves all.
  int64_t cos_plane, cos_batch, cos_position;
  int64_t sin_plane, sin_batch, sin_position;
  int second_plane, third_plane;  // the first pair of each; multiples of VEC
};

// Element i of the 2 VEC elements in low and high.
template <typename X, int VEC>
__device__ __forceinline__ X element(const X (&low)[VEC], const X (&high)[VEC], int i) {
  return i < VEC ? low[i] : high[i - VEC];
}

// The two columns of VEC pairs from `pair` on.
template <typename T, int VEC, bool INTERLEAVED>
struct Pairs {
  Vec<T, VEC> first, second;

  __device__ __forceinline__ static Pairs load(const T* x, int pair, int half) {
    Pairs p;
    if constexpr (!INTERLEAVED) {
      p.first = Vec<T, VEC>::load(x + pair);
      p.second = Vec<T, VEC>::load(x + half + pair);
    } else {
      const auto low = Vec<T, VEC>::load(x + 2 * pair), high = Vec<T, VEC>::load(x + 2 * pair + VEC);
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        p.first.data[i] = element(low.data, high.data, 2 * i);
        p.second.data[i] = element(low.data, high.data, 2 * i + 1);
      }
    }
    return p;
  }

  __device__ __forceinline__ void store(T* out, int pair, int half) const {
    if constexpr (!INTERLEAVED) {
      first.store(out + pair);
      second.store(out + half + pair);
    } else {
      Vec<T, VEC> low, high;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        low.data[i] = i % 2 == 0 ? first.data[i / 2] : second.data[i / 2];
        high.data[i] = (VEC + i) % 2 == 0 ? first.data[(VEC + i) / 2] : second.data[(VEC + i) / 2];
      }
      low.store(out + 2 * pair);
      high.store(out + 2 * pair + VEC);
    }
  }
};

// The cosines (or sines) at both columns of VEC pairs.
template <typename C, int VEC, bool INTERLEAVED>
__device__ __forceinline__ void load_angles(
    const C* angle, int pair, int half, Accumulate<C> (&first)[VEC], Accumulate<C> (&second)[VEC]) {
  if constexpr (!INTERLEAVED) {
    load_wide<C, VEC>(angle + pair, first);
    load_wide<C, VEC>(angle + half + pair, second);
  } else {
    Accumulate<C> low[VEC], high[VEC];
    load_wide<C, VEC>(angle + 2 * pair, low);
    load_wide<C, VEC>(angle + 2 * pair + VEC, high);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      first[i] = element(low, high, 2 * i);
      second[i] = element(low, high, 2 * i + 1);
    }
  }
}

// INVERSE applies the transposed rotation, which is the backward pass.
template <typename T, typename C, int VEC, bool INTERLEAVED, bool INVERSE>
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

  for (int pair = threadIdx.x * VEC; pair < half; pair += blockDim.x * VEC) {
    const int plane = (pair >= angles.second_plane) + (pair >= angles.third_plane);
    Accumulate<C> cos1[VEC], cos2[VEC], sin1[VEC], sin2[VEC];
    load_angles<C, VEC, INTERLEAVED>(cos + plane * angles.cos_plane, pair, half, cos1, cos2);
    load_angles<C, VEC, INTERLEAVED>(sin + plane * angles.sin_plane, pair, half, sin1, sin2);
    for (int head = threadIdx.y; head < q.heads + k.heads; head += blockDim.y) {
      const bool is_q = head < q.heads;
      const T* x = is_q ? q_in + head * q.x_head : k_in + (head - q.heads) * k.x_head;
      T* out = is_q ? q_out + head * q.out_head : k_out + (head - q.heads) * k.out_head;
      const auto in = Pairs<T, VEC, INTERLEAVED>::load(x, pair, half);
      Pairs<T, VEC, INTERLEAVED> result;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const A a = widen(in.first.data[i]), b = widen(in.second.data[i]);
        const A c1 = cos1[i], c2 = cos2[i], s1 = sin1[i], s2 = sin2[i];
        result.first.data[i] = narrow<T>(INVERSE ? a * c1 + b * s2 : a * c1 - b * s1);
        result.second.data[i] = narrow<T>(INVERSE ? b * c2 - a * s1 : b * c2 + a * s2);
      }
      result.store(out, pair, half);
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
