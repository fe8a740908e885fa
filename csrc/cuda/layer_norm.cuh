#pragma once

// LayerNorm over rows (ops/layer_norm.h): n = (x - mean) * rstd, y = n * weight + bias.
//
// Forward: TPR threads own a row and keep it in registers, NV vectors of VEC elements each; rows of a warp
// share a block. The first reduction gives a center near the mean; the second, over d = x - center, the
// variance and what rounding left of the mean, so nothing cancels however large the mean is. Bytes: x read
// once, y written once.
//
// Backward: dx = rstd * (m - mean(m) - n * mean(m * n)) with m = dy * weight. One reduction gives the sums of
// m, m * d and d = x - mean, from which the three means follow. Each block of a grid that fits the GPU takes
// rows beside those of its neighbours (RowSteps). A row's threads take ROWS of them at a time, whose sums
// share a barrier, while the next are copied to shared memory (RowRing). Each thread keeps its columns' parts
// of dweight = sum(dy * n) and dbias = sum(dy) in registers, each block writes one row of partial sums of
// each, and column_sum_kernel adds those in order. Bytes: dy and x read once, dx written once, plus the
// partial sums, which stay in L2.
//
// Rows that are too wide for a block, and rows that vectors do not fit, are read again for every step:
// forward by layer_norm_forward_loop_kernel; backward first by rows for the means, then by columns, where
// nothing is left to reduce.
//
// Fixed order throughout: bitwise reproducible on a given GPU.

#include "cuda/common/column_sum.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/row_ring.cuh"
#include "cuda/common/vec.cuh"

namespace liger::cuda {

template <typename T, typename W>
struct LayerNormArguments {
  const T* x;
  const W* weight;  // or null
  const W* bias;    // or null
  T* y;
  Accumulate<T>* mean;
  Accumulate<T>* rstd;
  int64_t rows, x_stride;
  int cols;
  Accumulate<T> eps;
};

// What takes an element of a row to n = (x - mean) * rstd, with mean = center + correction and a correction
// near 0. Subtracted after the product, it costs no instruction.
template <typename A>
struct RowNormalizer {
  A center, correction, rstd, shift;

  __device__ __forceinline__ RowNormalizer(A center, A correction, A rstd)
      : center(center), correction(correction), rstd(rstd), shift(correction * rstd) {}
  __device__ __forceinline__ A operator()(A x) const { return (x - center) * rstd - shift; }
};

// From the sums over a row of d = x - center and of d * d.
template <typename A>
__device__ __forceinline__ RowNormalizer<A> row_normalizer(A center, const A (&sums)[2], int cols, A eps) {
  const A correction = sums[0] / static_cast<A>(cols);
  const A variance = sums[1] / static_cast<A>(cols) - correction * correction;
  // Rounding may leave a constant row a variance below 0. A NaN stays.
  return {center, correction, A(1) / sqrt((variance < 0 ? A(0) : variance) + eps)};
}

template <typename T, int VEC>
__device__ __forceinline__ Accumulate<T> sum_of(const Packed<T, VEC>& x) {
  Accumulate<T> sum = 0;
#pragma unroll
  for (int i = 0; i < VEC; ++i) sum += x[i];
  return sum;
}

template <typename T, int VEC>
__device__ __forceinline__ void add_differences(
    const Packed<T, VEC>& x, Accumulate<T> center, Accumulate<T> (&sums)[2]) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const auto difference = x[i] - center;
    sums[0] += difference;
    sums[1] += difference * difference;
  }
}

template <typename T, typename W, int VEC>
__device__ __forceinline__ void write_layer_norm(const LayerNormArguments<T, W>& args,
    const Packed<T, VEC>& x, const RowNormalizer<Accumulate<T>>& normalize, int64_t row, int col) {
  using A = Accumulate<T>;
  A weight[VEC], bias[VEC];
  load_wide_or<W, VEC>(args.weight, col, 1, weight);
  load_wide_or<W, VEC>(args.bias, col, 0, bias);
  A y[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) y[i] = normalize(x[i]) * weight[i] + bias[i];
  Packed<T, VEC>::narrowed(y).store(args.y + row * args.cols + col);
}

template <typename T, typename W>
__device__ __forceinline__ void write_statistics(
    const LayerNormArguments<T, W>& args, const RowNormalizer<Accumulate<T>>& normalize, int64_t row) {
  args.mean[row] = normalize.center + normalize.correction;
  args.rstd[row] = normalize.rstd;
}

