#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace liger {

enum class GluActivation { kSilu, kGeluTanh, kGeluErf };

// A gated linear unit as its kernels see it: rows of pointers and strides, which is what makes the two
// layouts the same to them. Strides are in elements, between the starts of neighbouring rows.
struct GluRows {
  at::ScalarType dtype;
  const void* gate;            // [rows, cols]
  const void* up;              // [rows, cols]
  const void* dout = nullptr;  // backward: [rows, cols]
  void* out = nullptr;         // forward: [rows, cols] contiguous
  void* dgate = nullptr;       // backward: [rows, cols], row stride grad_stride; may be gate's memory
  void* dup = nullptr;         // backward: [rows, cols], row stride grad_stride; may be up's memory
  int64_t rows, cols;
  int64_t gate_stride, up_stride;
  int64_t dout_stride = 0, grad_stride = 0;
};

}  // namespace liger
