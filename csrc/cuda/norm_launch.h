#pragma once

// What the launchers of the norms share: which kernel holds a row of what width, and the sums of gradients
// over rows.

#include <ATen/ops/empty.h>

#include <algorithm>

#include "cuda/common/column_sum.cuh"
#include "cuda/launch.h"
#include "cuda/shared_memory.h"

namespace liger::cuda {

// Shapes of the forward kernels: NV vectors a thread, TPR threads a row, RPB rows a block.
template <int NV, int TPR, int RPB>
struct RowConfig {
  static constexpr int nv = NV, tpr = TPR, rpb = RPB;
  static constexpr int threads = TPR * RPB;
};

// f(RowConfig) with the narrowest forward kernel that holds a row of `vectors` 16-byte vectors; false if none
// does. Where two tensors are read (RESIDUAL), rows take more threads with fewer vectors each. The number of
// rows has no say: a row's result is the same whatever it is computed together with.
template <bool RESIDUAL = false, typename F>
bool with_forward_config(int64_t vectors, const F& f) {
  if (vectors <= 16) return f(RowConfig<1, 16, 8>{}), true;
  if (vectors <= 32) return f(RowConfig<1, 32, 4>{}), true;
  if (vectors <= 64) return f(RowConfig<2, 32, 4>{}), true;
  if (vectors <= 128) {
    return f(std::conditional_t<RESIDUAL, RowConfig<1, 128, 1>, RowConfig<2, 64, 1>>{}), true;
  }
  if (vectors <= 256) return f(RowConfig<2, 128, 1>{}), true;
  if (vectors <= 512) {
    return f(std::conditional_t<RESIDUAL, RowConfig<1, 512, 1>, RowConfig<4, 128, 1>>{}), true;
  }
  if constexpr (!RESIDUAL) {
    if (vectors <= 640) return f(RowConfig<5, 128, 1>{}), true;
  }
  if (vectors <= 768) return f(RowConfig<3, 256, 1>{}), true;
  if (vectors <= 1024) {
    return f(std::conditional_t<RESIDUAL, RowConfig<1, 1024, 1>, RowConfig<4, 256, 1>>{}), true;
  }
  if (vectors <= 2048) return f(RowConfig<4, 512, 1>{}), true;
  if (vectors <= 4096) return f(RowConfig<4, 1024, 1>{}), true;
  return false;
}

// Shapes of the backward kernels: NV vectors a thread, TPR threads a row, RPB times ROWS rows a block at a
// time, BLOCKS_PER_SM blocks a multiprocessor.
template <int NV, int TPR, int RPB, int ROWS, int BLOCKS_PER_SM>
struct BackwardConfig {
  static constexpr int nv = NV, tpr = TPR, rpb = RPB, rows = ROWS, blocks_per_sm = BLOCKS_PER_SM;
  static constexpr int threads = TPR * RPB;

  // A persistent grid: as many blocks as run at once, each leaving one row of partial sums.
  static int blocks(int64_t rows_in_all) {
    constexpr int kStep = ROWS * RPB;
    return static_cast<int>(
        std::min<int64_t>((rows_in_all + kStep - 1) / kStep, multiprocessors() * BLOCKS_PER_SM));
  }
};

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

// out is to be the sum of partial over its blocks; nothing where partial is undefined.
struct ColumnSum {
  const at::Tensor& partial;
  const at::Tensor& out;
};

// Follows the kernel that writes the partial sums at once: the launch waits in place for its end where the
// hardware can (sm_90).
inline void sum_columns(
    const char* op, const ColumnSum& first, const ColumnSum& second, cudaStream_t stream) {
  const auto blocks = static_cast<int>(first.partial.size(0)), cols = static_cast<int>(first.partial.size(1));
  dispatch_floating(first.out.scalar_type(), [&](auto element) {
    using W = decltype(element);
    using A = Accumulate<W>;
    const auto sums = [](const ColumnSum& sum) -> PartialSums<A, W> {
      if (!sum.partial.defined()) return {};
      return {
          static_cast<const A*>(sum.partial.const_data_ptr()), static_cast<W*>(sum.out.mutable_data_ptr())};
    };
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.blockDim = kColumnSumLanes * kColumnSumHeight;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = at::cuda::getCurrentDeviceProperties()->major >= 9 ? 1 : 0;
    // The allocator aligns what the partial sums are in.
    with_vector_size<A>(cols % kVecSize<A> == 0, [&](auto vec) {
      config.gridDim = dim3(grid_size(op, cols, kColumnSumLanes * vec()), second.partial.defined() ? 2 : 1);
      C10_CUDA_CHECK(cudaLaunchKernelEx(
          &config, column_sum_kernel<A, W, vec()>, sums(first), sums(second), blocks, cols));
    });
  });
}

// The sums of both, in one launch where their dtypes allow.
inline void sum_partial_sums(
    const char* op, const ColumnSum& first, const ColumnSum& second, cudaStream_t stream) {
  const at::Tensor nothing;
  const ColumnSum none = {nothing, nothing};
  const bool both = first.partial.defined() && second.partial.defined();
  if (both && first.out.scalar_type() == second.out.scalar_type()) {
    sum_columns(op, first, second, stream);
    return;
  }
  for (const auto* sum : {&first, &second}) {
    if (sum->partial.defined()) sum_columns(op, *sum, none, stream);
  }
}

}  // namespace liger::cuda
