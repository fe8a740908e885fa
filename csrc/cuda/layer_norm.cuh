#pragma once

// LayerNorm over rows (ops/layer_norm.h): n = (x - mean) * rstd, y = n * weight + bias.
//
// Forward: TPR threads own a row and keep it in registers, NV vectors of VEC elements each; rows of a warp
// share a block. The first reduction gives a center near the mean; the second, over d = x - center, the
// variance and what rounding left of the mean, so nothing cancels however large the mean is. Bytes: x read
// once, y written once.
//
// Backward: dx = rstd * (m - mean(m) - n * mean(m * n)) with m = dy * weight. One reduction gives the sums of
// m, m * d and d = x - mean, from which the three means follow. A persistent grid walks the rows; each thread
// keeps its columns' parts of dweight = sum(dy * n) and dbias = sum(dy) in registers, each block writes one
// row of partial sums of each, and column_sum_kernel adds those in order. Bytes: dy and x read once, dx
// written once, plus the partial sums, which stay in L2.
//
// Rows wider than the registers of a block, and rows that vectors do not fit, are read again for every step:
// forward by layer_norm_forward_loop_kernel; backward first by rows for the means, then by columns, where
// nothing is left to reduce.
//
// Fixed order throughout: bitwise reproducible on a given GPU.

#include "cuda/common/column_sum.cuh"
#include "cuda/common/reduce.cuh"
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

// What takes an element of a row to n: ((x - center) - correction) * rstd, with a correction near 0.
template <typename A>
struct RowNormalizer {
  A center, correction, rstd;

  __device__ __forceinline__ A operator()(A x) const { return ((x - center) - correction) * rstd; }
};

// From the sums over a row of d = x - center and of d * d.
template <typename A>
__device__ __forceinline__ RowNormalizer<A> row_normalizer(A center, Tuple<A, 2> sums, int cols, A eps) {
  const A correction = sums.data[0] / static_cast<A>(cols);
  const A variance = sums.data[1] / static_cast<A>(cols) - correction * correction;
  // Rounding may leave a constant row a variance below 0. A NaN stays.
  return {center, correction, A(1) / sqrt((variance < 0 ? A(0) : variance) + eps)};
}

template <typename T, int VEC>
__device__ __forceinline__ Accumulate<T> sum_of(const Vec<T, VEC>& x) {
  Accumulate<T> sum = 0;
#pragma unroll
  for (int i = 0; i < VEC; ++i) sum += widen(x.data[i]);
  return sum;
}

template <typename T, int VEC>
__device__ __forceinline__ void add_differences(
    const Vec<T, VEC>& x, Accumulate<T> center, Tuple<Accumulate<T>, 2>& sums) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const auto difference = widen(x.data[i]) - center;
    sums.data[0] += difference;
    sums.data[1] += difference * difference;
  }
}

template <typename T, typename W, int VEC>
__device__ __forceinline__ void write_layer_norm(const LayerNormArguments<T, W>& args, const Vec<T, VEC>& x,
    const RowNormalizer<Accumulate<T>>& normalize, int64_t row, int col) {
  using A = Accumulate<T>;
  A weight[VEC], bias[VEC];
  load_wide_or<W, VEC>(args.weight, col, 1, weight);
  load_wide_or<W, VEC>(args.bias, col, 0, bias);
  Vec<T, VEC> out;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    out.data[i] = narrow<T>(normalize(widen(x.data[i])) * weight[i] + bias[i]);
  }
  out.store(args.y + row * args.cols + col);
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
  using V = Vec<T, VEC>;
  using Sum = RowSum<A, TPR, RPB>;
  using Sum2 = RowSum<Tuple<A, 2>, TPR, RPB>;
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
  Tuple<A, 2> sums = {};
