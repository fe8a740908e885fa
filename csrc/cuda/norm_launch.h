#pragma once

// What the launchers of the norms share: which kernel holds a row of what width, and the sums of gradients
// over rows.

#include <ATen/ops/empty.h>

#include <algorithm>

#include "cuda/common/column_sum.cuh"
#include "cuda/launch.h"

namespace liger::cuda {

// Shapes of the register-resident kernels: NV vectors a thread, TPR threads a row, RPB rows a block.
template <int NV, int TPR, int RPB, int BLOCKS_PER_SM = 1>
struct RowConfig {
  static constexpr int nv = NV, tpr = TPR, rpb = RPB, blocks_per_sm = BLOCKS_PER_SM;
  static constexpr int threads = TPR * RPB;
};

// f(RowConfig) with the narrowest forward kernel that holds a row of `vectors` 16-byte vectors; false if none
// does.
template <typename F>
bool with_forward_config(int64_t vectors, const F& f) {
  if (vectors <= 16) return f(RowConfig<1, 16, 16>{}), true;
  if (vectors <= 32) return f(RowConfig<1, 32, 4>{}), true;
  if (vectors <= 64) return f(RowConfig<2, 32, 4>{}), true;
  if (vectors <= 128) return f(RowConfig<4, 32, 4>{}), true;
  if (vectors <= 256) return f(RowConfig<2, 128, 1>{}), true;
  if (vectors <= 512) return f(RowConfig<4, 128, 1>{}), true;
  if (vectors <= 1024) return f(RowConfig<4, 256, 1>{}), true;
  if (vectors <= 2048) return f(RowConfig<4, 512, 1>{}), true;
  if (vectors <= 4096) return f(RowConfig<4, 1024, 1>{}), true;
  return false;
}

// Threads of the kernels that read a row in a loop, and of those that own columns.
constexpr int kLoopThreads = 512;
constexpr int kColumnThreads = 128;

// f(integral_constant) with the elements of a vector: as many as 16 bytes hold, or 1 where rows are not
// aligned.
template <typename T, typename F>
void with_vector_size(bool vectorizable, const F& f) {
  if (vectorizable) {
    f(std::integral_constant<int, kVecSize<T>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

// A persistent grid: as many blocks as run at once, each leaving one row of partial sums.
inline int persistent_blocks(int64_t wanted, int blocks_per_sm) {
  return static_cast<int>(std::min<int64_t>(wanted, multiprocessors() * blocks_per_sm));
}

// Grid of the kernels whose blocks own kColumnThreads * vec columns of every gridDim.y-th row.
inline dim3 column_grid(const char* op, int64_t rows, int64_t cols, int vec) {
  const auto column_blocks = grid_size(op, cols, kColumnThreads * vec);
  const int64_t resident = int64_t{multiprocessors()} * (2048 / kColumnThreads);
  const auto row_blocks = std::clamp<int64_t>(resident / column_blocks, 1, std::min<int64_t>(rows, 65535));
  return dim3(column_blocks, static_cast<unsigned int>(row_blocks));
}

// The partial sums of a backward kernel: [blocks, cols] of the accumulate type where they are needed.
inline at::Tensor empty_partial_sums(
    bool needed, int64_t blocks, int64_t cols, const at::TensorOptions& options) {
  return needed ? at::empty({blocks, cols}, options) : at::Tensor();
}

// out = the sum of partial over its blocks; nothing where partial is undefined.
inline void sum_partial_sums(
    const char* op, const at::Tensor& partial, const at::Tensor& out, cudaStream_t stream) {
  if (!partial.defined()) return;
  const auto blocks = static_cast<int>(partial.size(0)), cols = static_cast<int>(partial.size(1));
  dispatch_floating(out.scalar_type(), [&](auto element) {
    using W = decltype(element);
    using A = Accumulate<W>;
    const dim3 threads(kColumnSumWidth, kColumnSumHeight);
    column_sum_kernel<A, W><<<grid_size(op, cols, kColumnSumWidth), threads, 0, stream>>>(
        static_cast<const A*>(partial.const_data_ptr()), static_cast<W*>(out.mutable_data_ptr()), blocks,
        cols);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace liger::cuda
