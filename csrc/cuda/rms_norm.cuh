#pragma once

// RMSNorm over rows (ops/rms_norm.h): rstd = 1 / sqrt(mean(x^2) + eps), n = x * rstd, y = n * (offset +
// weight). The RESIDUAL kernels are add_rms_norm's (ops/add_rms_norm.h): they first write sum = x + residual,
// rounded to T, and normalise that.
//
// Forward: TPR threads own a row and keep it in registers between the reduction and the write, NV vectors of
// VEC elements each; rows of a warp or half a warp share a block. Bytes: x read once, y written once;
// RESIDUAL: x and residual read, sum and y written.
//
// Backward: dx = rstd * (m - n * mean(m * n)) with m = dy * (offset + weight); RESIDUAL adds dsum: the
// gradient of x and of residual. Each block of a grid that fits the GPU takes rows beside those of its
// neighbours (RowSteps). A row's threads take ROWS of them at a time, whose sums share a barrier, while the
// next are copied to shared memory (RowRing): one block of few warps keeps a multiprocessor's share of memory
// busy. Each thread keeps its columns' part of dweight = sum(dy * n) in registers, each block writes one row
// of partial sums, and column_sum_kernel adds those in order. Bytes: dy, x and dsum read once, dx written
// once, plus the partial sums, which stay in L2.
//
// Rows that are too wide for a block, and rows that vectors do not fit, are read twice: forward by
// rms_norm_forward_loop_kernel; backward first by rows for mean(m * n), then by columns, where nothing is
// left to reduce.
//
// Fixed order throughout: bitwise reproducible on a given GPU.

#include <type_traits>

#include "cuda/common/column_sum.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/row_ring.cuh"
#include "cuda/common/vec.cuh"

namespace liger::cuda {

template <typename A>
__device__ __forceinline__ A reciprocal_sqrt(A x) {
  return A(1) / sqrt(x);
}

template <typename T, typename W>
struct RmsNormArguments {
  const T* x;
  const T* residual;  // RESIDUAL only, as sum
  const W* weight;    // or null
  T* sum;
  T* y;
  Accumulate<T>* rstd;
  int64_t rows, x_stride, residual_stride;
  int cols;
  Accumulate<T> eps, offset;
  bool round_normalized;
};

// y of VEC columns from what is normalised, and from their weights where there are any.
template <typename T, typename W, int VEC>
__device__ __forceinline__ void write_rms_norm(const RmsNormArguments<T, W>& args, const Packed<T, VEC>& x,
    const Packed<W, VEC>& weight, Accumulate<T> rstd, int64_t row, int col) {
  using A = Accumulate<T>;
  A y[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) y[i] = x[i] * rstd;
  if (args.round_normalized) round_all<T>(y);
  if (args.weight != nullptr) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) y[i] *= args.offset + weight[i];
  }
  Packed<T, VEC>::narrowed(y).store(args.y + row * args.cols + col);
}

template <typename T, int VEC>
__device__ __forceinline__ Packed<T, VEC> add(const Packed<T, VEC>& a, const Packed<T, VEC>& b) {
  Accumulate<T> sums[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) sums[i] = a[i] + b[i];
  return Packed<T, VEC>::narrowed(sums);
}