#pragma unroll
  for (int v = 0; v < NV; ++v) {
    if ((v * TPR + lane) * VEC < args.cols) add_differences(held[v], center, sums);
  }
  const auto normalize = row_normalizer(center, Sum2(storage2).all(sums), args.cols, args.eps);
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
  using V = Vec<T, VEC>;
  using Sum = RowSum<A, THREADS, 1>;
  using Sum2 = RowSum<Tuple<A, 2>, THREADS, 1>;
  __shared__ typename Sum::Storage storage;
  __shared__ typename Sum2::Storage storage2;
  const int64_t row = blockIdx.x;
  const T* x = args.x + row * args.x_stride;
  A total = 0;
  for (int col = threadIdx.x * VEC; col < args.cols; col += THREADS * VEC) {
    total += sum_of(V::load(x + col));
  }
  const A center = Sum(storage).all(total) / static_cast<A>(args.cols);
  Tuple<A, 2> sums = {};
  for (int col = threadIdx.x * VEC; col < args.cols; col += THREADS * VEC) {
    add_differences(V::load(x + col), center, sums);
  }
  const auto normalize = row_normalizer(center, Sum2(storage2).all(sums), args.cols, args.eps);
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
__device__ __forceinline__ RowMeans<A> row_means(Tuple<A, 3> sums, A rstd, int cols) {
  const A size = static_cast<A>(cols);
  const A correction = sums.data[2] / size, m = sums.data[0] / size;
  return {correction, m, rstd * (sums.data[1] / size - correction * m)};
}

template <typename T, int VEC>
__device__ __forceinline__ void add_moments(const Vec<T, VEC>& dy, const Vec<T, VEC>& x,
    const Accumulate<T> (&weight)[VEC], Accumulate<T> mean, Tuple<Accumulate<T>, 3>& sums) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const auto m = widen(dy.data[i]) * weight[i];
    const auto difference = widen(x.data[i]) - mean;
    sums.data[0] += m;
    sums.data[1] += m * difference;
    sums.data[2] += difference;
  }
}

// VEC columns of a row: adds dy * n to dweight, and writes dx where it is wanted.
template <typename T, typename W, int VEC>
__device__ __forceinline__ void write_layer_norm_gradient(const LayerNormBackwardArguments<T, W>& args,
    const Vec<T, VEC>& dy, const Vec<T, VEC>& x, const Accumulate<T> (&weight)[VEC],
    const RowNormalizer<Accumulate<T>>& normalize, const RowMeans<Accumulate<T>>& means, int64_t row, int col,
    Accumulate<T> (&dweight)[VEC]) {
  using A = Accumulate<T>;
  Vec<T, VEC> out;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const A gradient = widen(dy.data[i]);
    const A n = normalize(widen(x.data[i]));
    dweight[i] += gradient * n;
    out.data[i] = narrow<T>(normalize.rstd * ((gradient * weight[i] - means.m) - n * means.mn));
  }
  if (args.dx != nullptr) out.store(args.dx + row * args.cols + col);
}

template <typename T, typename W, int VEC, int NV, int TPR, int RPB, int BLOCKS_PER_SM>
__global__ void __launch_bounds__(TPR* RPB, BLOCKS_PER_SM)
    layer_norm_backward_kernel(LayerNormBackwardArguments<T, W> args) {
  using A = Accumulate<T>;
  using V = Vec<T, VEC>;
  using Sum = RowSum<Tuple<A, 3>, TPR, RPB>;
  __shared__ typename Sum::Storage storage;
  Sum sum(storage);
  const int lane = threadIdx.x % TPR;
  A dweight[NV][VEC] = {};
  A dbias[NV][VEC] = {};

  const int64_t step = static_cast<int64_t>(gridDim.x) * RPB;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * RPB + threadIdx.x / TPR; row < args.rows;
      row += step) {
    const T* dy_row = args.dy + row * args.dy_stride;
    const T* x_row = args.x + row * args.x_stride;
    const A mean = args.mean[row], rstd = args.rstd[row];
    V dy[NV], x[NV];
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      const int col = (v * TPR + lane) * VEC;
      if (col < args.cols) {
        dy[v] = V::load(dy_row + col);
        x[v] = V::load(x_row + col);
      }
    }
    Tuple<A, 3> sums = {};
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      const int col = (v * TPR + lane) * VEC;
      if (col < args.cols) {
        A weight[VEC];
        load_wide_or<W, VEC>(args.weight, col, 1, weight);
        add_moments(dy[v], x[v], weight, mean, sums);
#pragma unroll
        for (int i = 0; i < VEC; ++i) dbias[v][i] += widen(dy[v].data[i]);
      }
    }
    if (args.dx == nullptr && args.partial_weight == nullptr) continue;
    const auto means = row_means(sum.all(sums), rstd, args.cols);
    const RowNormalizer<A> normalize = {mean, means.correction, rstd};
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      const int col = (v * TPR + lane) * VEC;
      if (col < args.cols) {
        A weight[VEC];  // again from L1: holding it would cost registers and so rows in flight
        load_wide_or<W, VEC>(args.weight, col, 1, weight);
        write_layer_norm_gradient(args, dy[v], x[v], weight, normalize, means, row, col, dweight[v]);
      }
    }
  }
  write_partial_sums<A, VEC, NV, TPR, RPB>(dweight, args.partial_weight, args.cols);
  write_partial_sums<A, VEC, NV, TPR, RPB>(dbias, args.partial_bias, args.cols);
}

