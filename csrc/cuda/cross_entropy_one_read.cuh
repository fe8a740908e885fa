#pragma once

// Loss and gradient of rows of logits with one read and one write of memory (formulas: ops/cross_entropy.h).
//
// A row is held on chip between its statistics and its gradient. Its aligned vectors are split over `ranks`
// blocks, the first of which also has the up to 2 * (vector - 1) scalars at its ends. Every block
// reduces its part to PartStatistics, sends them to all the others, and combines all of them in the order of
// the ranks; so every block knows the factors of the gradient, and writes its part of it:
//
//   d x_c = exp(y_c - max) * (p_scale / sum), and what ops/cross_entropy.h adds to that
//
// Two kernels. cross_entropy_registers_kernel: a block a row, the row in registers; for short rows, on every
// architecture. cross_entropy_staged_kernel: a cluster a row (sm_90), parts in shared memory. Its clusters
// stay and take rows in turn. While the rows before are computed, bulk copies bring the next ones; while the
// statistics of a row travel, the gradient of the row before is written.
//
// Bytes: the logits once, the gradient once. Ignored rows are written but not read. The order of every sum
// depends on the number of classes, the alignment of the row and the device alone: bitwise reproducible.

#include "cuda/common/cluster.cuh"
#include "cuda/cross_entropy.cuh"

namespace liger::cuda {

// What is known of the logits of a thread, a warp, a block or the row.
struct alignas(16) PartStatistics {
  float max, sum, low;
  float y_target;  // of one thread, not combined
  float first_value;
  int first_col;
  double weighted;

  __device__ __forceinline__ static PartStatistics empty() {
    return {lowest<float>(), 0, 0, 0, -std::numeric_limits<float>::infinity(), 0, 0};
  }
};

// Over the lanes of a warp, in each of them.
template <typename T, bool PLAIN, bool ARGMAX>
__device__ __forceinline__ void combine_lanes(PartStatistics& part) {
  constexpr unsigned int kAll = 0xffffffffu;
  float max = part.max;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) max = larger(max, __shfl_xor_sync(kAll, max, offset));
  const float scale = exponential<T>(part.max - max);
  part.max = max;
  part.sum *= scale;
  part.low *= scale;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const float sum = __shfl_xor_sync(kAll, part.sum, offset), low = __shfl_xor_sync(kAll, part.low, offset);
    part.low += low;
    add_compensated(part.sum, part.low, sum);
    if constexpr (!PLAIN) part.weighted += __shfl_xor_sync(kAll, part.weighted, offset);
    if constexpr (ARGMAX) {
      const auto first = CombineFirstMaxima<float>{}(FirstMaximum<float>{part.first_value, part.first_col},
          FirstMaximum<float>{__shfl_xor_sync(kAll, part.first_value, offset),
              __shfl_xor_sync(kAll, part.first_col, offset)});
      part.first_value = first.value;
      part.first_col = first.col;
    }
  }
}

template <typename T, bool PLAIN, bool ARGMAX>
__device__ __forceinline__ PartStatistics combine_lanes(const RunningStatistics<T, PLAIN, ARGMAX>& running) {
  auto part = PartStatistics::empty();
  part.max = running.max;
  part.sum = running.sum;
  part.low = running.low;
  if constexpr (!PLAIN) part.weighted = running.weighted;
  if constexpr (ARGMAX) {
    part.first_value = running.first.value;
    part.first_col = running.first.col;
  }
  combine_lanes<T, PLAIN, ARGMAX>(part);
  return part;
}

// The columns of a block: vectors [first, first + count) of the row's, and its ends where `ends` says so.
template <typename T>
struct RowPart {
  static constexpr int kVec = kVecSize<T>;
  RowSpans<T> spans;
  int first, count;
  bool ends;

  // Of `most` vectors a block, which is enough for the row's.
  __device__ __forceinline__ RowPart(const T* row, int cols, int rank, int most)
      : spans(row, cols), ends(rank == 0) {
    first = min(rank * most, spans.vectors);
    count = min(most, spans.vectors - first);
  }

