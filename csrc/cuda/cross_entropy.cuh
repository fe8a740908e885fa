#pragma once

// Cross entropy of rows of logits (formulas: ops/cross_entropy.h).
//
// A block owns a row. Forward: each thread keeps a running maximum and the sum of exp(y - maximum) over its
// vectors; CUB combines the threads in a fixed order; the row's results are finished in float64 by one
// thread. Where a gradient is wanted, the row is still there: a row of 16-bit logits that fits into a
// multiprocessor's shared memory and registers was kept (cross_entropy_resident_kernel), others are read
// again, from L2, where the rows in flight fit. Backward: the same second half, from the saved log-sum-exp.
//
// Bytes: loss alone reads the logits once. Loss and gradient read them once from memory, and write the
// gradient once. Backward reads and writes once. Rows start at any element: up to one vector of scalars at
// either end makes the rest 16-byte aligned. Ignored rows are not read. Predicted tokens come out of the
// first read, token scaling out of what a row knows anyway.
//
// No atomics, fixed order throughout: bitwise reproducible on a given GPU.

#include <cuda_pipeline.h>

#include <cfloat>
#include <cub/block/block_reduce.cuh>
#include <limits>

#include "cuda/common/vec.cuh"

// Checking the targets is part of the operator, also where NDEBUG turns other assertions off.
#undef NDEBUG
#include <cassert>

namespace liger::cuda {

// The operator on whose behalf a kernel checks targets: the text of the assertion is all that reaches users.
enum class TargetsOf { kCrossEntropy, kCrossEntropyBackward, kFusedLinearCrossEntropy };

__device__ __forceinline__ void assert_target(bool fits, TargetsOf op) {
  switch (op) {
    case TargetsOf::kCrossEntropy:
      assert(fits && "liger::cross_entropy: target must be in [0, classes) or ignore_index");
      break;
    case TargetsOf::kCrossEntropyBackward:
      assert(fits && "liger::cross_entropy_backward: target must be in [0, classes) or ignore_index");
      break;
    case TargetsOf::kFusedLinearCrossEntropy:
      assert(fits && "liger::fused_linear_cross_entropy: target must be in [0, classes) or ignore_index");
      break;
  }
}

// totals: the divisor of ce, the divisor of z, the sum of the class weights (ops/cross_entropy_rows.h).
template <typename T>
struct CrossEntropyArguments {
  using A = Accumulate<T>;
  const T* logits;        // [rows, cols], row stride logits_stride
  T* dlogits;             // [rows, cols], row stride dlogits_stride; may be logits; null: no gradient
  const int64_t* target;  // [rows]
  const A* weight;        // [cols] or null for 1
  const A* totals;        // [3]
  const A* dloss;         // [rows] or one, by dloss_stride (1 or 0); null for 1
  A* ce;                  // forward: [rows]
  A* lse;                 // [rows], written by forward, read by backward
  A* lse_low;             // likewise; null in a forward pass that does not keep it
  A* row_scale;           // forward: [rows], the factors of token scaling; null without
  int64_t* predicted;     // forward: [rows], with ARGMAX
  int64_t rows, logits_stride, dlogits_stride;
  int cols, dloss_stride;
  int64_t ignore_index;
  A label_smoothing, lse_square_scale;
  A softcap;  // 0: none
  bool use_token_scaling;
  bool divide;  // see ops/cross_entropy_rows.h
};

constexpr float kLog2E = 1.4426950408889634f;

// 2^x. Errs by 2 ulp of float32, far below the rounding of 16-bit logits and gradients; results below the
// smallest normal number are 0, which spares the instructions that would scale them.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp(x), of a precision that fits logits of type T.
template <typename T>
__device__ __forceinline__ Accumulate<T> exponential(Accumulate<T> x) {
  if constexpr (sizeof(T) == 2) {
    return fast_exp2(x * kLog2E);
  } else if constexpr (sizeof(T) == 4) {
    return expf(x);
  } else {
    return exp(x);
  }
}

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }
__device__ __forceinline__ float exponential_minus_1(float x) { return expm1f(x); }
__device__ __forceinline__ double exponential_minus_1(double x) { return expm1(x); }
__device__ __forceinline__ float split(float x, int* exponent) { return frexpf(x, exponent); }
__device__ __forceinline__ double split(double x, int* exponent) { return frexp(x, exponent); }
__device__ __forceinline__ float times_power_of_two(float x, int exponent) { return ldexpf(x, exponent); }
__device__ __forceinline__ double times_power_of_two(double x, int exponent) { return ldexp(x, exponent); }

