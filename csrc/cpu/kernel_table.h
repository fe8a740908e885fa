// Included once per instruction set; see kernels.h.

#include "cpu/vec.h"

#include "cpu/row_sums.h"

#include "cpu/cross_entropy_kernel.h"
#include "cpu/glu_kernel.h"
#include "cpu/layer_norm_kernel.h"
#include "cpu/rms_norm_kernel.h"
#include "cpu/rope_kernel.h"

namespace liger::cpu {
inline namespace CPU_CAPABILITY {

constexpr Kernels kKernelTable = {
    .rms_norm_forward = rms_norm_forward,
    .rms_norm_backward = rms_norm_backward,
    .layer_norm_forward = layer_norm_forward,
    .layer_norm_backward = layer_norm_backward,
    .rope = rope,
    .glu_forward = glu_forward,
    .glu_backward = glu_backward,
    .cross_entropy_forward = cross_entropy_forward,
    .cross_entropy_backward = cross_entropy_backward,
    .scale = scale,
};

}  // namespace CPU_CAPABILITY
}  // namespace liger::cpu
