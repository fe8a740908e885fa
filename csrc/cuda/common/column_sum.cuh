#pragma once

// Sums down the columns: gradients of vectors along the last dimension (the weight of a norm). Each block of
// a backward kernel leaves one row of partial sums; column_sum_kernel adds those in a fixed order.

#include "cuda/common/vec.cuh"

namespace liger::cuda {

// Writes a block's sums into its row of partial ([gridDim.x, cols], or null). The thread `lane` of the TPR
// threads of a row holds those of columns (v * TPR + lane) * VEC and the VEC - 1 after it; the sums of the
// RPB rows that share the block are added in their order.
template <typename A, int VEC, int NV, int TPR, int RPB>
__device__ __forceinline__ void write_partial_sums(const A (&sums)[NV][VEC], A* partial, int cols) {
  if (partial == nullptr) return;
  const int lane = threadIdx.x % TPR;
  A* out = partial + static_cast<int64_t>(blockIdx.x) * cols;
  if constexpr (RPB == 1) {
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      const int col = (v * TPR + lane) * VEC;
      if (col < cols) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) out[col + i] = sums[v][i];
      }
    }
  } else {
    __shared__ A shared[RPB][NV * TPR * VEC];
#pragma unroll
    for (int v = 0; v < NV; ++v) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) shared[threadIdx.x / TPR][(v * TPR + lane) * VEC + i] = sums[v][i];
    }
    __syncthreads();
    for (int col = threadIdx.x; col < cols; col += TPR * RPB) {
      A sum = 0;
#pragma unroll
      for (int r = 0; r < RPB; ++r) sum += shared[r][col];
      out[col] = sum;
    }
    __syncthreads();  // for a second call
  }
}

constexpr int kColumnSumWidth = 32;
constexpr int kColumnSumHeight = 16;

// out[col] = sum over rows of partial[row, col]. A block owns 32 columns; its rows of threads add every 16th
// partial row each, in four sums, and all sums are added pairwise: rounding errors stay small, and loads
// overlap.
template <typename A, typename W>
__global__ void __launch_bounds__(kColumnSumWidth* kColumnSumHeight)
    column_sum_kernel(const A* __restrict__ partial, W* __restrict__ out, int rows, int cols) {
  __shared__ A shared[kColumnSumHeight][kColumnSumWidth];
  const int col = blockIdx.x * kColumnSumWidth + threadIdx.x;
  A sums[4] = {};
  if (col < cols) {
    for (int first = threadIdx.y; first < rows; first += 4 * kColumnSumHeight) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first + i * kColumnSumHeight;
        if (row < rows) sums[i] += partial[static_cast<int64_t>(row) * cols + col];
      }
    }
  }
  shared[threadIdx.y][threadIdx.x] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
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

}  // namespace liger::cuda
