#include "ops/rows.h"

#include <c10/util/accumulate.h>

namespace liger {

Rows as_rows(const at::Tensor& x) {
  const int64_t cols = x.size(-1);
  const int64_t rows = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  if (x.is_contiguous()) return {x, rows, cols, cols};

  // Dimensions of size 1 have no say; the rest must nest exactly.
  bool foldable = cols == 1 || x.stride(-1) == 1;
  int64_t stride = 0;    // of the folded dimension; 0 while none was seen
  int64_t expected = 0;  // stride that the next outer dimension must have
  for (int64_t dim = x.dim() - 2; foldable && dim >= 0; --dim) {
    if (x.size(dim) == 1) continue;
    if (stride == 0) {
      stride = x.stride(dim);
      foldable = stride >= cols;
    } else {
      foldable = x.stride(dim) == expected;
    }
    expected = x.stride(dim) * x.size(dim);
  }
  if (!foldable) return {x.contiguous(), rows, cols, cols};
  return {x, rows, cols, stride == 0 ? cols : stride};
}

at::Tensor with_unit_last_stride(const at::Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

}  // namespace liger
