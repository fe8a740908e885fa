#include "cuda/cross_entropy.cuh"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/shared_memory.h"
#include "ops/cross_entropy_rows.h"

namespace liger {

namespace {

template <typename A>
const A* pointer(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<A>() : nullptr;
}

template <typename A>
A* mutable_pointer(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<A>() : nullptr;
}

void totals_cuda(const CrossEntropyTotals& args) {
  const auto op = std::string_view(args.op) == "cross_entropy" ? cuda::TargetsOf::kCrossEntropy
                                                               : cuda::TargetsOf::kFusedLinearCrossEntropy;
  dispatch_accumulate(args.totals, [&](auto accumulate) {
    using A = decltype(accumulate);
    cuda::cross_entropy_totals_kernel<A><<<1, cuda::kTotalsThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
        args.target.const_data_ptr<int64_t>(), args.target.numel(), pointer<A>(args.weight), args.classes,
        pointer<A>(args.num_items), args.options.ignore_index, args.options.reduction == Reduction::kMean, op,
        args.totals.mutable_data_ptr<A>());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
cuda::CrossEntropyArguments<T> kernel_arguments(const CrossEntropyRows& args) {
  using A = cuda::Accumulate<T>;
  const bool gradient = args.dlogits.defined();
  return {.logits = static_cast<const T*>(args.logits.const_data_ptr()),
      .dlogits = gradient ? static_cast<T*>(args.dlogits.mutable_data_ptr()) : nullptr,
      .target = args.target.const_data_ptr<int64_t>(),
      .weight = pointer<A>(args.weight),
      .totals = args.totals.const_data_ptr<A>(),
      .dloss = pointer<A>(args.dloss),
      .ce = mutable_pointer<A>(args.ce),
      // Forward writes them, backward reads what was saved.
      .lse = const_cast<A*>(pointer<A>(args.lse)),
      .lse_low = const_cast<A*>(pointer<A>(args.lse_low)),
      .row_scale = mutable_pointer<A>(args.row_scale),
      .predicted = mutable_pointer<int64_t>(args.predicted),
      .rows = args.logits.size(0),
      .logits_stride = args.logits.stride(0),
      .dlogits_stride = gradient ? args.dlogits.stride(0) : 0,
      .cols = static_cast<int>(args.logits.size(1)),
      .dloss_stride = args.dloss.defined() ? static_cast<int>(args.dloss.dim()) : 0,
      .ignore_index = args.options.ignore_index,
      .label_smoothing = static_cast<A>(args.options.label_smoothing),
      .lse_square_scale = static_cast<A>(args.options.lse_square_scale),
      .softcap = static_cast<A>(args.options.softcap),
      .use_token_scaling = args.options.use_token_scaling,
      .divide = args.divide};
}

// launch(T{}, plain), the latter a compile-time boolean: neither soft-cap nor label smoothing.
template <typename F>
void dispatch_rows(const CrossEntropyRows& args, const F& launch) {
  // Columns are counted in 32 bits, up to four vectors a thread past the end.
  constexpr int64_t kMaxClasses = std::numeric_limits<int32_t>::max() - 4 * 1024 * 16;
  TORCH_CHECK_VALUE(args.logits.size(1) <= kMaxClasses, "liger::", args.op, ": at most ", kMaxClasses,
      " classes, got ", args.logits.size(1));
  cuda::dispatch_floating(args.logits.scalar_type(), [&](auto element) {
    const bool plain = args.options.softcap == 0 && args.options.label_smoothing == 0;
    plain ? launch(element, std::true_type{}) : launch(element, std::false_type{});
  });
}

// Small blocks keep several rows of a multiprocessor in flight, one row's reduction behind another's loads.
constexpr int kThreads = 256;

// launch(threads) with a compile-time constant, for kernels that write a row as long as they read it. Where
// it is read a second time it must not have left L2 (50 MiB on an H100), so long rows get larger blocks: 256
// KiB of rows a multiprocessor, or one row, are in flight.
template <typename T, typename F>
void dispatch_threads(int64_t cols, const F& launch) {
  const int64_t row_bytes = cols * static_cast<int64_t>(sizeof(T));
  if (row_bytes <= 32 * 1024 || std::is_same_v<T, double>) {
    launch(std::integral_constant<int, kThreads>{});
  } else if constexpr (!std::is_same_v<T, double>) {
    row_bytes <= 128 * 1024 ? launch(std::integral_constant<int, 512>{})
                            : launch(std::integral_constant<int, 1024>{});
  }
}

// A shape of cross_entropy_resident_kernel, with the blocks of it that a multiprocessor holds.
template <int THREADS, int SHARED, int HELD, int BLOCKS>
struct ResidentConfig {
  static constexpr int threads = THREADS, shared = SHARED, held = HELD, blocks = BLOCKS;
  static constexpr int vectors = THREADS * (SHARED + HELD);
  static constexpr int shared_bytes = THREADS * SHARED * 16;
};

// f(ResidentConfig) with the smallest that holds a row of `vectors`; false if none does.
template <typename F>
bool with_resident_config(int64_t vectors, const F& f) {
  using UpTo32K = ResidentConfig<256, 16, 0, 3>;
  using UpTo64K = ResidentConfig<512, 12, 4, 2>;
  using UpTo128K = ResidentConfig<1024, 12, 4, 1>;
  using UpTo160K = ResidentConfig<1024, 12, 8, 1>;
  if (vectors <= UpTo32K::vectors) return f(UpTo32K{});
  if (vectors <= UpTo64K::vectors) return f(UpTo64K{});
  if (vectors <= UpTo128K::vectors) return f(UpTo128K{});
  return vectors <= UpTo160K::vectors && f(UpTo160K{});
}

// Whether cross_entropy_resident_kernel has done it.
template <typename T>
bool launch_resident(const cuda::CrossEntropyArguments<T>& args) {
  constexpr int kVec = cuda::kVecSize<T>;
  if (args.cols % kVec != 0 || !cuda::aligned_pointers(args.logits, args.dlogits) ||
      !cuda::aligned_strides(sizeof(T), args.logits_stride, args.dlogits_stride)) {
    return false;
  }
  return with_resident_config(args.cols / kVec, [&](auto config) {
    if (!cuda::fits_shared_memory(config.shared_bytes)) return false;
    const auto kernel =
        cuda::cross_entropy_resident_kernel<T, config.threads, config.shared, config.held, config.blocks>;
    static cuda::SharedMemoryLimit limit;
    limit.raise(kernel, config.shared_bytes);
    const auto blocks = std::min<int64_t>(args.rows, cuda::multiprocessors() * config.blocks);
    kernel<<<static_cast<unsigned int>(blocks), config.threads, config.shared_bytes,
        at::cuda::getCurrentCUDAStream()>>>(args);
    return true;
  });
}

void forward_cuda(const CrossEntropyRows& args) {
  if (args.logits.size(0) == 0) return;
  const auto blocks = cuda::grid_size(args.op, args.logits.size(0), 1);
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto dispatch_argmax = [&](const auto& launch) {
    args.predicted.defined() ? launch(std::true_type{}) : launch(std::false_type{});
  };
  dispatch_rows(args, [&](auto element, auto plain) {
    using T = decltype(element);
    const auto arguments = kernel_arguments<T>(args);
    if constexpr (sizeof(T) == 2 && plain()) {
      if (args.dlogits.defined() && !args.predicted.defined() && launch_resident(arguments)) return;
    }
    dispatch_argmax([&](auto argmax) {
      if (!args.dlogits.defined()) {
        cuda::cross_entropy_forward_kernel<T, plain(), false, argmax(), kThreads>
            <<<blocks, kThreads, 0, stream>>>(arguments);
        return;
      }
      dispatch_threads<T>(args.logits.size(1), [&](auto threads) {
        cuda::cross_entropy_forward_kernel<T, plain(), true, argmax(), threads()>
            <<<blocks, threads(), 0, stream>>>(arguments);
      });
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void backward_cuda(const CrossEntropyRows& args) {
  if (args.logits.numel() == 0) return;
  const auto blocks = cuda::grid_size(args.op, args.logits.size(0), 1);
  const auto stream = at::cuda::getCurrentCUDAStream();
  dispatch_rows(args, [&](auto element, auto plain) {
    using T = decltype(element);
    dispatch_threads<T>(args.logits.size(1), [&](auto threads) {
      cuda::cross_entropy_backward_kernel<T, plain(), threads()>
          <<<blocks, threads(), 0, stream>>>(kernel_arguments<T>(args));
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void reduce_cuda(const CrossEntropyReduce& args) {
  const auto stream = at::cuda::getCurrentCUDAStream();
  const int64_t tokens = args.lse.numel();
  dispatch_accumulate(args.lse, [&](auto accumulate) {
    using A = decltype(accumulate);
    const cuda::CrossEntropyReduceArguments<A> arguments = {.ce = pointer<A>(args.ce),
        .lse = pointer<A>(args.lse),
        .row_scale = pointer<A>(args.row_scale),
        .totals = pointer<A>(args.totals),
        .target = pointer<int64_t>(args.target),
        .predicted = pointer<int64_t>(args.predicted),
        .loss = mutable_pointer<A>(args.loss),
        .z_loss = mutable_pointer<A>(args.z_loss),
        .token_accuracy = mutable_pointer<float>(args.token_accuracy),
        .tokens = tokens,
        .lse_square_scale = static_cast<A>(args.options.lse_square_scale)};
    if (args.options.reduction != Reduction::kNone) {
      cuda::cross_entropy_reduce_kernel<A><<<1, cuda::kTotalsThreads, 0, stream>>>(arguments);
    } else if (tokens > 0) {
      const auto blocks = cuda::grid_size("cross_entropy", tokens, kThreads);
      cuda::cross_entropy_unreduced_kernel<A><<<blocks, kThreads, 0, stream>>>(arguments);
    }
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void scale_cuda(const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& out) {
  const int64_t size = grad.numel();
  if (size == 0) return;
  cuda::dispatch_floating(grad.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto* from = static_cast<const T*>(grad.const_data_ptr());
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    const auto launch = [&](auto vec) {
      const int64_t per_block = static_cast<int64_t>(cuda::kScaleThreads) * vec();
      const int64_t wanted = (size + per_block - 1) / per_block;
      const auto blocks = static_cast<unsigned int>(std::min<int64_t>(wanted, 8 * cuda::multiprocessors()));
      cuda::scale_kernel<T, vec()><<<blocks, cuda::kScaleThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
          from, scale.const_data_ptr<cuda::Accumulate<T>>(), to, size);
    };
    size % cuda::kVecSize<T> == 0 && cuda::aligned_pointers(from, to)
        ? launch(std::integral_constant<int, cuda::kVecSize<T>>{})
        : launch(std::integral_constant<int, 1>{});
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

const CrossEntropyDevice kCrossEntropyCuda = {.totals = totals_cuda,
    .forward = forward_cuda,
    .backward = backward_cuda,
    .reduce = reduce_cuda,
    .scale = scale_cuda};

bool reads_logits_once_cuda(int64_t classes, c10::DeviceIndex device) {
  using T = __nv_bfloat16;
  if (classes % cuda::kVecSize<T> != 0) return false;
  const c10::cuda::CUDAGuard guard(device);
  return with_resident_config(
      classes / cuda::kVecSize<T>, [](auto config) { return cuda::fits_shared_memory(config.shared_bytes); });
}

}  // namespace liger