// The means of a row. A block owns a row.
template <typename T, typename W, int VEC, int THREADS>
__global__ void __launch_bounds__(THREADS, 2)
    layer_norm_backward_rows_kernel(LayerNormBackwardArguments<T, W> args, RowMeans<Accumulate<T>>* means) {
  using A = Accumulate<T>;
  using V = Vec<T, VEC>;
  using Sum = RowSum<Tuple<A, 3>, THREADS, 1>;
  __shared__ typename Sum::Storage storage;
  const int64_t row = blockIdx.x;
  const A mean = args.mean[row];
  Tuple<A, 3> sums = {};
  for (int col = threadIdx.x * VEC; col < args.cols; col += THREADS * VEC) {
    const V dy = V::load(args.dy + row * args.dy_stride + col);
    const V x = V::load(args.x + row * args.x_stride + col);
    A weight[VEC];
    load_wide_or<W, VEC>(args.weight, col, 1, weight);
    add_moments(dy, x, weight, mean, sums);
  }
  const auto result = row_means(Sum(storage).all(sums), args.rstd[row], args.cols);
  if (threadIdx.x == 0) means[row] = result;
}

// A block owns THREADS * VEC columns, blockIdx.x, of every gridDim.y-th row, and one row of each partial.
// Without means only dbias is wanted.
template <typename T, typename W, int VEC, int THREADS>
__global__ void __launch_bounds__(THREADS) layer_norm_backward_columns_kernel(
    LayerNormBackwardArguments<T, W> args, const RowMeans<Accumulate<T>>* means) {
  using A = Accumulate<T>;
  using V = Vec<T, VEC>;
  const int col = (blockIdx.x * THREADS + threadIdx.x) * VEC;
  if (col >= args.cols) return;
  A weight[VEC];
  load_wide_or<W, VEC>(args.weight, col, 1, weight);
  A dweight[VEC] = {}, dbias[VEC] = {};
  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
    const V dy = V::load(args.dy + row * args.dy_stride + col);
#pragma unroll
    for (int i = 0; i < VEC; ++i) dbias[i] += widen(dy.data[i]);
    if (means == nullptr) continue;
    const V x = V::load(args.x + row * args.x_stride + col);
    const RowMeans<A> of_row = means[row];
    const RowNormalizer<A> normalize = {args.mean[row], of_row.correction, args.rstd[row]};
    write_layer_norm_gradient(args, dy, x, weight, normalize, of_row, row, col, dweight);
  }
  const int64_t first = static_cast<int64_t>(blockIdx.y) * args.cols + col;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    if (args.partial_weight != nullptr) args.partial_weight[first + i] = dweight[i];
    if (args.partial_bias != nullptr) args.partial_bias[first + i] = dbias[i];
  }
}

}  // namespace liger::cuda