// The lowest finite number, so that differences of maxima stay numbers while nothing but -inf was seen.
template <typename A>
__device__ __forceinline__ A lowest() {
  return sizeof(A) == 4 ? A(-FLT_MAX) : A(-DBL_MAX);
}

// sum += term, and low += what that rounded away. Beside the 1 of the largest logit, the terms of a row that
// is sure of its class are too small to count one by one, and together they are its loss.
template <typename A>
__device__ __forceinline__ void add_compensated(A& sum, A& low, A term) {
  const A total = sum + term;
  const A added = total - sum;
  low += (sum - (total - added)) + (term - added);
  sum = total;
}

// sum + low = sum(exp(y - max)) over what was seen.
template <typename A>
struct MaxAndSum {
  A max, sum, low;
};

template <typename T>
struct CombineMaxAndSum {
  using Pair = MaxAndSum<Accumulate<T>>;

  __device__ __forceinline__ Pair operator()(const Pair& a, const Pair& b) const {
    const auto max = larger(a.max, b.max);
    const auto scale_a = exponential<T>(a.max - max), scale_b = exponential<T>(b.max - max);
    Pair result = {max, a.sum * scale_a, a.low * scale_a + b.low * scale_b};
    add_compensated(result.sum, result.low, b.sum * scale_b);
    return result;
  }
};

// A largest element and the first column that holds one; NaN counts as largest, as in torch.argmax. A row of
// nothing but -inf keeps column 0.
template <typename A>
struct FirstMaximum {
  A value = -std::numeric_limits<A>::infinity();
  int col = 0;

  // The next columns, in rising order.
  __device__ __forceinline__ void add(A x, int at) {
    if (x > value || (x != x && value == value)) {
      value = x;
      col = at;
    }
  }
};

template <typename A>
struct CombineFirstMaxima {
  __device__ __forceinline__ FirstMaximum<A> operator()(
      const FirstMaximum<A>& a, const FirstMaximum<A>& b) const {
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    const bool equal = a.value == b.value || (a_nan && b_nan);
    return (equal ? b.col < a.col : b_nan || b.value > a.value) ? b : a;
  }
};

// PLAIN: neither soft-cap nor label smoothing, the common case.
template <typename T, bool PLAIN>
__device__ __forceinline__ Accumulate<T> soft_capped(Accumulate<T> x, Accumulate<T> softcap) {
  if (PLAIN || softcap == 0) return x;
  return softcap * hyperbolic_tangent(x / softcap);
}

// Columns of a row: scalars [0, head), `vectors` aligned vectors, scalars [tail, cols).
template <typename T>
struct RowSpans {
  static constexpr int kVec = kVecSize<T>;
  int head, vectors, tail;

  __device__ __forceinline__ RowSpans(const T* row, int cols) {
    const int misaligned = static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % 16 / sizeof(T));
    head = min(cols, (kVec - misaligned) % kVec);
    vectors = (cols - head) / kVec;
    tail = head + vectors * kVec;
  }
};

// What the gradient of a row needs besides its logits.
template <typename T>
struct RowGradient {
  using A = Accumulate<T>;
  A lse, lse_low;
  A p_scale;       // factor of the probability
  A smooth_scale;  // factor of the class weight, subtracted
  A d_target;      // the true class, computed apart

  __device__ __forceinline__ A probability(A y) const {
    if constexpr (sizeof(T) == 2) {
      // As exponential, with lse_low taken off in the multiplication.
      return fast_exp2(fmaf(y - lse, kLog2E, -lse_low * kLog2E));
    } else {
      return exponential<T>((y - lse) - lse_low);
    }
  }
};

template <typename T>
__device__ __forceinline__ RowGradient<T> row_gradient(const CrossEntropyArguments<T>& args, int64_t row,
    int64_t target, Accumulate<T> y_target, Accumulate<T> lse, Accumulate<T> lse_low) {
  using A = Accumulate<T>;
  const A log_p = (y_target - lse) - lse_low;
  A upstream = args.dloss == nullptr ? A(1) : args.dloss[row * args.dloss_stride];
  if (args.use_token_scaling) upstream *= exponential<A>(log_p);
  const A ce_total = args.totals[0], z_total = args.totals[1], weight_sum = args.totals[2];
  int exponent = 0;
  const A ce_divisor = args.divide ? ce_total : split(ce_total, &exponent);
  const A z_divisor = times_power_of_two(z_total, -exponent);
  const A ce_scale = ce_divisor == 0 ? A(0) : upstream / ce_divisor;
  const A z_scale = z_divisor == 0 ? A(0) : upstream / z_divisor;
  const A target_weight = args.weight == nullptr ? A(1) : args.weight[target];
  const A smoothing = args.label_smoothing / args.cols;
  const A ce_factor = (1 - args.label_smoothing) * target_weight + smoothing * weight_sum;
  const A z_factor = 2 * args.lse_square_scale * lse;

  RowGradient<T> gradient;
  gradient.lse = lse;
  gradient.lse_low = lse_low;
  gradient.p_scale = ce_scale * ce_factor + z_scale * z_factor;
  gradient.smooth_scale = ce_scale * smoothing;
  // With p - 1 from expm1 nothing cancels as p goes to 1, and the result is rounded once.
  const A p_minus_1 = exponential_minus_1(log_p);
  gradient.d_target = ce_scale * (ce_factor * p_minus_1 + smoothing * (weight_sum - target_weight)) +
      z_scale * z_factor * (1 + p_minus_1);
  if (args.softcap != 0) {
    gradient.d_target *= (1 - y_target / args.softcap) * (1 + y_target / args.softcap);
  }
  return gradient;
}

