#pragma once

// The vectorised CPU loops. Each is compiled once per instruction set (kernels_default.cpp, kernels_avx2.cpp,
// kernels_avx512.cpp, from the same <op>_kernel.h files); kernels() picks the set that PyTorch picked for
// this machine, so ATEN_CPU_CAPABILITY works here too and one binary runs everywhere.

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "ops/glu_rows.h"

namespace liger::cpu {

// rms_norm, and add_rms_norm where there is a residual.
struct RmsNormForward {
  at::ScalarType dtype, weight_dtype;
  const void* x;         // [rows, cols], row stride x_stride
  const void* residual;  // [rows, cols], row stride residual_stride, or null
  const void* weight;    // [cols] or null
  void* sum;             // [rows, cols] contiguous; null without residual
  void* y;               // [rows, cols] contiguous
  void* rstd;            // [rows]
  int64_t rows, cols, x_stride, residual_stride;
  double eps, offset;
  bool round_normalized;
};

struct RmsNormBackward {
  at::ScalarType dtype, weight_dtype;
  const void* dy;      // [rows, cols], row stride dy_stride
  const void* dsum;    // [rows, cols], row stride dsum_stride: added to the gradient; or null
  const void* x;       // what was normalised: [rows, cols], row stride x_stride
  const void* weight;  // [cols] or null
  const void* rstd;    // [rows]
  void* dx;            // [rows, cols] contiguous, or null
  void* partial;       // [row_blocks, cols] in the accumulate type, or null
  void* dweight;       // [cols], or null
  int64_t rows, cols, dy_stride, dsum_stride, x_stride, row_blocks;
  double offset;
  bool round_normalized;
};

struct LayerNormForward {
  at::ScalarType dtype, affine_dtype;
  const void* x;       // [rows, cols], row stride x_stride
  const void* weight;  // [cols] or null
  const void* bias;    // [cols] or null
  void* y;             // [rows, cols] contiguous
  void* mean;          // [rows]
  void* rstd;          // [rows]
  int64_t rows, cols, x_stride;
  double eps;
};

struct LayerNormBackward {
  at::ScalarType dtype, weight_dtype, bias_dtype;
  const void* dy;        // [rows, cols], row stride dy_stride
  const void* x;         // [rows, cols], row stride x_stride
  const void* weight;    // [cols] or null
  const void* mean;      // [rows]
  const void* rstd;      // [rows]
  void* dx;              // [rows, cols] contiguous, or null
  void* partial_weight;  // [row_blocks, cols] in the accumulate type; null without dweight
  void* partial_bias;    // [row_blocks, cols] in the accumulate type; null without dbias
  void* dweight;         // [cols], or null
  void* dbias;           // [cols], or null
  int64_t rows, cols, dy_stride, x_stride, row_blocks;
};

// One of q and k. The strides are in elements; the last dimension of x and out has stride 1.
struct RopeTensor {
  const void* x;
  void* out;
  int64_t heads;
  int64_t x_strides[3];    // batch, head, position
  int64_t out_strides[3];  // batch, head, position
};

struct Rope {
  at::ScalarType dtype, angle_dtype;
  RopeTensor tensors[2];
  const void* cos;
  const void* sin;
  int64_t batch, positions, head_dim, rotary_dim;
  int64_t cos_strides[3], sin_strides[3];  // plane, batch (both 0 when shared), position
  int64_t section_ends[2];                 // pairs from these on read plane 1, plane 2
  bool interleaved;                        // pairs are neighbours, not half of rotary_dim apart
  bool inverse;                            // the transposed rotation, for backward
};

// Rows of logits; what the fields mean: ops/cross_entropy_rows.h. A is the accumulate type of dtype.
struct CrossEntropy {
  at::ScalarType dtype;
  const void* logits;     // [rows, cols], row stride logits_stride
  void* dlogits;          // [rows, cols], row stride dlogits_stride; may be logits; null: no gradient
  const int64_t* target;  // [rows]
  const void* weight;     // A[cols], or null
  const void* totals;     // A[3]
  const void* dloss;      // A, one or [rows] by dloss_stride (0 or 1), or null for 1
  void* ce;               // forward: A[rows]
  void* lse_out;          // forward: A[rows]
  void* lse_low_out;      // forward: A[rows], or null
  void* row_scale;        // forward: A[rows], or null without token scaling
  int64_t* predicted;     // forward: [rows], or null
  const void* lse;        // backward: A[rows]
  const void* lse_low;    // backward: A[rows]
  int64_t rows, cols, logits_stride, dlogits_stride, dloss_stride;
  int64_t ignore_index;
  double label_smoothing, lse_square_scale;
  double softcap;  // 0: none
  bool use_token_scaling;
  bool divide;  // see ops/cross_entropy_rows.h
};

struct Scale {
  at::ScalarType dtype;
  const void* in;  // [size]
  void* out;       // [size]; may be in
  int64_t size;
  double factor;  // of the accumulate type's precision
};

struct Kernels {
  void (*rms_norm_forward)(const RmsNormForward&);
  void (*rms_norm_backward)(const RmsNormBackward&);
  void (*layer_norm_forward)(const LayerNormForward&);
  void (*layer_norm_backward)(const LayerNormBackward&);
  void (*rope)(const Rope&);
  void (*glu_forward)(const GluRows&, GluActivation);
  void (*glu_backward)(const GluRows&, GluActivation);
  void (*cross_entropy_forward)(const CrossEntropy&);
  void (*cross_entropy_backward)(const CrossEntropy&);
  void (*scale)(const Scale&);
};

const Kernels& kernels();

}  // namespace liger::cpu
