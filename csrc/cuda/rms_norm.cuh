#pragma once

// RMSNorm over rows (ops/rms_norm.h): rstd = 1 / sqrt(mean(x^2) + eps), n = x * rstd, y = n * (offset +
// weight).
//
// Forward: TPR threads own a row and keep it in registers between the reduction and the write, NV vectors of
// VEC elements each; rows of one warp share a block. Bytes: x read once, y written once.
//
// Backward: dx = rstd * (m - n * mean(m * n)) with m = dy * (offset + weight). A persistent grid walks the
// rows; each thread keeps its columns' part of dweight = sum(dy * n) in registers, each block writes one row
// of partial sums, and column_sum_kernel adds those in order. Bytes: dy and x read once, dx written once,
// plus the partial sums, which stay in L2. Fixed order throughout: bitwise reproducible on a given GPU.
//
// The *_any_kernel versions take every width and alignment: scalar accesses, each row read twice.

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"

namespace liger::cuda {

template <typename A>
__device__ __forceinline__ A reciprocal_sqrt(A x) {
  return A(1) / sqrt(x);
}

// Sum over the TPR threads that share a row. RPB rows share a block; a row is a warp, or the whole block.
template <typename A, int TPR, int RPB>
struct RowSum {
  static_assert(TPR == 32 || RPB == 1);
  struct NoStorage {};
  using Storage = std::conditional_t<TPR == 32, NoStorage, typename BlockSum<A, TPR>::Storage>;

  __device__ __forceinline__ static A all(Storage& storage, A value) {
    if constexpr (TPR == 32) {
      return warp_sum(value);
    } else {
      return BlockSum<A, TPR>::all(storage, value);
    }
  }
};

template <typename T, typename W>
struct RmsNormArguments {
  const T* x;
  const W* weight;  // or null
  T* y;
  Accumulate<T>* rstd;
  int64_t rows, x_stride;
  int cols;
  Accumulate<T> eps, offset;
  bool round_normalized;
};

template <typename T, typename W, int VEC, int NV, int TPR, int RPB>
__global__ void __launch_bounds__(TPR* RPB) rms_norm_forward_kernel(RmsNormArguments<T, W> args) {
  using A = Accumulate<T>;
  using Sum = RowSum<A, TPR, RPB>;
  __shared__ typename Sum::Storage storage;
  const int lane = threadIdx.x % TPR;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * RPB + threadIdx.x / TPR;
  if (row >= args.rows) return;  // whole warps leave: with RPB > 1 a row is a warp
  const T* x = args.x + row * args.x_stride;
  T* y = args.y + row * args.cols;

  Vec<T, VEC> held[NV];
  A squares = 0;
#pragma unroll
  for (int v = 0; v < NV; ++v) {
    const int col = (v * TPR + lane) * VEC;
    if (col < args.cols) held[v] = Vec<T, VEC>::load(x + col);
  }
#pragma unroll
  for (int v = 0; v < NV; ++v) {
    const int col = (v * TPR + lane) * VEC;
    if (col < args.cols) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const A value = widen(held[v].data[i]);
        squares += value * value;
      }
    }
  }
  const A mean = Sum::all(storage, squares) / static_cast<A>(args.cols);
  const A rstd = reciprocal_sqrt(mean + args.eps);
  if (lane == 0) args.rstd[row] = rstd;

#pragma unroll
  for (int v = 0; v < NV; ++v) {
    const int col = (v * TPR + lane) * VEC;
    if (col < args.cols) {
      A weight[VEC];
      if (args.weight != nullptr) load_wide<W, VEC>(args.weight + col, weight);
      Vec<T, VEC> out;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        A value = widen(held[v].data[i]) * rstd;
        if (args.round_normalized) value = rounded<T>(value);
        if (args.weight != nullptr) value *= args.offset + weight[i];
        out.data[i] = narrow<T>(value);
      }
      out.store(y + col);
    }
  }
}