template <typename T, bool PLAIN>
__device__ __forceinline__ Accumulate<T> element_gradient(
    const CrossEntropyArguments<T>& args, const RowGradient<T>& row, Accumulate<T> x, int col) {
  using A = Accumulate<T>;
  if constexpr (PLAIN) {
    return row.probability(x) * row.p_scale;
  } else {
    A y = x, slope = 1;
    if (args.softcap != 0) {
      const A t = hyperbolic_tangent(x / args.softcap);
      slope = (1 - t) * (1 + t);
      y = args.softcap * t;
    }
    const A weight = args.weight == nullptr ? A(1) : args.weight[col];
    return (row.probability(y) * row.p_scale - row.smooth_scale * weight) * slope;
  }
}

template <typename T, bool PLAIN, int N>
__device__ __forceinline__ Packed<T, N> vector_gradient(
    const CrossEntropyArguments<T>& args, const RowGradient<T>& row, const Packed<T, N>& x, int col) {
  Accumulate<T> gradient[N];
#pragma unroll
  for (int i = 0; i < N; ++i) gradient[i] = element_gradient<T, PLAIN>(args, row, x[i], col + i);
  return Packed<T, N>::narrowed(gradient);
}

// The block writes the gradient of its row; dx may be x.
template <typename T, bool PLAIN, int THREADS>
__device__ __forceinline__ void write_gradient(
    const CrossEntropyArguments<T>& args, const T* x, T* dx, int64_t target, const RowGradient<T>& row) {
  constexpr int kVec = kVecSize<T>;
  using Vector = Packed<T, kVec>;
  const int lane = threadIdx.x;
  const auto write_one = [&](int col) {
    vector_gradient<T, PLAIN>(args, row, Packed<T, 1>::load(x + col), col).store(dx + col);
  };
  const bool same_alignment =
      (reinterpret_cast<std::uintptr_t>(x) ^ reinterpret_cast<std::uintptr_t>(dx)) % 16 == 0;
  if (same_alignment) {
    const RowSpans<T> spans(x, args.cols);
    if (lane < spans.head) write_one(lane);
    // All loads before the first store: the compiler must assume that dx is x.
    constexpr int kUnroll = 4;
    for (int v = lane; v < spans.vectors; v += kUnroll * THREADS) {
      Vector held[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int vector = v + u * THREADS;
        if (vector < spans.vectors) held[u] = Vector::load(x + spans.head + vector * kVec);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int vector = v + u * THREADS;
        if (vector < spans.vectors) {
          const int col = spans.head + vector * kVec;
          vector_gradient<T, PLAIN>(args, row, held[u], col).store(dx + col);
        }
      }
    }
    if (spans.tail + lane < args.cols) write_one(spans.tail + lane);
  } else {
    for (int col = lane; col < args.cols; col += THREADS) write_one(col);
  }
  // The true class goes last: whoever wrote its column before must be done.
  __syncthreads();
  if (lane == 0) dx[target] = narrow<T>(row.d_target);
}

template <typename T, int THREADS>
__device__ __forceinline__ void write_zeros(T* dx, int cols) {
  constexpr int kVec = kVecSize<T>;
  const RowSpans<T> spans(dx, cols);
  Vec<T, kVec> zeros;
#pragma unroll
  for (int i = 0; i < kVec; ++i) zeros.data[i] = narrow<T>(0);
  const int lane = threadIdx.x;
  if (lane < spans.head) dx[lane] = zeros.data[0];
  for (int v = lane; v < spans.vectors; v += THREADS) zeros.store(dx + spans.head + v * kVec);
  if (spans.tail + lane < cols) dx[spans.tail + lane] = zeros.data[0];
}