template <typename T, typename W, int VEC, int NV, int TPR, int RPB>
__global__ void __launch_bounds__(TPR* RPB) layer_norm_forward_kernel(LayerNormArguments<T, W> args) {
  using A = Accumulate<T>;
  using V = Packed<T, VEC>;
  using Sum = RowSum<A, 1, TPR, RPB>;
  using Sum2 = RowSum<A, 2, TPR, RPB>;
  __shared__ typename Sum::Storage storage;
  __shared__ typename Sum2::Storage storage2;
  const int lane = threadIdx.x % TPR;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * RPB + threadIdx.x / TPR;
  if (row >= args.rows) return;  // all lanes of a row leave, and those of others do not wait for them
  const T* x = args.x + row * args.x_stride;

  V held[NV];
#pragma unroll
  for (int v = 0; v < NV; ++v) {
    const int col = (v * TPR + lane) * VEC;
    if (col < args.cols) held[v] = V::load(x + col);
  }
  A total = 0;
#pragma unroll
  for (int v = 0; v < NV; ++v) {
    if ((v * TPR + lane) * VEC < args.cols) total += sum_of(held[v]);
  }
  const A center = Sum(storage).all(total) / static_cast<A>(args.cols);
  A sums[2] = {};
#pragma unroll
  for (int v = 0; v < NV; ++v) {
    if ((v * TPR + lane) * VEC < args.cols) add_differences(held[v], center, sums);
  }
  Sum2(storage2).all(sums);
  const auto normalize = row_normalizer(center, sums, args.cols, args.eps);
  if (lane == 0) write_statistics(args, normalize, row);
#pragma unroll
  for (int v = 0; v < NV; ++v) {
    const int col = (v * TPR + lane) * VEC;
    if (col < args.cols) write_layer_norm(args, held[v], normalize, row, col);
  }
}

template <typename T, typename W, int VEC, int THREADS>
__global__ void __launch_bounds__(THREADS, 2) layer_norm_forward_loop_kernel(LayerNormArguments<T, W> args) {
  using A = Accumulate<T>;
  using V = Packed<T, VEC>;
  using Sum = RowSum<A, 1, THREADS, 1>;
  using Sum2 = RowSum<A, 2, THREADS, 1>;
  __shared__ typename Sum::Storage storage;
  __shared__ typename Sum2::Storage storage2;
  const int64_t row = blockIdx.x;
  const T* x = args.x + row * args.x_stride;
  A total = 0;
  for (int col = threadIdx.x * VEC; col < args.cols; col += THREADS * VEC) {
    total += sum_of(V::load(x + col));
  }
  const A center = Sum(storage).all(total) / static_cast<A>(args.cols);
  A sums[2] = {};
  for (int col = threadIdx.x * VEC; col < args.cols; col += THREADS * VEC) {
    add_differences(V::load(x + col), center, sums);
  }
  Sum2(storage2).all(sums);
  const auto normalize = row_normalizer(center, sums, args.cols, args.eps);
  if (threadIdx.x == 0) write_statistics(args, normalize, row);
  for (int col = threadIdx.x * VEC; col < args.cols; col += THREADS * VEC) {
    write_layer_norm(args, V::load(x + col), normalize, row, col);
  }
}

template <typename T, typename W>
struct LayerNormBackwardArguments {
  const T* dy;
  const T* x;
  const W* weight;  // or null
  const Accumulate<T>* mean;
  const Accumulate<T>* rstd;
  T* dx;                          // or null
  Accumulate<T>* partial_weight;  // [blocks, cols] or null
  Accumulate<T>* partial_bias;    // as partial_weight
  int64_t rows, dy_stride, x_stride;
  int cols;
};

// What a row's gradient needs: the correction of its mean, mean(m) and mean(m * n).
template <typename A>
struct RowMeans {
  A correction, m, mn;
};

// From the sums over a row of m, m * d and d, with d = x - mean.
template <typename A>
__device__ __forceinline__ RowMeans<A> row_means(const A* sums, A rstd, A inverse_size) {
  const A correction = sums[2] * inverse_size, m = sums[0] * inverse_size;
  return {correction, m, rstd * (sums[1] * inverse_size - correction * m)};
}

template <typename T, int VEC>
__device__ __forceinline__ void add_moments(const Packed<T, VEC>& dy, const Packed<T, VEC>& x,
    const Accumulate<T> (&weight)[VEC], Accumulate<T> mean, Accumulate<T>* sums) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const auto m = dy[i] * weight[i];
    const auto difference = x[i] - mean;
    sums[0] += m;
    sums[1] += m * difference;
    sums[2] += difference;
  }
}

