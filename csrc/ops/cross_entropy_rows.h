#pragma once

// Cross entropy over rows of logits, as the plain and the fused linear operator share it: the pieces that a
// device provides, and the operators written on top of them. Formulas: ops/cross_entropy.h.

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include "ops/cross_entropy.h"

namespace liger {

// Sums over all targets that every row needs, in the accumulate type:
//   0  divisor of ce: sum of the weights of the targets that count under "mean", 1 otherwise
//   1  divisor of z: number of those targets under "mean", 1 otherwise
//   2  sum of all class weights
// A divisor of 0 stands for "no target counts": loss and gradient are 0.
constexpr int64_t kTotals = 3;

struct CrossEntropyTotals {
  const char* op;
  at::Tensor target;     // [tokens] int64, contiguous
  at::Tensor weight;     // [classes] in the accumulate type, contiguous; undefined: all 1
  at::Tensor num_items;  // 1 element in the accumulate type, in place of both divisors; or undefined
  at::Tensor totals;     // out: [kTotals]
  int64_t classes;
  CrossEntropyOptions options;
};

// What forward leaves per row, [rows] each, in the accumulate type unless said otherwise.
struct CrossEntropyResults {
  at::Tensor ce, lse;
  at::Tensor lse_low;    // undefined unless kept
  at::Tensor row_scale;  // the factors of token scaling; undefined without
  at::Tensor predicted;  // int64; undefined unless asked for

  CrossEntropyResults(
      int64_t rows, const at::TensorOptions& stats, const CrossEntropyOptions& options, bool keep_lse_low);
};

struct CrossEntropyRows {
  const char* op;
  at::Tensor logits;   // [rows, classes], any row stride, unit column stride
  at::Tensor dlogits;  // [rows, classes] likewise; may be logits; undefined: no gradient
  at::Tensor target;   // [rows] int64, contiguous
  at::Tensor weight;   // [classes] in the accumulate type, contiguous; undefined: all 1
  at::Tensor totals;   // [kTotals]
  at::Tensor dloss;    // upstream gradient, 0-D or contiguous [rows]; undefined: 1
  // As in CrossEntropyResults; backward reads lse and lse_low alone.
  at::Tensor ce, lse, lse_low, row_scale, predicted;
  CrossEntropyOptions options;
  // Whether the gradient is divided as the loss is. If not, a power of two is left out of the divisors, the
  // one of frexp(totals[0]): the fused operator leaves it out in float16, where p / N would underflow, and
  // puts it back without another rounding.
  bool divide;
};

struct CrossEntropyReduce {
  at::Tensor ce, lse, row_scale, predicted;  // as in CrossEntropyResults
  at::Tensor target;                         // [tokens] int64, contiguous
  at::Tensor totals;                         // [kTotals]
  // out: 0-D, or [tokens] for "none"; loss may be ce, token_accuracy may be undefined
  at::Tensor loss, z_loss, token_accuracy;
  CrossEntropyOptions options;
};

// Tensors live on one device, which is the current one.
struct CrossEntropyDevice {
  // Also checks every target: IndexError on the CPU, a device assertion on
  // CUDA.
  void (*totals)(const CrossEntropyTotals&);
  // Writes ce and lse, and lse_low, row_scale, predicted and dlogits where they are defined.
  void (*forward)(const CrossEntropyRows&);
  // Reads lse and lse_low, writes dlogits.
  void (*backward)(const CrossEntropyRows&);
  void (*reduce)(const CrossEntropyReduce&);
  // out = grad * scale (one element, on the device); both contiguous, out may be grad.
  void (*scale)(const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& out);
};

extern const CrossEntropyDevice kCrossEntropyCpu;
extern const CrossEntropyDevice kCrossEntropyCuda;

// Whether a GPU computes loss and gradient of bfloat16 logits with so many classes from one read of them, so
// that a training step gains by it. Set by registration.cpp where there are CUDA kernels.
extern bool (*reads_logits_once)(int64_t classes, c10::DeviceIndex device);
bool reads_logits_once_cuda(int64_t classes, c10::DeviceIndex device);

// f(A{}) with A the accumulate type, which is the dtype of `stats`.
template <typename F>
void dispatch_accumulate(const at::Tensor& stats, const F& f) {
  stats.scalar_type() == at::kDouble ? f(double{}) : f(float{});
}

// The class weights as kernels read them; undefined stays undefined.
at::Tensor accumulate_weight(const std::optional<at::Tensor>& weight, at::ScalarType accumulate);

// The outputs of the operators from what forward left.
CrossEntropyOutputs cross_entropy_outputs(const CrossEntropyDevice& device,
    const CrossEntropyResults& results, const at::Tensor& target, const at::Tensor& totals,
    const CrossEntropyOptions& options);

// The kernels of the operators; registration.cpp binds them to a device (OnDevice).
CrossEntropyForward cross_entropy_forward_on(const CrossEntropyDevice& device, const at::Tensor& logits,
    const at::Tensor& target, const std::optional<at::Tensor>& weight, int64_t ignore_index,
    double label_smoothing, double lse_square_scale, std::optional<double> softcap,
    std::string_view reduction, const std::optional<at::Tensor>& num_items, bool use_token_scaling,
    bool return_token_accuracy, bool return_predicted_tokens, bool need_dlogits);
at::Tensor cross_entropy_backward_on(const CrossEntropyDevice& device, const at::Tensor& dloss,
    const at::Tensor& logits, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    const at::Tensor& lse, const at::Tensor& lse_low, const at::Tensor& totals, int64_t ignore_index,
    double label_smoothing, double lse_square_scale, std::optional<double> softcap,
    std::string_view reduction, bool use_token_scaling);
at::Tensor cross_entropy_scale_on(
    const CrossEntropyDevice& device, const at::Tensor& grad, const at::Tensor& scale);
void cross_entropy_scale_inplace_on(
    const CrossEntropyDevice& device, at::Tensor& grad, const at::Tensor& scale);

}  // namespace liger