template <typename T, typename W, int VEC, int NV, int TPR, int RPB, bool RESIDUAL>
__global__ void __launch_bounds__(TPR* RPB) rms_norm_forward_kernel(RmsNormArguments<T, W> args) {
  using A = Accumulate<T>;
  using V = Packed<T, VEC>;
  using Sum = RowSum<A, 1, TPR, RPB>;
  __shared__ typename Sum::Storage storage;
  Sum sum(storage);
  const int lane = threadIdx.x % TPR;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * RPB + threadIdx.x / TPR;
  if (row >= args.rows) return;  // all lanes of a row leave, and those of others do not wait for them
  const T* x = args.x + row * args.x_stride;

  V held[NV], added[RESIDUAL ? NV : 1];
  const T* residual = RESIDUAL ? args.residual + row * args.residual_stride : nullptr;
#pragma unroll
  for (int v = 0; v < NV; ++v) {
    const int col = (v * TPR + lane) * VEC;
    if (col < args.cols) {
      held[v] = V::load(x + col);
      if constexpr (RESIDUAL) added[v] = V::load(residual + col);
    }
  }
  Packed<W, VEC> weight[NV];
  const auto load_weight = [&] {
    if (args.weight == nullptr) return;
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      const int col = (v * TPR + lane) * VEC;
      if (col < args.cols) weight[v] = Packed<W, VEC>::load(args.weight + col);
    }
  };
  // Asked for before the sum, the weight comes in the same wait as the row. The widest rows leave no
  // registers for it.
  constexpr size_t kRegisters = NV * VEC * ((RESIDUAL ? 2 : 1) * sizeof(T) + sizeof(W)) / 4;
  constexpr bool kWeightFirst = TPR < 1024 || kRegisters <= 48;
  if constexpr (kWeightFirst) load_weight();
  if constexpr (RESIDUAL) {
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      const int col = (v * TPR + lane) * VEC;
      if (col < args.cols) {
        held[v] = add(held[v], added[v]);
        held[v].store(args.sum + row * args.cols + col);
      }
    }
  }
  A squares = 0;
#pragma unroll
  for (int v = 0; v < NV; ++v) {
    const int col = (v * TPR + lane) * VEC;
    if (col < args.cols) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const A value = held[v][i];
        squares += value * value;
      }
    }
  }
  const A mean = sum.all(squares) / static_cast<A>(args.cols);
  const A rstd = reciprocal_sqrt(mean + args.eps);
  if (lane == 0) args.rstd[row] = rstd;
  if constexpr (!kWeightFirst) load_weight();

#pragma unroll
  for (int v = 0; v < NV; ++v) {
    const int col = (v * TPR + lane) * VEC;
    if (col < args.cols) write_rms_norm(args, held[v], weight[v], rstd, row, col);
  }
}

template <typename T, typename W, int VEC, int THREADS, bool RESIDUAL>
__global__ void __launch_bounds__(THREADS, 2) rms_norm_forward_loop_kernel(RmsNormArguments<T, W> args) {
  using A = Accumulate<T>;
  using V = Packed<T, VEC>;
  using Sum = RowSum<A, 1, THREADS, 1>;
  __shared__ typename Sum::Storage storage;
  const int64_t row = blockIdx.x;
  const T* x = args.x + row * args.x_stride;
  T* total = RESIDUAL ? args.sum + row * args.cols : nullptr;
  A squares = 0;
  for (int col = threadIdx.x * VEC; col < args.cols; col += THREADS * VEC) {
    V held = V::load(x + col);
    if constexpr (RESIDUAL) {
      held = add(held, V::load(args.residual + row * args.residual_stride + col));
      held.store(total + col);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const A value = held[i];
      squares += value * value;
    }
  }
  const A mean = Sum(storage).all(squares) / static_cast<A>(args.cols);
  const A rstd = reciprocal_sqrt(mean + args.eps);
  if (threadIdx.x == 0) args.rstd[row] = rstd;
  // A thread reads back the sums that it wrote itself.
  const T* normalized = RESIDUAL ? total : x;
  for (int col = threadIdx.x * VEC; col < args.cols; col += THREADS * VEC) {
    Packed<W, VEC> weight;
    if (args.weight != nullptr) weight = Packed<W, VEC>::load(args.weight + col);
    write_rms_norm(args, V::load(normalized + col), weight, rstd, row, col);
  }
}

template <typename T, typename W>
struct RmsNormBackwardArguments {
  const T* dy;
  const T* dsum;    // RESIDUAL only, or null
  const T* x;       // what was normalised
  const W* weight;  // or null
  const Accumulate<T>* rstd;
  T* dx;                   // or null
  Accumulate<T>* partial;  // [blocks, cols] or null
  int64_t rows, dy_stride, dsum_stride, x_stride;
  int cols;
  Accumulate<T> offset;
  bool round_normalized;
};

