#pragma once

// Rows on their way from memory to the threads that own their columns. While a thread works on some rows, its
// vectors of the next ones are copied into shared memory without passing through registers (cp.async; before
// sm_80, plain loads and stores). A thread reads back only what it copied itself, so nobody waits for others.

#include <cuda_pipeline.h>

#include "cuda/common/vec.cuh"

namespace liger::cuda {

// Rows [begin, end).
struct RowRange {
  int64_t begin, end;
};

// The rows of this block, of a grid whose blocks all run at once, STEP at a time. Blocks side by side take
// rows side by side, so that the grid goes through memory as one front: with a stretch of rows to each block,
// memory gives a tenth less. What is left for the last step is shared out evenly.
template <int STEP>
class RowSteps {
 public:
  __device__ __forceinline__ explicit RowSteps(int64_t rows)
      : rows_(rows), per_step_(static_cast<int>(gridDim.x) * STEP), full_(rows / per_step_) {}

  // Empty beyond the last step.
  __device__ __forceinline__ RowRange operator()(int64_t step) const {
    const int64_t start = step * per_step_;
    if (step < full_) {
      const int64_t begin = start + static_cast<int>(blockIdx.x) * STEP;
      return {begin, begin + STEP};
    }
    if (step > full_) return {rows_, rows_};
    const auto left = static_cast<unsigned int>(rows_ - start);
    return {start + left * blockIdx.x / gridDim.x, start + left * (blockIdx.x + 1) / gridDim.x};
  }

 private:
  int64_t rows_;
  int per_step_;
  int64_t full_;
};

// Two stages of ROWS rows: NV vectors a thread and row of each of INPUTS tensors.
template <typename T, int INPUTS, int NV, int THREADS, int ROWS>
class RowRing {
  using V = Packed<T, kVecSize<T>>;
  static constexpr int kVectorBytes = 16;
  static constexpr int kStageSize = ROWS * INPUTS * NV * THREADS;

 public:
  static constexpr int kBytes = 2 * kStageSize * kVectorBytes;

  // `shared` holds kBytes.
  __device__ __forceinline__ explicit RowRing(unsigned char* shared)
      : vectors_(shared + threadIdx.x * kVectorBytes) {}

  // Begins to copy a vector to where the rows after these wait.
  __device__ __forceinline__ void fetch(int row, int input, int v, const T* from) {
    __pipeline_memcpy_async(place(stage_ ^ 1, row, input, v), from, kVectorBytes);
  }
  // Ends a stage's copies: none may follow before `next`.
  __device__ __forceinline__ void commit() { __pipeline_commit(); }
  // Goes on to the rows that were fetched last. Those of before must have been read.
  __device__ __forceinline__ void next() { stage_ ^= 1; }
  // Waits until these rows are there, while the next ones, if they are committed, are on their way.
  __device__ __forceinline__ void wait() { __pipeline_wait_prior(1); }

  __device__ __forceinline__ V operator()(int row, int input, int v) const {
    return V::load(reinterpret_cast<const T*>(place(stage_, row, input, v)));
  }

 private:
  __device__ __forceinline__ unsigned char* place(int stage, int row, int input, int v) const {
    return vectors_ + (stage * kStageSize + ((row * INPUTS + input) * NV + v) * THREADS) * kVectorBytes;
  }

  unsigned char* vectors_;
  int stage_ = 0;
};

}  // namespace liger::cuda