// The largest of the elements, and NaN only where all are.
template <typename T, int N, int G>
__device__ __forceinline__ Accumulate<T> largest_of(const Packed<T, N> (&values)[G]) {
  using Vectors = Packed<T, N>;
  if constexpr (Vectors::kPairs) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Packed<T, 2> most = {values[0].words[0]};
    auto& pair = reinterpret_cast<Pair&>(most.words[0]);
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
      for (int w = g == 0; w < Vectors::kWords; ++w) {
        pair = __hmax2(pair, reinterpret_cast<const Pair&>(values[g].words[w]));
      }
    }
    return larger(most[0], most[1]);
  } else {
    Accumulate<T> most = values[0][0];
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
      for (int i = 0; i < N; ++i) most = larger(most, values[g][i]);
    }
    return most;
  }
}

// What a row has beyond its end: -inf.
template <typename T, int N>
__device__ __forceinline__ Packed<T, N> nothing() {
  Accumulate<T> values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = -std::numeric_limits<Accumulate<T>>::infinity();
  return Packed<T, N>::narrowed(values);
}

// The running maximum and sum of a thread, and with label smoothing the sum of w * (y - y_t): a sum of w * y
// would lose the digits of large logits that differ little. ARGMAX: also where the largest logit is.
template <typename T, bool PLAIN, bool ARGMAX>
struct RunningStatistics {
  using A = Accumulate<T>;
  A max = lowest<A>(), sum = 0, low = 0, weighted = 0;
  A y_target = 0;  // with label smoothing
  FirstMaximum<A> first;

  // The columns from `col` on, and `step` on from there for every further vector. Vectors at or beyond column
  // `end` are `nothing`.
  template <int N, int G>
  __device__ __forceinline__ void add(
      const CrossEntropyArguments<T>& args, const Packed<T, N> (&values)[G], int col, int step, int end) {
    const A largest = largest_of(values);
    // Soft-capping keeps the order, but for rounding.
    const A most = larger(max, soft_capped<T, PLAIN>(largest, args.softcap));
    const A scale = exponential<T>(max - most);
    sum *= scale;
    low *= scale;
    max = most;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (!PLAIN && col + g * step >= end) break;
      A terms = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const A y = soft_capped<T, PLAIN>(values[g][i], args.softcap);
        terms += exponential<T>(y - most);
        if constexpr (!PLAIN) {
          if (args.label_smoothing != 0) {
            weighted += (args.weight == nullptr ? A(1) : args.weight[col + g * step + i]) * (y - y_target);
          }
        }
      }
      add_compensated(sum, low, terms);
    }
    if constexpr (ARGMAX) {
      // Of the logits themselves: soft-capped, different ones may round to the same. The elements are looked
      // at one by one when there is something to find, which is rare: a new maximum, or a NaN, which passes
      // by `larger` but not by the sum.
      if (largest > first.value || sum != sum) {
#pragma unroll
        for (int g = 0; g < G; ++g) {
          if (col + g * step >= end) break;
#pragma unroll
          for (int i = 0; i < N; ++i) first.add(values[g][i], col + g * step + i);
        }
      }
    }
  }
};

// A log-sum-exp and what its rounding took off.
template <typename A>
struct LogSumExp {
  A high, low;
};

// One thread writes the results of a row. weighted: with label smoothing, the sum of w * (y - y_t).
template <typename T, bool PLAIN>
__device__ __forceinline__ LogSumExp<Accumulate<T>> finish_row(const CrossEntropyArguments<T>& args,
    int64_t row, int64_t target, Accumulate<T> y_target, const MaxAndSum<Accumulate<T>>& total,
    double weighted) {
  using A = Accumulate<T>;
  const double max = total.max;
  const double log_sum = log(static_cast<double>(total.sum) + static_cast<double>(total.low));
  const A lse = static_cast<A>(max + log_sum);
  const A lse_low = static_cast<A>((max - static_cast<double>(lse)) + log_sum);
  args.lse[row] = lse;
  if (args.lse_low != nullptr) args.lse_low[row] = lse_low;
  const double smoothing = args.label_smoothing;
  const double target_weight = args.weight == nullptr ? 1.0 : static_cast<double>(args.weight[target]);
  const double neg_log_p = (max - static_cast<double>(y_target)) + log_sum;
  double loss = (1 - smoothing) * target_weight * neg_log_p;
  if constexpr (!PLAIN) {
    if (smoothing != 0) {
      const double weight_sum = args.totals[2];
      loss += smoothing / args.cols * (weight_sum * neg_log_p - weighted);
    }
  }
  if (args.use_token_scaling) {
    const double p = exp(-neg_log_p);
    loss *= p;
    args.row_scale[row] = static_cast<A>(p);
  }
  args.ce[row] = static_cast<A>(loss);
  return {lse, lse_low};
}