// offset + weight of VEC columns, or 1.
template <typename T, typename W, int VEC>
__device__ __forceinline__ void load_scale(
    const RmsNormBackwardArguments<T, W>& args, int col, Accumulate<T> (&scale)[VEC]) {
  load_wide_or<W, VEC>(args.weight, col, 1, scale);
  if (args.weight == nullptr) return;
#pragma unroll
  for (int i = 0; i < VEC; ++i) scale[i] += args.offset;
}

// The gradient of VEC columns, given mean(m * n).
template <typename T, typename W, int VEC, bool RESIDUAL>
__device__ __forceinline__ void write_rms_norm_gradient(const RmsNormBackwardArguments<T, W>& args,
    const Packed<T, VEC>& dy, const Packed<T, VEC>& x, const Packed<T, VEC>& dsum,
    const Accumulate<T> (&scale)[VEC], Accumulate<T> rstd, Accumulate<T> mean, int64_t row, int col) {
  using A = Accumulate<T>;
  A gradient[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const A n = x[i] * rstd;
    const A m = dy[i] * scale[i];
    gradient[i] = rstd * (m - n * mean);
    if (RESIDUAL && args.dsum != nullptr) gradient[i] += dsum[i];
  }
  Packed<T, VEC>::narrowed(gradient).store(args.dx + row * args.cols + col);
}

template <typename T, int NV, int TPR, int RPB, int ROWS, bool RESIDUAL>
using RmsNormRing = RowRing<T, RESIDUAL ? 3 : 2, NV, TPR * RPB, ROWS>;

template <typename T, typename W, int NV, int TPR, int RPB, int ROWS, int BLOCKS_PER_SM, bool RESIDUAL>
__global__ void __launch_bounds__(TPR* RPB, BLOCKS_PER_SM)
    rms_norm_backward_kernel(RmsNormBackwardArguments<T, W> args) {
  using A = Accumulate<T>;
  constexpr int VEC = kVecSize<T>;
  using V = Packed<T, VEC>;
  using Sum = RowSum<A, ROWS, TPR, RPB>;
  constexpr int kStep = ROWS * RPB;
  // Wider rows leave no registers for these: they are read again, from L1 and from shared memory.
  constexpr bool kHold = NV <= 2;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ typename Sum::Storage storage;
  Sum sum(storage);
  RmsNormRing<T, NV, TPR, RPB, ROWS, RESIDUAL> ring(shared);
  const int lane = threadIdx.x % TPR;
  const auto column = [&](int v) { return (v * TPR + lane) * VEC; };
  const bool has_dsum = RESIDUAL && args.dsum != nullptr;
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
        if (has_dsum) ring.fetch(r, 2, v, args.dsum + row * args.dsum_stride + col);
      }
    }
    ring.commit();
  };
  const auto load_rstd = [&](const RowRange& rows, A(&rstd)[ROWS]) {
    const int64_t first = rows.begin + offset;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) rstd[r] = first + r < rows.end ? args.rstd[first + r] : A(0);
  };

  RowRange rows = steps(0);
  fetch(rows);
  A rstd[ROWS];
  load_rstd(rows, rstd);
  A held_scale[kHold ? NV : 1][VEC];
  if constexpr (kHold) {
#pragma unroll
    for (int v = 0; v < NV; ++v) {
      if (column(v) < args.cols) load_scale(args, column(v), held_scale[v]);
    }
  }
  A sums[NV][VEC] = {};

  for (int64_t step = 0; rows.begin < rows.end; ++step) {
    const int64_t first = rows.begin + offset;
    const RowRange next = steps(step + 1);
    ring.next();
    fetch(next);
    A next_rstd[ROWS];
    load_rstd(next, next_rstd);
    ring.wait();
    V dy[ROWS][kHold ? NV : 1], x[ROWS][kHold ? NV : 1];
    A dot[ROWS] = {};
    const auto add_rows = [&](auto round) {
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
          A read_scale[VEC];
          if constexpr (!kHold) load_scale(args, column(v), read_scale);
          const auto& scale = kHold ? held_scale[kHold ? v : 0] : read_scale;
          A n[VEC];
#pragma unroll
          for (int i = 0; i < VEC; ++i) {
            n[i] = x_held[i] * rstd[r];
            dot[r] += dy_held[i] * scale[i] * n[i];
          }
          if constexpr (decltype(round)::value) round_all<T>(n);
#pragma unroll
          for (int i = 0; i < VEC; ++i) sums[v][i] += dy_held[i] * n[i];
        }
      }
    };
    // One branch for all rows: elements would each compute both.
    if (sizeof(T) == 2 && args.round_normalized) {
      add_rows(std::true_type{});
    } else {
      add_rows(std::false_type{});
    }
    if (args.dx != nullptr) {
      sum.all(dot);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (first + r >= rows.end) break;
        const A mean = dot[r] * inverse_size;
#pragma unroll
        for (int v = 0; v < NV; ++v) {
          if (column(v) >= args.cols) break;
          A read_scale[VEC];
          if constexpr (!kHold) load_scale(args, column(v), read_scale);
          write_rms_norm_gradient<T, W, VEC, RESIDUAL>(args, kHold ? dy[r][kHold ? v : 0] : ring(r, 0, v),
              kHold ? x[r][kHold ? v : 0] : ring(r, 1, v), has_dsum ? ring(r, RESIDUAL ? 2 : 1, v) : V{},
              kHold ? held_scale[kHold ? v : 0] : read_scale, rstd[r], mean, first + r, column(v));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) rstd[r] = next_rstd[r];
    rows = next;
  }
  allow_column_sum();
  write_partial_sums<TPR, RPB>(sums, args.partial, args.cols, shared);
}