template <typename T, typename W, int THREADS>
__global__ void __launch_bounds__(THREADS) rms_norm_forward_any_kernel(RmsNormArguments<T, W> args) {
  using A = Accumulate<T>;
  __shared__ typename BlockSum<A, THREADS>::Storage storage;
  const int64_t row = blockIdx.x;
  const T* x = args.x + row * args.x_stride;
  T* y = args.y + row * args.cols;
  A squares = 0;
  for (int col = threadIdx.x; col < args.cols; col += THREADS) {
    const A value = widen(x[col]);
    squares += value * value;
  }
  const A mean = BlockSum<A, THREADS>::all(storage, squares) / static_cast<A>(args.cols);
  const A rstd = reciprocal_sqrt(mean + args.eps);
  if (threadIdx.x == 0) args.rstd[row] = rstd;
  for (int col = threadIdx.x; col < args.cols; col += THREADS) {
    A value = widen(x[col]) * rstd;
    if (args.round_normalized) value = rounded<T>(value);
    if (args.weight != nullptr) value *= args.offset + static_cast<A>(widen(args.weight[col]));
    y[col] = narrow<T>(value);
  }
}

template <typename T, typename W>
struct RmsNormBackwardArguments {
  const T* dy;
  const T* x;
  const W* weight;  // or null
  const Accumulate<T>* rstd;
  T* dx;                   // or null
  Accumulate<T>* partial;  // [gridDim.x, cols] or null
  int64_t rows, dy_stride, x_stride;
  int cols;
  Accumulate<T> offset;
  bool round_normalized;
};

template <typename T, typename W, int VEC, int NV, int TPR, int RPB, int BLOCKS_PER_SM>
__global__ void __launch_bounds__(TPR* RPB, BLOCKS_PER_SM)
    rms_norm_backward_kernel(RmsNormBackwardArguments<T, W> args) {
  using A = Accumulate<T>;
  using Sum = RowSum<A, TPR, RPB>;
  __shared__ typename Sum::Storage storage;
  const int lane = threadIdx.x % TPR;
  A sums[NV][VEC] = {};

  const int64_t step = static_cast<int64_t>(gridDim.x) * RPB;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * RPB + threadIdx.x / TPR; row < args.rows;
      row += step) {
    const T* dy_row = args.dy + row * args.dy_stride;
    const T* x_row = args.x + row * args.x_stride;
    const A rstd = args.rstd[row];
    Vec<T, VEC> dy[NV], x[NV];
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      const int col = (v * TPR + lane) * VEC;
      if (col < args.cols) {
        dy[v] = Vec<T, VEC>::load(dy_row + col);
        x[v] = Vec<T, VEC>::load(x_row + col);
      }
    }
    A dot = 0;
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      const int col = (v * TPR + lane) * VEC;
      if (col < args.cols) {
        A weight[VEC];
        if (args.weight != nullptr) load_wide<W, VEC>(args.weight + col, weight);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          const A gradient = widen(dy[v].data[i]);
          const A n = widen(x[v].data[i]) * rstd;
          const A m = args.weight != nullptr ? gradient * (args.offset + weight[i]) : gradient;
          dot += m * n;
          sums[v][i] += gradient * (args.round_normalized ? rounded<T>(n) : n);
        }
      }
    }
    if (args.dx == nullptr) continue;
    const A mean = Sum::all(storage, dot) / static_cast<A>(args.cols);
    T* dx_row = args.dx + row * args.cols;
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      const int col = (v * TPR + lane) * VEC;
      if (col < args.cols) {
        A weight[VEC];  // again from L1: holding it would cost registers and so rows in flight
        if (args.weight != nullptr) load_wide<W, VEC>(args.weight + col, weight);
        Vec<T, VEC> out;
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          const A gradient = widen(dy[v].data[i]);
          const A n = widen(x[v].data[i]) * rstd;
          const A m = args.weight != nullptr ? gradient * (args.offset + weight[i]) : gradient;
          out.data[i] = narrow<T>(rstd * (m - n * mean));
        }
        out.store(dx_row + col);
      }
    }
  }

  if (args.partial == nullptr) return;
  A* partial = args.partial + static_cast<int64_t>(blockIdx.x) * args.cols;
  if constexpr (RPB == 1) {
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      const int col = (v * TPR + lane) * VEC;
      if (col < args.cols) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) partial[col + i] = sums[v][i];
      }
    }
  } else {
    // The warps' sums meet in shared memory and are added in warp order.
    __shared__ A shared[RPB][NV * TPR * VEC];
#pragma unroll
    for (int v = 0; v < NV; ++v) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) shared[threadIdx.x / TPR][(v * TPR + lane) * VEC + i] = sums[v][i];
    }
    __syncthreads();
    for (int col = threadIdx.x; col < args.cols; col += TPR * RPB) {
      A sum = 0;
#pragma unroll
      for (int r = 0; r < RPB; ++r) sum += shared[r][col];
      partial[col] = sum;
    }
  }
}