// GRADIENT: also writes the gradient, into dlogits. ARGMAX: also writes the predicted class. The registers of
// a multiprocessor hold 1024 / THREADS blocks: with a row a block, that is the number of rows in flight.
template <typename T, bool PLAIN, bool GRADIENT, bool ARGMAX, int THREADS>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 8 ? 1 : 1024 / THREADS)
    cross_entropy_forward_kernel(CrossEntropyArguments<T> args) {
  using A = Accumulate<T>;
  using Pair = MaxAndSum<A>;
  using ReducePair = cub::BlockReduce<Pair, THREADS, cub::BLOCK_REDUCE_WARP_REDUCTIONS>;
  using ReduceSum = cub::BlockReduce<double, THREADS, cub::BLOCK_REDUCE_WARP_REDUCTIONS>;
  using ReduceFirst = cub::BlockReduce<FirstMaximum<A>, THREADS, cub::BLOCK_REDUCE_WARP_REDUCTIONS>;
  constexpr int kVec = kVecSize<T>;
  using Vector = Packed<T, kVec>;
  // Vectors in flight, as many as the registers hold.
  constexpr int kUnroll = ARGMAX && (GRADIENT || !PLAIN) ? 2 : PLAIN && !GRADIENT && !ARGMAX ? 8 : 4;
  __shared__ union {
    typename ReducePair::TempStorage pair;
    typename ReduceSum::TempStorage sum;
    typename ReduceFirst::TempStorage first;
  } storage;
  __shared__ A shared_lse, shared_lse_low, shared_y_target;

  // Last rows first: a matrix product that has just written the logits left those in L2.
  const int64_t row = args.rows - 1 - blockIdx.x;
  const T* x = args.logits + row * args.logits_stride;
  T* dx = GRADIENT ? args.dlogits + row * args.dlogits_stride : nullptr;
  const int64_t target = args.target[row];
  const int lane = threadIdx.x;
  // cross_entropy_totals_kernel reported targets out of range; here they must do no harm.
  if (target == args.ignore_index || target < 0 || target >= args.cols) {
    if (lane == 0) {
      args.ce[row] = 0;
      if (args.lse_low != nullptr) args.lse_low[row] = 0;
      args.lse[row] = 0;
      if (args.row_scale != nullptr) args.row_scale[row] = 0;
      if constexpr (ARGMAX) args.predicted[row] = -1;
    }
    if constexpr (GRADIENT) write_zeros<T, THREADS>(dx, args.cols);
    return;
  }

  RunningStatistics<T, PLAIN, ARGMAX> running;
  if constexpr (!PLAIN) {
    if (args.label_smoothing != 0) running.y_target = soft_capped<T, PLAIN>(widen(x[target]), args.softcap);
  }
  const RowSpans<T> spans(x, args.cols);
  const auto add_one = [&](int col) {
    const Packed<T, 1> value[1] = {Packed<T, 1>::load(x + col)};
    running.add(args, value, col, 0, args.cols);
  };
  if (lane < spans.head) add_one(lane);
  for (int v = lane; v < spans.vectors; v += kUnroll * THREADS) {
    Vector held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int vector = v + u * THREADS;
      held[u] = vector < spans.vectors ? Vector::load(x + spans.head + vector * kVec) : nothing<T, kVec>();
    }
    running.add(args, held, spans.head + v * kVec, THREADS * kVec, spans.tail);
  }
  if (spans.tail + lane < args.cols) add_one(spans.tail + lane);

  if constexpr (ARGMAX) {
    const auto first = ReduceFirst(storage.first).Reduce(running.first, CombineFirstMaxima<A>{});
    if (lane == 0) args.predicted[row] = first.col;
    __syncthreads();  // the storage is used again
  }
  double weighted = 0;
  if constexpr (!PLAIN) {
    if (args.label_smoothing != 0) {
      weighted = ReduceSum(storage.sum).Sum(static_cast<double>(running.weighted));
      __syncthreads();  // the storage is used again
    }
  }
  const Pair total =
      ReducePair(storage.pair).Reduce(Pair{running.max, running.sum, running.low}, CombineMaxAndSum<T>{});
  if (lane == 0) {
    const A y_target = soft_capped<T, PLAIN>(widen(x[target]), args.softcap);
    const auto lse = finish_row<T, PLAIN>(args, row, target, y_target, total, weighted);
    shared_lse = lse.high;
    shared_lse_low = lse.low;
    shared_y_target = y_target;
  }
  if constexpr (GRADIENT) {
    // Publishes the shared values; and no thread may overwrite the row before thread 0 has read its target.
    __syncthreads();
    const auto gradient = row_gradient(args, row, target, shared_y_target, shared_lse, shared_lse_low);
    write_gradient<T, PLAIN, THREADS>(args, x, dx, target, gradient);
  }
}

