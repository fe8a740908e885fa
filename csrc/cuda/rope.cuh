#pragma once

// Rotary position embedding of q and k in one launch (ops/rope.h).
//
// A thread owns VEC pairs of columns of one head of one token, so that both inputs of a rotation sit in one
// thread: VEC columns of each half of the rotated width, or 2 VEC neighbouring columns. There are no loops:
// with all loads issued at once and 40 to 48 registers a thread, five or six blocks a multiprocessor keep
// memory busy. Bytes: every element of q and k read and written once; the heads of a token, neighbours in a
// block, find its cosines and sines in L1. No reductions: deterministic.

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

// Pairs of columns are counted in 32 bits. With vectors, more would not fit into any GPU's memory.
template <int VEC>
using RopeIndex = std::conditional_t<VEC == 1, uint64_t, uint32_t>;

template <int VEC>
struct RopeShape {
  RopeIndex<VEC> units;  // threads that have work: tokens * heads * lanes
  RopeIndex<VEC> positions;
  int lanes;          // threads of a head
  int rotated_lanes;  // of these, the first ones rotate; the others copy 2 VEC columns each beyond the
                      // rotated width
  int half;           // pairs of a head
  int head_dim;
};

// The 2 VEC columns of a thread, or their cosines or sines. Pair i is columns first(i) and second(i).
template <typename T, int VEC, bool INTERLEAVED>
struct Pairs {
  Packed<T, VEC> columns[2];

  __device__ __forceinline__ static Pairs load(const T* x, int pair, int half) {
    if constexpr (INTERLEAVED) {
      return {{Packed<T, VEC>::load(x + 2 * pair), Packed<T, VEC>::load(x + 2 * pair + VEC)}};
    } else {
      return {{Packed<T, VEC>::load(x + pair), Packed<T, VEC>::load(x + half + pair)}};
    }
  }

  __device__ __forceinline__ void store(T* out, int pair, int half) const {
    columns[0].store(out + (INTERLEAVED ? 2 * pair : pair));
    columns[1].store(out + (INTERLEAVED ? 2 * pair + VEC : half + pair));
  }

  __device__ __forceinline__ Accumulate<T> operator[](int column) const {
    return columns[column / VEC][column % VEC];
  }

  __device__ __forceinline__ static constexpr int first(int i) { return INTERLEAVED ? 2 * i : i; }
  __device__ __forceinline__ static constexpr int second(int i) { return INTERLEAVED ? 2 * i + 1 : VEC + i; }
};

// Blocks that a multiprocessor is to hold: as many as leave the threads enough registers for all their loads.
template <typename T, typename C>
constexpr int kRopeBlocks = sizeof(C) != sizeof(T) || sizeof(T) > 4 ? 4
    : sizeof(T) == 4                                                ? 5
                                                                    : 6;

// INVERSE applies the transposed rotation, which is the backward pass.
template <typename T, typename C, int VEC, bool INTERLEAVED, bool INVERSE>
__global__ void __launch_bounds__(kRopeThreads, kRopeBlocks<T, C>)
    rope_kernel(RopeTensor<T> q, RopeTensor<T> k, RopeAngles<C> angles, RopeShape<VEC> shape) {
  using A = Accumulate<T>;
  using Columns = Pairs<T, VEC, INTERLEAVED>;
  using Angles = Pairs<C, VEC, INTERLEAVED>;
  using Index = RopeIndex<VEC>;
  const Index unit = static_cast<Index>(blockIdx.x) * kRopeThreads + threadIdx.x;
  if (unit >= shape.units) return;
  const int of_token = (q.heads + k.heads) * shape.lanes;
  const Index token = unit / of_token;
  const int lane_of_token = static_cast<int>(unit - token * of_token);
  const int head = lane_of_token / shape.lanes, lane = lane_of_token - head * shape.lanes;
  const Index batch_index = token / shape.positions;
  const int64_t batch = batch_index, position = token - batch_index * shape.positions;
  const bool is_q = head < q.heads;
  const int64_t head_of_tensor = is_q ? head : head - q.heads;
  const auto& tensor = is_q ? q : k;
  const T* x =
      tensor.x + batch * tensor.x_batch + position * tensor.x_position + head_of_tensor * tensor.x_head;
  T* out = tensor.out + batch * tensor.out_batch + position * tensor.out_position +
      head_of_tensor * tensor.out_head;

  if (lane >= shape.rotated_lanes) {
    const int start = 2 * (shape.half + (lane - shape.rotated_lanes) * VEC);
    const int end = min(start + 2 * VEC, shape.head_dim);
    if (VEC > 1 && start + 2 * VEC == end) {
      const auto low = Vec<T, VEC>::load(x + start), high = Vec<T, VEC>::load(x + start + VEC);
      low.store(out + start);
      high.store(out + start + VEC);
    } else {
      for (int col = start; col < end; ++col) out[col] = x[col];
    }
    return;
  }
  const int pair = lane * VEC;
  const auto in = Columns::load(x, pair, shape.half);
  const int plane = (pair >= angles.second_plane) + (pair >= angles.third_plane);
  const auto cos = Angles::load(
      angles.cos + plane * angles.cos_plane + batch * angles.cos_batch + position * angles.cos_position, pair,
      shape.half);
  const auto sin = Angles::load(
      angles.sin + plane * angles.sin_plane + batch * angles.sin_batch + position * angles.sin_position, pair,
      shape.half);
  A rotated[2][VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    constexpr auto first = Columns::first, second = Columns::second;
    const A a = in[first(i)], b = in[second(i)];
    const A c1 = cos[first(i)], c2 = cos[second(i)], s1 = sin[first(i)], s2 = sin[second(i)];
    rotated[first(i) / VEC][first(i) % VEC] = INVERSE ? a * c1 + b * s2 : a * c1 - b * s1;
    rotated[second(i) / VEC][second(i) % VEC] = INVERSE ? b * c2 - a * s1 : b * c2 + a * s2;
  }
  Columns{{Packed<T, VEC>::narrowed(rotated[0]), Packed<T, VEC>::narrowed(rotated[1])}}.store(
      out, pair, shape.half);
}

}  // namespace liger::cuda