// mean_mn[row] = mean(m * n). A block owns a row.
template <typename T, typename W, int VEC, int THREADS>
__global__ void __launch_bounds__(THREADS)
    rms_norm_backward_rows_kernel(RmsNormBackwardArguments<T, W> args, Accumulate<T>* mean_mn) {
  using A = Accumulate<T>;
  using V = Packed<T, VEC>;
  using Sum = RowSum<A, 1, THREADS, 1>;
  __shared__ typename Sum::Storage storage;
  const int64_t row = blockIdx.x;
  const A rstd = args.rstd[row];
  A dot = 0;
  for (int col = threadIdx.x * VEC; col < args.cols; col += THREADS * VEC) {
    const V dy = V::load(args.dy + row * args.dy_stride + col);
    const V x = V::load(args.x + row * args.x_stride + col);
    A scale[VEC];
    load_scale(args, col, scale);
#pragma unroll
    for (int i = 0; i < VEC; ++i) dot += dy[i] * scale[i] * (x[i] * rstd);
  }
  const A mean = Sum(storage).all(dot) / static_cast<A>(args.cols);
  if (threadIdx.x == 0) mean_mn[row] = mean;
}

// A block owns THREADS * VEC columns, blockIdx.x, of every gridDim.y-th row, and one row of partial.
template <typename T, typename W, int VEC, int THREADS, bool RESIDUAL>
__global__ void __launch_bounds__(THREADS)
    rms_norm_backward_columns_kernel(RmsNormBackwardArguments<T, W> args, const Accumulate<T>* mean_mn) {
  using A = Accumulate<T>;
  using V = Packed<T, VEC>;
  const int col = (blockIdx.x * THREADS + threadIdx.x) * VEC;
  if (col >= args.cols) return;
  A scale[VEC];
  load_scale(args, col, scale);
  A sums[VEC] = {};
  for (int64_t row = blockIdx.y; row < args.rows; row += gridDim.y) {
    const V dy = V::load(args.dy + row * args.dy_stride + col);
    const V x = V::load(args.x + row * args.x_stride + col);
    V dsum;
    if (RESIDUAL && args.dsum != nullptr) dsum = V::load(args.dsum + row * args.dsum_stride + col);
    const A rstd = args.rstd[row];
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const A n = x[i] * rstd;
      sums[i] += dy[i] * (args.round_normalized ? rounded<T>(n) : n);
    }
    if (mean_mn != nullptr) {
      write_rms_norm_gradient<T, W, VEC, RESIDUAL>(args, dy, x, dsum, scale, rstd, mean_mn[row], row, col);
    }
  }
  if (args.partial == nullptr) return;
  store_sums(sums, args.partial + static_cast<int64_t>(blockIdx.y) * args.cols + col);
}

}  // namespace liger::cuda
