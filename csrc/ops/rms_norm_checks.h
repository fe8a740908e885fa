#pragma once

// The argument checks that rms_norm and add_rms_norm share; messages name the operator and the argument that
// is normalised. They return whether n is rounded to x's dtype.

#include <string_view>

#include "ops/checks.h"

namespace liger {

bool check_rms_norm_arguments(
    const Argument& x, const std::optional<at::Tensor>& weight, double eps, std::string_view casting_mode);
bool check_rms_norm_backward_arguments(const at::Tensor& dy, const Argument& x,
    const std::optional<at::Tensor>& weight, const at::Tensor& rstd, std::string_view casting_mode,
    bool need_dweight);

}  // namespace liger
