#pragma once

// Block-wide reductions in a fixed order (CUB), with the result in every thread.

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

// Sum over the lanes of a warp, in every lane.
template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

}  // namespace liger::cuda
