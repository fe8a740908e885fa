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

constexpr int kColumnSumWidth = 16;
constexpr int kColumnSumHeight = 16;
constexpr int kColumnSumLoads = 16;

// A [rows, cols] of partial sums and where their sum over rows goes, or nulls.
template <typename A, typename W>
struct PartialSums {
  const A* partial;
  W* out;
};

// out[col] = sum over rows of partial[row, col], of the first pair by the blocks at y = 0, of the second by
// those at y = 1. A block owns 16 columns; its rows of threads add every 16th partial row each, with sixteen
// loads under way and in as many sums, and all sums are added pairwise: rounding errors stay small.
//
// Launched as a programmatic dependent of the kernel that writes partial, it is in place when that ends.
template <typename A, typename W>
__global__ void __launch_bounds__(kColumnSumWidth* kColumnSumHeight)
    column_sum_kernel(PartialSums<A, W> first, PartialSums<A, W> second, int rows, int cols) {
  __shared__ A shared[kColumnSumHeight][kColumnSumWidth];
  const auto [partial, out] = blockIdx.y == 0 ? first : second;
  const int col = blockIdx.x * kColumnSumWidth + threadIdx.x;
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  A sums[kColumnSumLoads] = {};
  if (col < cols) {
    for (int start = threadIdx.y; start < rows; start += kColumnSumLoads * kColumnSumHeight) {
#pragma unroll
      for (int i = 0; i < kColumnSumLoads; ++i) {
        const int row = start + i * kColumnSumHeight;
        if (row < rows) sums[i] += partial[static_cast<int64_t>(row) * cols + col];
      }
    }
  }
#pragma unroll
  for (int half = kColumnSumLoads / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  shared[threadIdx.y][threadIdx.x] = sums[0];
  __syncthreads();
  if (threadIdx.y != 0 || col >= cols) return;
  A total[kColumnSumHeight];
#pragma unroll
  for (int y = 0; y < kColumnSumHeight; ++y) total[y] = shared[y][threadIdx.x];
#pragma unroll
  for (int half = kColumnSumHeight / 2; half > 0; half /= 2) {
#pragma unroll
    for (int y = 0; y < half; ++y) total[y] += total[y + half];
  }
  out[col] = narrow<W>(total[0]);
}

// A kernel that writes partial sums says that column_sum_kernel may be put in place. What the blocks write
// after it is visible there all the same.
__device__ __forceinline__ void allow_column_sum() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

}  // namespace liger::cuda
