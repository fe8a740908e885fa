#pragma once

// What the gated linear units share, whatever their activation, layout and device:  out = act(gate) * up.
//
// Layouts: gate and up as two tensors, or packed as the halves of one buffer's last dimension, gate first.
// A packed buffer is read in place, and its gradient is one buffer, written in place.
//
// With an underscore: the gradients are written over gate and up, or over gate_up, which are contiguous and
// share no memory with each other or with dout.
//
// Rounding points are those of Hugging Face's eager MLP: act(gate) is computed in float32 (float64 for
// float64) and rounded to the dtype, the product is rounded again. Gradients are rounded once.

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <tuple>

#include "ops/glu_rows.h"

namespace liger {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

void check_glu(const char* op, const at::Tensor& gate, const at::Tensor& up);
void check_glu_backward(const char* op, const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
void check_glu_packed(const char* op, const at::Tensor& gate_up);
void check_glu_packed_backward(const char* op, const at::Tensor& dout, const at::Tensor& gate_up);
void check_glu_backward_(
    const char* op, const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up);
void check_glu_packed_backward_(const char* op, const at::Tensor& dout, const at::Tensor& gate_up);

// Uninitialised results.
at::Tensor empty_glu(const at::Tensor& gate);
TensorPair empty_glu_gradients(const at::Tensor& gate);
at::Tensor empty_glu_packed(const at::Tensor& gate_up);
at::Tensor empty_glu_packed_gradient(const at::Tensor& gate_up);

// Allocates the results and has `run` compute them from rows, unless they are empty. The arguments were
// checked.
using RunGlu = c10::function_ref<void(const GluRows&)>;
at::Tensor glu_forward(const at::Tensor& gate, const at::Tensor& up, RunGlu run);
TensorPair glu_backward(const at::Tensor& dout, const at::Tensor& gate, const at::Tensor& up, RunGlu run);
at::Tensor glu_packed_forward(const at::Tensor& gate_up, RunGlu run);
at::Tensor glu_packed_backward(const at::Tensor& dout, const at::Tensor& gate_up, RunGlu run);
// Over the arguments.
void glu_backward_(const at::Tensor& dout, at::Tensor& gate, at::Tensor& up, RunGlu run);
void glu_packed_backward_(const at::Tensor& dout, at::Tensor& gate_up, RunGlu run);

}  // namespace liger