  // Of vector v of the part.
  __device__ __forceinline__ int col(int v) const { return spans.head + (first + v) * kVec; }

  __device__ __forceinline__ bool has(int col) const {
    if (col < spans.head || col >= spans.tail) return ends;
    const int vector = (col - spans.head) / kVec;
    return vector >= first && vector < first + count;
  }

  // f(col) by the threads that have one of the scalars.
  template <typename F>
  __device__ __forceinline__ void for_ends(int cols, int lane, const F& f) const {
    if (!ends) return;
    if (lane < spans.head) f(lane);
    if (spans.tail + lane < cols) f(spans.tail + lane);
  }
};

// The results of a row and the factors of its gradient, by one thread of every block of the row. In the
// result, lse is what is subtracted before the exponential: the maximum.
template <typename T, bool PLAIN, bool ARGMAX>
__device__ __forceinline__ RowGradient<float> finish_row(const CrossEntropyArguments<T>& args, int64_t row,
    int target, float y_target, const PartStatistics& part, int rank) {
  float lse, lse_low;
  if (rank == 0) {
    if constexpr (ARGMAX) args.predicted[row] = part.first_col;
    write_results<T, PLAIN>(
        args, row, target, y_target, {part.max, part.sum, part.low}, part.weighted, lse, lse_low);
  } else {
    log_sum_exp<float>({part.max, part.sum, part.low}, lse, lse_low);
  }
  auto gradient = row_gradient(args, row, target, y_target, lse, lse_low);
  gradient.lse = part.max;
  gradient.lse_low = 0;
  gradient.p_scale /= part.sum + part.low;
  return gradient;
}

// The gradient of vector `x` at column `col`, into dx; a block of zeros for an ignored row.
template <typename T, bool PLAIN>
__device__ __forceinline__ Vec<T, kVecSize<T>> vector_gradient(const CrossEntropyArguments<T>& args,
    const RowGradient<float>& gradient, const Vec<T, kVecSize<T>>& x, int col) {
  Vec<T, kVecSize<T>> out;
#pragma unroll
  for (int i = 0; i < kVecSize<T>; ++i) {
    out.data[i] = element_gradient<T, PLAIN>(args, gradient, widen(x.data[i]), col + i);
  }
  return out;
}

template <typename T>
__device__ __forceinline__ Vec<T, kVecSize<T>> vector_of(float value) {
  Vec<T, kVecSize<T>> out;
#pragma unroll
  for (int i = 0; i < kVecSize<T>; ++i) out.data[i] = narrow<T>(value);
  return out;
}

// Without a vector store where dx is not aligned as x.
template <typename T>
__device__ __forceinline__ void store_vector(const Vec<T, kVecSize<T>>& out, T* dx, bool aligned) {
  if (aligned) {
    out.store(dx);
  } else {
#pragma unroll
    for (int i = 0; i < kVecSize<T>; ++i) dx[i] = out.data[i];
  }
}

template <typename T>
__device__ __forceinline__ bool aligned_alike(const T* x, const T* dx) {
  return (reinterpret_cast<std::uintptr_t>(x) ^ reinterpret_cast<std::uintptr_t>(dx)) % 16 == 0;
}

// Classes that a block of the kernel below can hold.
template <typename T, int THREADS, int VECTORS>
constexpr int kRegistersClasses = THREADS * VECTORS * kVecSize<T>;