// Loss and gradient of rows that fit into a multiprocessor, so that the logits are read once. A thread has
// SHARED vectors of a row in shared memory, where it alone reads what it copied, and HELD more in registers.
// Having written the gradient of a vector it begins to fetch the one of the block's next row in its place, so
// that memory stays busy while that row's statistics are taken. Rows are aligned vectors without head or
// tail.
template <typename T, int THREADS, int SHARED, int HELD, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    cross_entropy_resident_kernel(CrossEntropyArguments<T> args) {
  using A = Accumulate<T>;
  using Pair = MaxAndSum<A>;
  using ReducePair = cub::BlockReduce<Pair, THREADS, cub::BLOCK_REDUCE_WARP_REDUCTIONS>;
  constexpr int kVec = kVecSize<T>;
  constexpr int kGroup = 2;    // vectors whose maximum is taken before their exponentials
  constexpr int kOfStage = 4;  // vectors whose copies are waited for at once
  using Vector = Packed<T, kVec>;
  static_assert(SHARED % kOfStage == 0 && kOfStage % kGroup == 0 && HELD % kGroup == 0);
  extern __shared__ __align__(16) unsigned char shared_rows[];
  __shared__ typename ReducePair::TempStorage storage;
  __shared__ A shared_lse, shared_lse_low;

  const int lane = threadIdx.x;
  const int vectors = args.cols / kVec;
  auto* slots = reinterpret_cast<Vec<uint32_t, 4>*>(shared_rows) + lane;
  Vector held[HELD == 0 ? 1 : HELD];
  const auto takes_part = [&](int64_t target) {
    return target != args.ignore_index && target >= 0 && target < args.cols;
  };
  const auto fetch_shared = [&](const T* x, int s) {
    const int v = s * THREADS + lane;
    if (v < vectors) __pipeline_memcpy_async(slots + s * THREADS, x + v * kVec, 16);
    if (s % kOfStage == kOfStage - 1) __pipeline_commit();
  };
  const auto fetch_held = [&](const T* x, int h) {
    const int v = (SHARED + h) * THREADS + lane;
    if (v < vectors) held[h] = Vector::load(x + v * kVec);
  };
  const auto fetch = [&](const T* x) {
#pragma unroll
    for (int s = 0; s < SHARED; ++s) fetch_shared(x, s);
#pragma unroll
    for (int h = 0; h < HELD; ++h) fetch_held(x, h);
  };

  // What no row reaches stays nothing throughout.
#pragma unroll
  for (int s = 0; s < SHARED; ++s) {
    if (s * THREADS + lane >= vectors) nothing<T, kVec>().store(reinterpret_cast<T*>(slots + s * THREADS));
  }
#pragma unroll
  for (int h = 0; h < HELD; ++h) held[h] = nothing<T, kVec>();

  // Last rows first: a matrix product that has just written the logits left those in L2.
  int64_t row = args.rows - 1 - blockIdx.x;
  int64_t target = row >= 0 ? args.target[row] : args.ignore_index;
  if (takes_part(target)) fetch(args.logits + row * args.logits_stride);
  while (row >= 0) {
    const int64_t next = row - gridDim.x;
    const int64_t next_target = next >= 0 ? args.target[next] : args.ignore_index;
    const bool fetch_next = takes_part(next_target);
    const T* x_next = args.logits + next * args.logits_stride;
    const T* x = args.logits + row * args.logits_stride;
    T* dx = args.dlogits + row * args.dlogits_stride;
    if (!takes_part(target)) {
      // cross_entropy_totals_kernel reported targets out of range; here they must do no harm.
      if (lane == 0) {
        args.ce[row] = 0;
        if (args.lse_low != nullptr) args.lse_low[row] = 0;
        args.lse[row] = 0;
        if (args.row_scale != nullptr) args.row_scale[row] = 0;
      }
      write_zeros<T, THREADS>(dx, args.cols);
      if (fetch_next) fetch(x_next);
    } else {
      const A y_target = widen(x[target]);
      RunningStatistics<T, true, false> running;
#pragma unroll
      for (int s = 0; s < SHARED; s += kGroup) {
        if (s % kOfStage == 0) __pipeline_wait_prior((SHARED - kOfStage - s) / kOfStage);
        Vector group[kGroup];
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          group[g] = Vector::load(reinterpret_cast<const T*>(slots + (s + g) * THREADS));
        }
        running.add(args, group, 0, 0, args.cols);
      }
#pragma unroll
      for (int h = 0; h < HELD; h += kGroup) {
        Vector group[kGroup];
#pragma unroll
        for (int g = 0; g < kGroup; ++g) group[g] = held[h + g];
        running.add(args, group, 0, 0, args.cols);
      }
      const Pair total =
          ReducePair(storage).Reduce(Pair{running.max, running.sum, running.low}, CombineMaxAndSum<T>{});
      if (lane == 0) {
        const auto lse = finish_row<T, true>(args, row, target, y_target, total, 0.0);
        shared_lse = lse.high;
        shared_lse_low = lse.low;
      }
      __syncthreads();
      const auto gradient = row_gradient(args, row, target, y_target, shared_lse, shared_lse_low);
      // The column of the true class, if it is this thread's, counted from the vector's first.
      const auto write = [&](const Vector& logits, int v) {
        if (v >= vectors) return;
        auto result = vector_gradient<T, true>(args, gradient, logits, 0);
        const unsigned int own = static_cast<unsigned int>(static_cast<int>(target) - v * kVec);
        if (own < kVec) {
          A values[kVec];
#pragma unroll
          for (int i = 0; i < kVec; ++i) values[i] = own == i ? gradient.d_target : result[i];
          result = Vector::narrowed(values);
        }
        result.store(dx + v * kVec);
      };
#pragma unroll
      for (int s = 0; s < SHARED; ++s) {
        write(Vector::load(reinterpret_cast<const T*>(slots + s * THREADS)), s * THREADS + lane);
        if (fetch_next) fetch_shared(x_next, s);
      }
#pragma unroll
      for (int h = 0; h < HELD; ++h) {
        write(held[h], (SHARED + h) * THREADS + lane);
        if (fetch_next) fetch_held(x_next, h);
      }
    }
    row = next;
    target = next_target;
  }
}

