#pragma once

// A tensor seen as rows: its last dimension contiguous, the leading ones folded into one with a single
// stride.

#include <ATen/core/Tensor.h>

namespace liger {

struct Rows {
  at::Tensor tensor;  // keeps the storage alive
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // elements between the starts of neighbouring rows

  bool dense() const { return stride == cols; }
  const void* data() const { return tensor.const_data_ptr(); }
};

// Views x as rows where its strides allow it (slices and chunks of the last dimension do), and copies it into
// contiguous memory where they do not (transposed last dimension, expanded gradients).
Rows as_rows(const at::Tensor& x);

// x itself, or a contiguous copy when neighbours in its last dimension are not neighbours in memory.
at::Tensor with_unit_last_stride(const at::Tensor& x);

}  // namespace liger
