#pragma once

// Sums down the columns: gradients of vectors along the last dimension (the weight of a norm). Each block of
// a backward kernel leaves one row of partial sums; column_sum_kernel adds those in a fixed order.

#include "cuda/common/vec.cuh"

namespace liger::cuda {

// Writes VEC sums as 16-byte vectors: columns of a row of partial that is wide enough for whole vectors.
template <typename A, int VEC>
__device__ __forceinline__ void store_sums(const A (&sums)[VEC], A* to) {
  constexpr int kChunk = sizeof(A) * VEC > 16 ? 16 / sizeof(A) : VEC;
#pragma unroll
  for (int i = 0; i < VEC; i += kChunk) {
    Vec<A, kChunk> out;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) out.data[j] = sums[i + j];
    out.store(to + i);
  }
}

// Writes a block's sums into its row of partial ([gridDim.x, cols], or null). The thread `lane` of the TPR
// threads of a row holds those of columns (v * TPR + lane) * VEC and the VEC - 1 after it. Where RPB rows
// share the block, their sums are added in their order through `shared`: RPB * NV * TPR * VEC numbers,
// overwritten once all threads are here.
template <int TPR, int RPB, typename A, int VEC, int NV>
__device__ __forceinline__ void write_partial_sums(
    const A (&sums)[NV][VEC], A* partial, int cols, unsigned char* shared) {
  if (partial == nullptr) return;
  const int lane = threadIdx.x % TPR;
  A* out = partial + static_cast<int64_t>(blockIdx.x) * cols;
  if constexpr (RPB == 1) {
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      const int col = (v * TPR + lane) * VEC;
      if (col < cols) store_sums(sums[v], out + col);
    }
  } else {
    constexpr int kWidth = NV * TPR * VEC;
    A* of_rows = reinterpret_cast<A*>(shared);
    __syncthreads();
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      store_sums(sums[v], of_rows + threadIdx.x / TPR * kWidth + (v * TPR + lane) * VEC);
    }
    __syncthreads();
    for (int col = threadIdx.x; col < cols; col += TPR * RPB) {
      A sum = 0;
#pragma unroll
      for (int r = 0; r < RPB; ++r) sum += of_rows[r * kWidth + col];
      out[col] = sum;
    }
  }
}

// Threads of a block side by side, each with one vector of columns, and on top of each other.
constexpr int kColumnSumLanes = 8;
constexpr int kColumnSumHeight = 32;
// Loads that a thread has under way: partial rows of 192 blocks, one to each multiprocessor or more, at once.
constexpr int kColumnSumLoads = 6;

// A [rows, cols] of partial sums and where their sum over rows goes, or nulls.
template <typename A, typename W>
struct PartialSums {
  const A* partial;
  W* out;
};

// sums[0] becomes the sum of all, pairwise: rounding errors stay small.
template <int N, typename V, typename Add>
__device__ __forceinline__ void add_pairwise(V (&sums)[N], const Add& add) {
#pragma unroll
  for (int step = 1; step < N; step *= 2) {
#pragma unroll
    for (int i = 0; i + step < N; i += 2 * step) add(sums[i], sums[i + step]);
  }
}

// out[col] = sum over rows of partial[row, col], of the first pair by the blocks at y = 0, of the second by
// those at y = 1. A block owns the columns of kColumnSumLanes vectors; its rows of threads add every
// kColumnSumHeight-th partial row each. Blocks are few enough to be in place, and to have all their loads
// under way, at once: launched as a programmatic dependent of the kernel that writes partial, this one takes
// little more than the wait for its end and for one load.
template <typename A, typename W, int VEC>
__global__ void __launch_bounds__(kColumnSumLanes* kColumnSumHeight, 2)
    column_sum_kernel(PartialSums<A, W> first, PartialSums<A, W> second, int rows, int cols) {
  constexpr int kWidth = kColumnSumLanes * VEC;
  __shared__ __align__(16) A shared[kColumnSumHeight][kWidth];
  const auto [partial, out] = blockIdx.y == 0 ? first : second;
  const int lane = threadIdx.x % kColumnSumLanes, height = threadIdx.x / kColumnSumLanes;
  const int col = blockIdx.x * kWidth + lane * VEC;
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  A sums[kColumnSumLoads][VEC] = {};
  if (col < cols) {
    for (int start = height; start < rows; start += kColumnSumLoads * kColumnSumHeight) {
      // No addition before the last load: a branch between them would have each wait for the one before.
      Vec<A, VEC> held[kColumnSumLoads] = {};
#pragma unroll
      for (int i = 0; i < kColumnSumLoads; ++i) {
        const int row = start + i * kColumnSumHeight;
        if (row < rows) held[i] = Vec<A, VEC>::load(partial + static_cast<int64_t>(row) * cols + col);
      }
#pragma unroll
      for (int i = 0; i < kColumnSumLoads; ++i) {
#pragma unroll
        for (int j = 0; j < VEC; ++j) sums[i][j] += held[i].data[j];
      }
    }
  }
  add_pairwise(sums, [](A(&to)[VEC], const A(&from)[VEC]) {
#pragma unroll
    for (int j = 0; j < VEC; ++j) to[j] += from[j];
  });
  store_sums(sums[0], &shared[height][lane * VEC]);
  __syncthreads();
  const int own = blockIdx.x * kWidth + threadIdx.x;
  if (threadIdx.x >= kWidth || own >= cols) return;
  A total[kColumnSumHeight];
#pragma unroll
  for (int i = 0; i < kColumnSumHeight; ++i) total[i] = shared[i][threadIdx.x];
  add_pairwise(total, [](A& to, A from) { to += from; });
  out[own] = narrow<W>(total[0]);
}

// A kernel that writes partial sums says that column_sum_kernel may be put in place. What the blocks write
// after it is visible there all the same.
__device__ __forceinline__ void allow_column_sum() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

}  // namespace liger::cuda
