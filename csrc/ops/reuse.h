#pragma once

// Gradients that take the memory of the saved tensors they are computed from.

#include <ATen/core/Tensor.h>

namespace liger {

// Whether the tensor is contiguous and nobody else can see what is in its memory, so that whoever holds it
// may write to it although it was somebody's value: no other tensor, view or storage of Python's shares the
// memory, it came from the device's allocator (not from NumPy, a file or another process), no tracer watches,
// and no graph is made of what is computed.
//
// Of a saved tensor that is so in the last backward pass through its node, once the node has let go of it
// (BackwardNode::kOverwritesSaved) and if no variable, hook or other node has kept it.
bool can_overwrite(const at::Tensor& tensor);

}  // namespace liger