template <typename T, bool PLAIN, bool ARGMAX, int THREADS, int VECTORS>
__global__ void __launch_bounds__(THREADS, 4096 / (THREADS * VECTORS))
    cross_entropy_registers_kernel(CrossEntropyArguments<T> args) {
  constexpr int kVec = kVecSize<T>;
  constexpr int kWarps = THREADS / 32;
  constexpr int kBatch = PLAIN ? 2 : 1;  // vectors of a thread whose statistics are taken at once
  __shared__ PartStatistics warps[kWarps];
  __shared__ RowGradient<float> shared_gradient;

  // Last rows first: a matrix product that has just written the logits left those in L2.
  const int64_t row = args.rows - 1 - blockIdx.x;
  const T* x = args.logits + row * args.logits_stride;
  T* dx = args.dlogits + row * args.dlogits_stride;
  const int64_t target = args.target[row];
  const int lane = threadIdx.x;
  // cross_entropy_totals_kernel reported targets out of range; here they must do no harm.
  if (target == args.ignore_index || target < 0 || target >= args.cols) {
    if (lane == 0) write_ignored_results<ARGMAX>(args, row);
    write_zeros<T, THREADS>(dx, args.cols);
    return;
  }

  const RowPart<T> part(x, args.cols, 0, THREADS * VECTORS);
  Vec<T, kVec> held[VECTORS];
#pragma unroll
  for (int u = 0; u < VECTORS; ++u) {
    const int v = lane + u * THREADS;
    held[u] = v < part.count ? Vec<T, kVec>::load(x + part.col(v))
                             : vector_of<T>(-std::numeric_limits<float>::infinity());
  }
  RunningStatistics<T, PLAIN, ARGMAX> running;
  float y_target = 0;
  if (lane == 0 || (!PLAIN && args.label_smoothing != 0)) {
    y_target = soft_capped<T, PLAIN>(widen(x[target]), args.softcap);
  }
  if constexpr (!PLAIN) running.y_target = y_target;
  // Columns in rising order within a thread, but for the scalars: FirstMaximum breaks ties of one thread by
  // the order of its columns.
  const auto scalar = [&](int col) {
    const T value[1] = {x[col]};
    running.add(args, value, col);
  };
  if (lane < part.spans.head) scalar(lane);
#pragma unroll
  for (int u = 0; u < VECTORS; u += kBatch) {
    const int v = lane + u * THREADS;
    running.add(args, reinterpret_cast<const T(&)[kBatch][kVec]>(held[u]), part.col(v), THREADS * kVec,
        (part.count - v + THREADS - 1) / THREADS);
  }
  if (part.spans.tail + lane < args.cols) scalar(part.spans.tail + lane);

  const auto of_warp = combine_lanes(running);
  if (lane % 32 == 0) warps[lane / 32] = of_warp;
  __syncthreads();
  if (lane < 32) {
    auto of_row = lane < kWarps ? warps[lane] : PartStatistics::empty();
    combine_lanes<T, PLAIN, ARGMAX>(of_row);
    if (lane == 0) {
      shared_gradient =
          finish_row<T, PLAIN, ARGMAX>(args, row, static_cast<int>(target), y_target, of_row, 0);
    }
  }
  // Also: no thread may overwrite the row before thread 0 has read its target.
  __syncthreads();
  auto gradient = shared_gradient;
  gradient.lse_low = 0;
  const bool aligned = aligned_alike(x, dx);
#pragma unroll
  for (int u = 0; u < VECTORS; ++u) {
    const int v = lane + u * THREADS;
    if (v < part.count) {
      const int col = part.col(v);
      store_vector(vector_gradient<T, PLAIN>(args, gradient, held[u], col), dx + col, aligned);
    }
  }
  part.for_ends(args.cols, lane,
      [&](int col) { dx[col] = element_gradient<T, PLAIN>(args, gradient, widen(x[col]), col); });
  // The true class goes last: whoever wrote its column before must be done.
  __syncthreads();
  if (lane == 0) dx[target] = narrow<T>(gradient.d_target);
}

// A row is in `stages` from its copy to its gradient: one to be copied, one whose statistics are taken, one
// whose gradient is written.
constexpr int kMinStages = 3, kMaxStages = 4;
// The largest cluster there is.
constexpr int kMaxRanks = 16;