template <typename T, bool PLAIN, int THREADS>
__global__ void __launch_bounds__(THREADS) cross_entropy_backward_kernel(CrossEntropyArguments<T> args) {
  const int64_t row = blockIdx.x;
  const T* x = args.logits + row * args.logits_stride;
  T* dx = args.dlogits + row * args.dlogits_stride;
  const int64_t target = args.target[row];
  const bool ignored = target == args.ignore_index;
  const bool in_range = target >= 0 && target < args.cols;
  if (threadIdx.x == 0) assert_target(ignored || in_range, TargetsOf::kCrossEntropyBackward);
  if (ignored || !in_range) {
    write_zeros<T, THREADS>(dx, args.cols);
    return;
  }
  const auto y_target = soft_capped<T, PLAIN>(widen(x[target]), args.softcap);
  __syncthreads();  // dx may be x: every thread must have read the target first
  const auto gradient = row_gradient(args, row, target, y_target, args.lse[row], args.lse_low[row]);
  write_gradient<T, PLAIN, THREADS>(args, x, dx, target, gradient);
}

constexpr int kTotalsThreads = 1024;

// One block: totals over all targets and class weights, and the check of every target.
template <typename A>
__global__ void __launch_bounds__(kTotalsThreads)
    cross_entropy_totals_kernel(const int64_t* target, int64_t tokens, const A* weight, int64_t classes,
        const A* num_items, int64_t ignore_index, bool mean, TargetsOf op, A* totals) {
  using Reduce = cub::BlockReduce<double, kTotalsThreads, cub::BLOCK_REDUCE_WARP_REDUCTIONS>;
  __shared__ typename Reduce::TempStorage storage;
  double count = 0, target_weight = 0, weight_sum = 0;
  bool all_fit = true;
  for (int64_t i = threadIdx.x; i < tokens; i += kTotalsThreads) {
    const int64_t t = target[i];
    if (t == ignore_index) continue;
    const bool in_range = t >= 0 && t < classes;
    all_fit &= in_range;
    if (!in_range) continue;
    count += 1;
    target_weight += weight == nullptr ? 1.0 : static_cast<double>(weight[t]);
  }
  assert_target(all_fit, op);
  if (weight != nullptr) {
    for (int64_t i = threadIdx.x; i < classes; i += kTotalsThreads)
      weight_sum += static_cast<double>(weight[i]);
  }
  count = Reduce(storage).Sum(count);
  __syncthreads();
  target_weight = Reduce(storage).Sum(target_weight);
  __syncthreads();
  weight_sum = Reduce(storage).Sum(weight_sum);
  if (threadIdx.x != 0) return;
  totals[0] = totals[1] = 1;
  if (num_items != nullptr) {
    totals[0] = totals[1] = *num_items;
  } else if (mean) {
    totals[0] = static_cast<A>(target_weight);
    totals[1] = static_cast<A>(count);
  }
  totals[2] = static_cast<A>(weight == nullptr ? static_cast<double>(classes) : weight_sum);
}

