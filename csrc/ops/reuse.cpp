#include "ops/reuse.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <c10/core/Allocator.h>
#include <c10/core/GradMode.h>

namespace liger {

namespace {

// Whether there is no other reference to the tensor. A Python object that was made for it has one, and lives
// on by the tensor's own reference to it when no variable has it any more.
bool has_one_owner(const at::Tensor& tensor) {
  if (tensor.use_count() == 1) return true;
  return tensor.use_count() == 2 && tensor.unsafeGetTensorImpl()->pyobj_slot()->has_unique_reference();
}

}  // namespace

bool can_overwrite(const at::Tensor& tensor) {
  if (at::GradMode::is_enabled()) return false;
  if (at::isTensorSubclassLike(tensor) || !(tensor.is_cpu() || tensor.is_cuda())) return false;
  if (!has_one_owner(tensor) || tensor.storage().use_count() != 1) return false;
  if (!tensor.is_contiguous()) return false;
  return tensor.storage().data_ptr().get_deleter() ==
      c10::GetAllocator(tensor.device().type())->raw_deleter();
}

}  // namespace liger
