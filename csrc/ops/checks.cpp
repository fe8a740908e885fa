#include "ops/checks.h"

#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

namespace liger {

const char* dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return "float64";
    case at::kFloat:
      return "float32";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kLong:
      return "int64";
    case at::kInt:
      return "int32";
    case at::kShort:
      return "int16";
    case at::kChar:
      return "int8";
    case at::kByte:
      return "uint8";
    case at::kBool:
      return "bool";
    default:
      return c10::toString(dtype);
  }
}

void check_floating(const Argument& arg) {
  const auto dtype = arg.tensor.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble,
      "liger::", arg.op, ": ", arg.name, " must be float64, float32, bfloat16 or float16, got ",
      dtype_name(dtype));
}

void check_dim_at_least(const Argument& arg, int64_t dim) {
  TORCH_CHECK_VALUE(arg.tensor.dim() >= dim, "liger::", arg.op, ": ", arg.name, " must have at least ", dim,
      dim == 1 ? " dimension" : " dimensions", ", got shape ", arg.tensor.sym_sizes());
}

void check_dim(const Argument& arg, int64_t dim) {
  TORCH_CHECK_VALUE(arg.tensor.dim() == dim, "liger::", arg.op, ": ", arg.name, " must be ", dim,
      "-D, got shape ", arg.tensor.sym_sizes());
}

void check_same_device(const Argument& arg, const Argument& reference) {
  TORCH_CHECK_VALUE(arg.tensor.device() == reference.tensor.device(), "liger::", arg.op, ": ", arg.name,
      " must be on ", reference.tensor.device(), " (device of ", reference.name, "), got ",
      arg.tensor.device());
}

void check_same_dtype(const Argument& arg, const Argument& reference) {
  TORCH_CHECK_TYPE(arg.tensor.scalar_type() == reference.tensor.scalar_type(), "liger::", arg.op, ": ",
      arg.name, " must have dtype ", dtype_name(reference.tensor.scalar_type()), " (dtype of ",
      reference.name, "), got ", dtype_name(arg.tensor.scalar_type()));
}

namespace {

bool equal_sizes(c10::SymIntArrayRef sizes, c10::SymIntArrayRef expected) {
  if (sizes.size() != expected.size()) return false;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (!sizes[i].sym_eq(expected[i]).expect_true(__FILE__, __LINE__)) return false;
  }
  return true;
}

}  // namespace

void check_same_shape(const Argument& arg, const Argument& reference) {
  TORCH_CHECK_VALUE(equal_sizes(arg.tensor.sym_sizes(), reference.tensor.sym_sizes()), "liger::", arg.op,
      ": ", arg.name, " must have shape ", reference.tensor.sym_sizes(), " (shape of ", reference.name,
      "), got ", arg.tensor.sym_sizes());
}

void check_leading_shape(const Argument& arg, const Argument& reference, int64_t dims) {
  const auto expected = reference.tensor.sym_sizes().slice(0, dims);
  TORCH_CHECK_VALUE(equal_sizes(arg.tensor.sym_sizes(), expected), "liger::", arg.op, ": ", arg.name,
      " must have shape ", expected, " (leading dimensions of ", reference.name, "), got ",
      arg.tensor.sym_sizes());
}

void check_same_dtype_or_float32(const Argument& arg, const Argument& reference) {
  const auto dtype = arg.tensor.scalar_type();
  const auto expected = reference.tensor.scalar_type();
  const bool wider = dtype == at::kFloat && (expected == at::kBFloat16 || expected == at::kHalf);
  TORCH_CHECK_TYPE(dtype == expected || wider, "liger::", arg.op, ": ", arg.name, " must have dtype ",
      dtype_name(expected), " (dtype of ", reference.name, ") or float32 beside a 16-bit ", reference.name,
      ", got ", dtype_name(dtype));
}

void check_vector(const Argument& arg, const c10::SymInt& size, const char* meaning, const char* of) {
  TORCH_CHECK_VALUE(
      arg.tensor.dim() == 1 && arg.tensor.sym_size(0).sym_eq(size).expect_true(__FILE__, __LINE__),
      "liger::", arg.op, ": ", arg.name, " must be 1-D of size ", size, " (", meaning, of, "), got ",
      arg.tensor.sym_sizes());
}

void check_row_statistic(const Argument& arg, const Argument& reference) {
  check_same_device(arg, reference);
  const auto dtype = accumulate_type(reference.tensor.scalar_type());
  TORCH_CHECK_TYPE(arg.tensor.scalar_type() == dtype, "liger::", arg.op, ": ", arg.name, " must have dtype ",
      dtype_name(dtype), ", got ", dtype_name(arg.tensor.scalar_type()));
  check_leading_shape(arg, reference, reference.tensor.dim() - 1);
}

}  // namespace liger