template <typename T, typename W, int THREADS>
__global__ void __launch_bounds__(THREADS) rms_norm_backward_any_kernel(RmsNormBackwardArguments<T, W> args) {
  using A = Accumulate<T>;
  __shared__ typename BlockSum<A, THREADS>::Storage storage;
  // A thread owns the same columns of every row, so it alone touches its entries of the partial sums.
  A* partial =
      args.partial == nullptr ? nullptr : args.partial + static_cast<int64_t>(blockIdx.x) * args.cols;
  if (partial != nullptr) {
    for (int col = threadIdx.x; col < args.cols; col += THREADS) partial[col] = 0;
  }
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const T* dy = args.dy + row * args.dy_stride;
    const T* x = args.x + row * args.x_stride;
    const A rstd = args.rstd[row];
    A dot = 0;
    for (int col = threadIdx.x; col < args.cols; col += THREADS) {
      const A gradient = widen(dy[col]);
      const A n = widen(x[col]) * rstd;
      const A scale = args.weight != nullptr ? args.offset + static_cast<A>(widen(args.weight[col])) : A(1);
      dot += gradient * scale * n;
      if (partial != nullptr) partial[col] += gradient * (args.round_normalized ? rounded<T>(n) : n);
    }
    if (args.dx == nullptr) continue;
    const A mean = BlockSum<A, THREADS>::all(storage, dot) / static_cast<A>(args.cols);
    T* dx = args.dx + row * args.cols;
    for (int col = threadIdx.x; col < args.cols; col += THREADS) {
      const A n = widen(x[col]) * rstd;
      const A scale = args.weight != nullptr ? args.offset + static_cast<A>(widen(args.weight[col])) : A(1);
      dx[col] = narrow<T>(rstd * (widen(dy[col]) * scale - n * mean));
    }
  }
}

constexpr int kColumnSumWidth = 32;
constexpr int kColumnSumHeight = 16;

// out[col] = sum over rows of partial[row, col]. A block owns 32 columns; its rows of threads add every 16th
// partial row each, and the 16 sums are added in order.
template <typename A, typename W>
__global__ void __launch_bounds__(kColumnSumWidth* kColumnSumHeight)
    column_sum_kernel(const A* __restrict__ partial, W* __restrict__ out, int rows, int cols) {
  __shared__ A shared[kColumnSumHeight][kColumnSumWidth];
  const int col = blockIdx.x * kColumnSumWidth + threadIdx.x;
  A sum = 0;
  if (col < cols) {
    for (int row = threadIdx.y; row < rows; row += kColumnSumHeight) {
      sum += partial[static_cast<int64_t>(row) * cols + col];
    }
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || col >= cols) return;
  A total = 0;
#pragma unroll
  for (int y = 0; y < kColumnSumHeight; ++y) total += shared[y][threadIdx.x];
  out[col] = narrow<W>(total);
}

}  // namespace liger::cuda