// Fields of ops/cross_entropy_rows.h; null where there is none.
template <typename A>
struct CrossEntropyReduceArguments {
  const A *ce, *lse, *row_scale, *totals;
  const int64_t *target, *predicted;
  A *loss, *z_loss;
  float* token_accuracy;  // or null
  int64_t tokens;
  A lse_square_scale;

  __device__ __forceinline__ double z(int64_t i) const {
    const double scale = row_scale == nullptr ? 1.0 : static_cast<double>(row_scale[i]);
    return scale * static_cast<double>(lse[i]) * static_cast<double>(lse[i]);
  }
  // Ignored rows have no prediction, and are never right: ignore_index may be the -1 that stands for that.
  __device__ __forceinline__ bool counts(int64_t i) const { return predicted[i] >= 0; }
  __device__ __forceinline__ bool right(int64_t i) const { return counts(i) && predicted[i] == target[i]; }
};

// One block: loss and z_loss over all rows, summed in float64, and the share of rows predicted right.
template <typename A>
__global__ void __launch_bounds__(kTotalsThreads)
    cross_entropy_reduce_kernel(CrossEntropyReduceArguments<A> args) {
  using Reduce = cub::BlockReduce<double, kTotalsThreads, cub::BLOCK_REDUCE_WARP_REDUCTIONS>;
  __shared__ typename Reduce::TempStorage storage;
  double ce_sum = 0, z_sum = 0, right = 0, count = 0;
  for (int64_t i = threadIdx.x; i < args.tokens; i += kTotalsThreads) {
    ce_sum += static_cast<double>(args.ce[i]);
    z_sum += args.z(i);
    if (args.token_accuracy != nullptr) {
      right += args.right(i);
      count += args.counts(i);
    }
  }
  ce_sum = Reduce(storage).Sum(ce_sum);
  __syncthreads();
  z_sum = Reduce(storage).Sum(z_sum);
  if (args.token_accuracy != nullptr) {
    __syncthreads();
    right = Reduce(storage).Sum(right);
    __syncthreads();
    count = Reduce(storage).Sum(count);
    if (threadIdx.x == 0) *args.token_accuracy = count == 0 ? 0.0f : static_cast<float>(right / count);
  }
  if (threadIdx.x != 0) return;
  const double ce_total = args.totals[0], z_total = args.totals[1], scale = args.lse_square_scale;
  const double z = scale == 0 || z_total == 0 ? 0.0 : scale * z_sum / z_total;
  *args.z_loss = static_cast<A>(z);
  *args.loss = static_cast<A>((ce_total == 0 ? 0.0 : ce_sum / ce_total) + z);
}

// Per row: z_loss = scale * z, loss = ce + z_loss. loss may be ce.
template <typename A>
__global__ void cross_entropy_unreduced_kernel(CrossEntropyReduceArguments<A> args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= args.tokens) return;
  const A z = args.lse_square_scale == 0 ? A(0) : static_cast<A>(args.lse_square_scale * args.z(i));
  args.z_loss[i] = z;
  args.loss[i] = args.ce[i] + z;
  if (args.token_accuracy != nullptr) args.token_accuracy[i] = args.right(i) ? 1.0f : 0.0f;
}

constexpr int kScaleThreads = 256;

// out = grad * scale with one factor on the device, the upstream gradient of a loss. A grid-stride loop over
// 16-byte vectors. In place, a factor of 1 leaves after reading the factor: the usual backward pass of a loss
// moves nothing. Otherwise every element is read and written once.
template <typename T, int VEC>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(const T* grad, const Accumulate<T>* scale, T* out, int64_t size) {
  const Accumulate<T> factor = *scale;
  if (out == grad && factor == 1) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kScaleThreads * VEC;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x) * VEC; i < size;
      i += step) {
    const auto in = Vec<T, VEC>::load(grad + i);
    Vec<T, VEC> result;
#pragma unroll
    for (int j = 0; j < VEC; ++j) result.data[j] = narrow<T>(widen(in.data[j]) * factor);
    result.store(out + i);
  }
}

}  // namespace liger::cuda