template <typename T, bool PLAIN, bool ARGMAX, int THREADS>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    cross_entropy_staged_kernel(CrossEntropyArguments<T> args, int stages, int stage_bytes) {
#if __CUDA_ARCH__ >= 900
  constexpr int kVec = kVecSize<T>;
  constexpr int kWarps = THREADS / 32;
  constexpr int kBatch = PLAIN && !ARGMAX ? 4 : PLAIN ? 2 : 1;  // likewise, as the registers allow
  extern __shared__ __align__(128) unsigned char staged[];
  __shared__ PartStatistics warps[kWarps], parts[2][kMaxRanks];
  __shared__ RowGradient<float> shared_gradient;
  __shared__ CopyBarrier copied[kMaxStages], exchanged[2];
  __shared__ int targets[kMaxStages];  // of the staged rows, -1 where the row is ignored

  const int lane = threadIdx.x, warp_lane = lane % 32;
  const int ranks = cluster_blocks(), rank = cluster_rank();
  const int64_t cluster = blockIdx.x / ranks, clusters = gridDim.x / ranks;
  // This cluster's rows are 0 ... rows - 1; last first, as a matrix product that has just written the logits
  // left the last ones in L2.
  const int rows = static_cast<int>((args.rows - cluster + clusters - 1) / clusters);
  const auto row_of = [&](int i) { return args.rows - 1 - (cluster + i * clusters); };

  int64_t upcoming = 0;  // the target of the next row to be copied, in thread 0
  const auto copy_row = [&](int i, int stage) {
    const int64_t target = upcoming;
    if (i + 1 < rows) upcoming = args.target[row_of(i + 1)];
    // cross_entropy_totals_kernel reported targets out of range; here they must do no harm.
    const bool counts = target != args.ignore_index && target >= 0 && target < args.cols;
    targets[stage] = counts ? static_cast<int>(target) : -1;
    const T* x = args.logits + row_of(i) * args.logits_stride;
    const RowPart<T> part(x, args.cols, rank, stage_bytes / 16);
    const int bytes = counts ? part.count * 16 : 0;
    copied[stage].arrive(bytes);
    if (bytes > 0) bulk_copy(staged + stage * stage_bytes, x + part.col(0), bytes, copied[stage]);
  };

  if (lane == 0) {
    for (auto& barrier : copied) barrier.init();
    for (auto& barrier : exchanged) barrier.init();
    fence_copy_barriers();
    if (rows > 0) upcoming = args.target[row_of(0)];
#pragma unroll 1
    for (int i = 0; i < min(stages, rows); ++i) copy_row(i, i);
  }
  // The barriers are ready, and every block of the cluster has begun.
  __syncthreads();
  cluster_sync();

  int stage = 0, parity = 0, exchange = 0, exchange_parity = 0;
  // Of the row before: its stage, its target (-1: ignored).
  int last_stage = 0, last_target = -1;
  for (int i = 0; i <= rows; ++i) {
    int target = -1;
    float y_target = 0;  // in thread 0, and with label smoothing in all
    if (i < rows) {
      copied[stage].wait(parity);
      target = targets[stage];
    }
    if (target >= 0) {
      const T* x = args.logits + row_of(i) * args.logits_stride;
      const RowPart<T> part(x, args.cols, rank, stage_bytes / 16);
      const T* mine = reinterpret_cast<const T*>(staged + stage * stage_bytes);
      if (lane == 0 || (!PLAIN && args.label_smoothing != 0)) {
        y_target = soft_capped<T, PLAIN>(widen(x[target]), args.softcap);
      }
      RunningStatistics<T, PLAIN, ARGMAX> running;
      if constexpr (!PLAIN) running.y_target = y_target;
      const auto scalar = [&](int col) {
        const T value[1] = {x[col]};
        running.add(args, value, col);
      };
      if (part.ends && lane < part.spans.head) scalar(lane);
      for (int v = lane; v < part.count; v += kBatch * THREADS) {
        Vec<T, kVec> held[kBatch];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          held[u] = v + u * THREADS < part.count ? Vec<T, kVec>::load(mine + (v + u * THREADS) * kVec)
                                                 : vector_of<T>(-std::numeric_limits<float>::infinity());
        }
        running.add(args, reinterpret_cast<const T(&)[kBatch][kVec]>(held), part.col(v), THREADS * kVec,
            (part.count - v + THREADS - 1) / THREADS);
      }
      if (part.ends && part.spans.tail + lane < args.cols) scalar(part.spans.tail + lane);
      const auto of_warp = combine_lanes(running);
      if (warp_lane == 0) warps[lane / 32] = of_warp;
    }
    // Publishes the warps' statistics, and the gradient's factors of the row before.
    __syncthreads();
    if (target >= 0 && lane < 32) {
      auto of_block = lane < kWarps ? warps[lane] : PartStatistics::empty();
      combine_lanes<T, PLAIN, ARGMAX>(of_block);
      // Sent along, so that this block's read of the target is over before another block can write there.
      of_block.y_target = __shfl_sync(0xffffffffu, y_target, 0);
      if (lane == 0) exchanged[exchange].arrive(ranks * static_cast<int>(sizeof(PartStatistics)));
      __syncwarp();
      if (lane < ranks) send_to_block(&parts[exchange][rank], of_block, exchanged[exchange], lane);
    }

    if (i > 0) {
      const int64_t row = row_of(i - 1);
      const T* x = args.logits + row * args.logits_stride;
      T* dx = args.dlogits + row * args.dlogits_stride;
      const RowPart<T> part(x, args.cols, rank, stage_bytes / 16);
      const bool aligned = aligned_alike(x, dx);
      T* dx_mine = dx + part.col(0);
      if (last_target >= 0) {
        const T* mine = reinterpret_cast<const T*>(staged + last_stage * stage_bytes);
        auto gradient = shared_gradient;
        gradient.lse_low = 0;
        const auto scalar = [&](T x, int col) {
          return element_gradient<T, PLAIN>(args, gradient, widen(x), col);
        };
        if (aligned) {
#pragma unroll 2
          for (int v = lane; v < part.count; v += THREADS) {
            const auto held = Vec<T, kVec>::load(mine + v * kVec);
            vector_gradient<T, PLAIN>(args, gradient, held, part.col(v)).store(dx_mine + v * kVec);
          }
        } else {
          for (int c = lane; c < part.count * kVec; c += THREADS)
            dx_mine[c] = scalar(mine[c], part.col(0) + c);
        }
        part.for_ends(args.cols, lane, [&](int col) { dx[col] = scalar(x[col], col); });
      } else {
        if (aligned) {
#pragma unroll 4
          for (int v = lane; v < part.count; v += THREADS) vector_of<T>(0).store(dx_mine + v * kVec);
        } else {
#pragma unroll 1
          for (int c = lane; c < part.count * kVec; c += THREADS) dx_mine[c] = narrow<T>(0);
        }
        part.for_ends(args.cols, lane, [&](int col) { dx[col] = narrow<T>(0); });
        if (lane == 0 && rank == 0) write_ignored_results<ARGMAX>(args, row);
      }
    }
    // The stage is free, the warps' statistics have been read, and the column of the true class is written.
    __syncthreads();
    if (i > 0 && lane == 0) {
      T* dx = args.dlogits + row_of(i - 1) * args.dlogits_stride;
      const RowPart<T> part(
          args.logits + row_of(i - 1) * args.logits_stride, args.cols, rank, stage_bytes / 16);
      if (last_target >= 0 && part.has(last_target)) dx[last_target] = narrow<T>(shared_gradient.d_target);
      if (i - 1 + stages < rows) copy_row(i - 1 + stages, last_stage);
    }

    if (target >= 0 && lane < 32) {
      exchanged[exchange].wait(exchange_parity);
      auto of_row = lane < ranks ? parts[exchange][lane] : PartStatistics::empty();
      combine_lanes<T, PLAIN, ARGMAX>(of_row);
      if (lane == 0) {
        shared_gradient = finish_row<T, PLAIN, ARGMAX>(args, row_of(i), target, y_target, of_row, rank);
      }
      // A block that is ahead sends to the other half, and not to this one again before this block has sent.
      exchange ^= 1;
      if (exchange == 0) exchange_parity ^= 1;
    }
    last_stage = stage;
    last_target = target;
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
#endif
}

}  // namespace liger::cuda
