#pragma once

// Argument checks that operators share. They read metadata only, through SymInt, so the CPU, CUDA and Meta
// kernels of an operator call the same function and raise the same sentence.

#include <ATen/core/Tensor.h>

#include <optional>

namespace liger {

// `op` and `name` go into the messages: "liger::rms_norm: weight must be ...".
struct Argument {
  const char* op;
  const char* name;
  const at::Tensor& tensor;
};

// The name users know: "float32", "bfloat16".
const char* dtype_name(at::ScalarType dtype);

// float64, float32, bfloat16 or float16; TypeError otherwise.
void check_floating(const Argument& arg);
void check_dim_at_least(const Argument& arg, int64_t dim);
void check_dim(const Argument& arg, int64_t dim);
void check_same_device(const Argument& arg, const Argument& reference);
void check_same_dtype(const Argument& arg, const Argument& reference);
void check_same_shape(const Argument& arg, const Argument& reference);
// The first `dims` dimensions of `reference`, and no more.
void check_leading_shape(const Argument& arg, const Argument& reference, int64_t dims);
// The dtype of `reference`, or float32 beside a 16-bit `reference`.
void check_same_dtype_or_float32(const Argument& arg, const Argument& reference);
// 1-D of the given size; `meaning` and `of` say what the size is ("last dimension of ", "x").
void check_vector(const Argument& arg, const c10::SymInt& size, const char* meaning, const char* of = "");

// One number for each row of `reference`: its leading dimensions, in the dtype of statistics.
void check_row_statistic(const Argument& arg, const Argument& reference);

// The dtype of sums and statistics: float64 for float64, float32 for everything else.
inline at::ScalarType accumulate_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace liger
