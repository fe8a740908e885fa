#pragma once

// Reductions in a fixed order, with the result in every thread.

#include <cub/block/block_reduce.cuh>

namespace liger::cuda {

// Sum over a block of THREADS threads; bitwise the same from run to run. Two barriers a call; the storage may
// be reused at once.
template <typename A, int THREADS>
struct BlockSum {
  using Reduce = cub::BlockReduce<A, THREADS, cub::BLOCK_REDUCE_WARP_REDUCTIONS>;

  struct Storage {
    typename Reduce::TempStorage reduce;
    A total;
  };

  __device__ __forceinline__ static A all(Storage& storage, A value) {
    const A total = Reduce(storage.reduce).Sum(value);
    if (threadIdx.x == 0) storage.total = total;
    // Publishes the total, and keeps a following call from overwriting `reduce` while it is still read.
    __syncthreads();
    const A result = storage.total;
    // Keeps thread 0 of a following call from overwriting `total` before every thread has read it.
    __syncthreads();
    return result;
  }
};

// N numbers, or tuples of numbers, that are summed at once.
template <typename V, int N>
struct Tuple {
  V data[N];
};

// Sum over WIDTH neighbouring lanes of a warp, in each of them. `lanes` are those that take part.
template <int WIDTH = 32, typename A>
__device__ __forceinline__ A warp_sum(A value, unsigned int lanes = 0xffffffffu) {
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(lanes, value, offset);
  return value;
}
template <int WIDTH = 32, typename V, int N>
__device__ __forceinline__ Tuple<V, N> warp_sum(Tuple<V, N> value, unsigned int lanes = 0xffffffffu) {
#pragma unroll
  for (int i = 0; i < N; ++i) value.data[i] = warp_sum<WIDTH>(value.data[i], lanes);
  return value;
}

// Sum over the TPR threads that share a row, in each of them and in a fixed order. RPB rows share a block; a
// row is half a warp, a warp, or the whole block. V is a number or a Tuple.
//
// One barrier a call: two buffers alternate, so a thread that runs ahead writes where nobody reads any more
// (whoever reads the sums of the call before last would not have passed the last call's barrier).
template <typename V, int TPR, int RPB>
class RowSum {
  static_assert(TPR == 16 || TPR == 32 || RPB == 1);
  static constexpr int kWarps = TPR < 32 ? 1 : TPR / 32;
  static_assert(kWarps <= 32 && (kWarps & (kWarps - 1)) == 0);

 public:
  struct Storage {
    V warps[2][kWarps];
  };

  __device__ __forceinline__ explicit RowSum(Storage& storage) : storage_(storage) {}

  __device__ __forceinline__ V all(V value) {
    if constexpr (TPR < 32) {
      // The halves of a warp may have different numbers of rows, so each waits for its own lanes alone.
      constexpr unsigned int kLanes = (1u << TPR) - 1;
      return warp_sum<TPR>(value, kLanes << (threadIdx.x % 32 / TPR * TPR));
    }
    value = warp_sum(value);
    if constexpr (kWarps > 1) {
      V* warps = storage_.warps[buffer_];
      buffer_ ^= 1;
      if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
      __syncthreads();
      value = warp_sum<kWarps>(warps[threadIdx.x % kWarps]);
    }
    return value;
  }

 private:
  Storage& storage_;
  int buffer_ = 0;
};

}  // namespace liger::cuda