// VEC columns of a row: adds dy * n to dweight, and writes dx where it is wanted.
template <typename T, typename W, int VEC>
__device__ __forceinline__ void write_layer_norm_gradient(const LayerNormBackwardArguments<T, W>& args,
    const Packed<T, VEC>& dy, const Packed<T, VEC>& x, const Accumulate<T> (&weight)[VEC],
    const RowNormalizer<Accumulate<T>>& normalize, const RowMeans<Accumulate<T>>& means, int64_t row, int col,
    Accumulate<T> (&dweight)[VEC]) {
  using A = Accumulate<T>;
  const A rstd = normalize.rstd, mean_m = rstd * means.m, mean_mn = rstd * means.mn;
  A dx[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const A gradient = dy[i];
    const A n = normalize(x[i]);
    dweight[i] += gradient * n;
    dx[i] = (gradient * weight[i] * rstd - mean_m) - n * mean_mn;
  }
  if (args.dx != nullptr) Packed<T, VEC>::narrowed(dx).store(args.dx + row * args.cols + col);
}

template <typename T, int NV, int TPR, int RPB, int ROWS>
using LayerNormRing = RowRing<T, 2, NV, TPR * RPB, ROWS>;

template <typename T, typename W, int NV, int TPR, int RPB, int ROWS, int BLOCKS_PER_SM>
__global__ void __launch_bounds__(TPR* RPB, BLOCKS_PER_SM)
    layer_norm_backward_kernel(LayerNormBackwardArguments<T, W> args) {
  using A = Accumulate<T>;
  constexpr int VEC = kVecSize<T>;
  using V = Packed<T, VEC>;
  using Sum = RowSum<A, 3 * ROWS, TPR, RPB>;
  constexpr int kStep = ROWS * RPB;
  // Wider rows leave no registers for these: they are read again, from L1 and from shared memory.
  constexpr bool kHold = NV <= 2;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ typename Sum::Storage storage;
  Sum sum(storage);
  LayerNormRing<T, NV, TPR, RPB, ROWS> ring(shared);
  const int lane = threadIdx.x % TPR;
  const auto column = [&](int v) { return (v * TPR + lane) * VEC; };
  const bool wants_n = args.dx != nullptr || args.partial_weight != nullptr;
  const A inverse_size = A(1) / static_cast<A>(args.cols);

  const RowSteps<kStep> steps(args.rows);
  // Where this thread's rows begin among those of a step.
  const int offset = threadIdx.x / TPR * ROWS;
  const auto fetch = [&](const RowRange& rows) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t row = rows.begin + offset + r;
      if (row >= rows.end) break;
#pragma unroll
      for (int v = 0; v < NV; ++v) {
        const int col = column(v);
        if (col >= args.cols) break;
        ring.fetch(r, 0, v, args.dy + row * args.dy_stride + col);
        ring.fetch(r, 1, v, args.x + row * args.x_stride + col);
      }
    }
    ring.commit();
  };
  const auto load_statistics = [&](const RowRange& rows, A(&mean)[ROWS], A(&rstd)[ROWS]) {
    const int64_t first = rows.begin + offset;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const bool mine = first + r < rows.end;
      mean[r] = mine ? args.mean[first + r] : A(0);
      rstd[r] = mine ? args.rstd[first + r] : A(0);
    }
  };

  RowRange rows = steps(0);
  fetch(rows);
  A mean[ROWS], rstd[ROWS];
  load_statistics(rows, mean, rstd);
  A held_weight[kHold ? NV : 1][VEC];
  if constexpr (kHold) {
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      if (column(v) < args.cols) load_wide_or<W, VEC>(args.weight, column(v), 1, held_weight[v]);
    }
  }
  A dweight[NV][VEC] = {};
  A dbias[NV][VEC] = {};

  for (int64_t step = 0; rows.begin < rows.end; ++step) {
    const int64_t first = rows.begin + offset;
    const RowRange next = steps(step + 1);
    ring.next();
    fetch(next);
    A next_mean[ROWS], next_rstd[ROWS];
    load_statistics(next, next_mean, next_rstd);
    ring.wait();
    V dy[ROWS][kHold ? NV : 1], x[ROWS][kHold ? NV : 1];
    A sums[3 * ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (first + r >= rows.end) break;
#pragma unroll
      for (int v = 0; v < NV; ++v) {
        if (column(v) >= args.cols) break;
        V& dy_held = dy[r][kHold ? v : 0];
        V& x_held = x[r][kHold ? v : 0];
        dy_held = ring(r, 0, v);
        x_held = ring(r, 1, v);
        A read_weight[VEC];
        if constexpr (!kHold) load_wide_or<W, VEC>(args.weight, column(v), 1, read_weight);
        add_moments(dy_held, x_held, kHold ? held_weight[kHold ? v : 0] : read_weight, mean[r], sums + 3 * r);
#pragma unroll
        for (int i = 0; i < VEC; ++i) dbias[v][i] += dy_held[i];
      }
    }
    if (wants_n) {
      sum.all(sums);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (first + r >= rows.end) break;
        const auto means = row_means(sums + 3 * r, rstd[r], inverse_size);
        const RowNormalizer<A> normalize = {mean[r], means.correction, rstd[r]};
#pragma unroll
        for (int v = 0; v < NV; ++v) {
          if (column(v) >= args.cols) break;
          A read_weight[VEC];
          if constexpr (!kHold) load_wide_or<W, VEC>(args.weight, column(v), 1, read_weight);
          write_layer_norm_gradient(args, kHold ? dy[r][kHold ? v : 0] : ring(r, 0, v),
              kHold ? x[r][kHold ? v : 0] : ring(r, 1, v), kHold ? held_weight[kHold ? v : 0] : read_weight,
              normalize, means, first + r, column(v), dweight[v]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      mean[r] = next_mean[r];
      rstd[r] = next_rstd[r];
    }
    rows = next;
  }
  allow_column_sum();
  write_partial_sums<TPR, RPB>(dweight, args.partial_weight, args.cols, shared);
  write_partial_sums<TPR, RPB>(dbias, args.partial_bias, args.cols, shared);
}

// The means of a row. A block owns a row.
template <typename T, typename W, int VEC, int THREADS>
__global__ void __launch_bounds__(THREADS, 2)
    layer_norm_backward_rows_kernel(LayerNormBackwardArguments<T, W> args, RowMeans<Accumulate<T>>* means) {
  using A = Accumulate<T>;
  using V = Packed<T, VEC>;
  using Sum = RowSum<A, 3, THREADS, 1>;
  __shared__ typename Sum::Storage storage;
  const int64_t row = blockIdx.x;
  const A mean = args.mean[row];
  A sums[3] = {};
  for (int col = threadIdx.x * VEC; col < args.cols; col += THREADS * VEC) {
    const V dy = V::load(args.dy + row * args.dy_stride + col);
    const V x = V::load(args.x + row * args.x_stride + col);
    A weight[VEC];
    load_wide_or<W, VEC>(args.weight, col, 1, weight);
    add_moments(dy, x, weight, mean, sums);
  }
  Sum(storage).all(sums);
  const auto result = row_means(sums, args.rstd[row], A(1) / static_cast<A>(args.cols));
  if (threadIdx.x == 0) means[row] = result;
}

// A block owns THREADS * VEC columns, blockIdx.x, of every gridDim.y-th row, and one row of each partial.
// Without means only dbias is wanted.
template <typename T, typename W, int VEC, int THREADS>
__global__ void __launch_bounds__(THREADS) layer_norm_backward_columns_kernel(
    LayerNormBackwardArguments<T, W> args, const RowMeans<Accumulate<T>>* means) {
  using A = Accumulate<T>;
  using V = Packed<T, VEC>;
  const int col = (blockIdx.x * THREADS + threadIdx.x) * VEC;
  if (col >= args.cols) return;
  A weight[VEC];
  load_wide_or<W, VEC>(args.weight, col, 1, weight);
  A dweight[VEC] = {}, dbias[VEC] = {};
  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
    const V dy = V::load(args.dy + row * args.dy_stride + col);
#pragma unroll
    for (int i = 0; i < VEC; ++i) dbias[i] += dy[i];
    if (means == nullptr) continue;
    const V x = V::load(args.x + row * args.x_stride + col);
    const RowMeans<A> of_row = means[row];
    const RowNormalizer<A> normalize = {args.mean[row], of_row.correction, args.rstd[row]};
    write_layer_norm_gradient(args, dy, x, weight, normalize, of_row, row, col, dweight);
  }
  const int64_t first = static_cast<int64_t>(blockIdx.y) * args.cols + col;
  if (args.partial_weight != nullptr) store_sums(dweight, args.partial_weight + first);
  if (args.partial_bias != nullptr) store_sums(dbias, args.partial_bias + first);
}

}  // namespace liger::cuda
