#pragma once

// Gradients of vectors along the last dimension (the weight of a norm) are summed over fixed blocks of rows,
// then over the blocks in order: the result does not depend on the number of threads.

#include <algorithm>
#include <cstdint>

namespace liger::cpu {

// Enough blocks to occupy any machine, few enough that their partial sums stay in cache.
constexpr int64_t kMaxRowBlocks = 128;
// A block writes and reads a row of float32 per partial sum: with fewer rows that is a large share of its
// memory traffic.
constexpr int64_t kMinRowsPerBlock = 8;

inline int64_t row_blocks(int64_t rows) {
  return std::clamp<int64_t>(rows / kMinRowsPerBlock, 1, kMaxRowBlocks);
}

}  // namespace liger::cpu
