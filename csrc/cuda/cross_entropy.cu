#include "cuda/cross_entropy.cuh"

#include <c10/cuda/CUDAMacros.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string_view>

#include "cuda/cross_entropy_one_read.cuh"
#include "cuda/launch.h"
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

// launch(threads) with a compile-time constant. Where the row is read a second time it must not have left L2
// (50 MiB on an H100), so long rows get larger blocks: 256 KiB of rows a multiprocessor, or one row, are in
// flight.
template <typename T, typename F>
void dispatch_threads(int64_t cols, const F& launch) {
  const int64_t row_bytes = cols * static_cast<int64_t>(sizeof(T));
  if (row_bytes <= 64 * 1024 || std::is_same_v<T, double>) {
    launch(std::integral_constant<int, kThreads>{});
  } else if constexpr (!std::is_same_v<T, double>) {
    row_bytes <= 128 * 1024 ? launch(std::integral_constant<int, 512>{})
                            : launch(std::integral_constant<int, 1024>{});
  }
}

constexpr int kStagedThreads = 512;
// Cluster sizes: 1, 2, ... kMaxRanks.
constexpr int kRanks = 5;
static_assert(1 << (kRanks - 1) == cuda::kMaxRanks);

// How cross_entropy_staged_kernel is launched. clusters: 0 where it cannot be.
struct StagedLaunch {
  int ranks, stages, stage_bytes, shared_bytes, clusters;
};

cudaLaunchConfig_t staged_config(
    cudaLaunchAttribute& cluster, const StagedLaunch& launch, cudaStream_t stream) {
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned int>(launch.ranks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned int>(launch.clusters * launch.ranks));
  config.blockDim = dim3(kStagedThreads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return config;
}

struct StagedCapacity {
  int shared_bytes, clusters;
};

// The shared memory for a block of which a multiprocessor is to hold `resident`, and how many clusters of
// `ranks` such blocks the device runs at once: 0 where it does not have such.
template <typename Kernel>
StagedCapacity query_capacity(Kernel kernel, int resident, int ranks) {
  const auto* properties = at::cuda::getCurrentDeviceProperties();
  cudaFuncAttributes attributes;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  // Under sm_90, and where the code of an older architecture runs, the kernel does nothing.
  if (properties->major < 9 || attributes.ptxVersion < 90) return {};
  const auto fixed = static_cast<int64_t>(attributes.sharedSizeBytes);
  const auto largest = static_cast<int64_t>(properties->sharedMemPerBlockOptin) - fixed;
  const auto share = static_cast<int64_t>(properties->sharedMemPerMultiprocessor) / resident -
      static_cast<int64_t>(properties->reservedSharedMemPerBlock) - fixed;
  const auto most = std::min(share, largest);
  if (most < 0) return {};
  StagedCapacity capacity{.shared_bytes = static_cast<int>(most / 128 * 128), .clusters = 0};
  cudaLaunchAttribute cluster;
  const auto config =
      staged_config(cluster, {.ranks = ranks, .shared_bytes = capacity.shared_bytes, .clusters = 1}, nullptr);
  const bool fits = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                        static_cast<int>(largest)) == cudaSuccess &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
          cudaSharedmemCarveoutMaxShared) == cudaSuccess &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&capacity.clusters, kernel, &config) == cudaSuccess;
  if (!fits) {
    cudaGetLastError();  // clears it
    capacity.clusters = 0;
  }
  return capacity;
}

// query_capacity, asked once of a device.
template <typename Kernel>
class StagedCapacities {
 public:
  StagedCapacity of(Kernel kernel, int resident, int log_ranks) {
    auto& known = known_[at::cuda::current_device()][resident - 1][log_ranks];
    uint64_t packed = known.load(std::memory_order_relaxed);
    if (packed == 0) {
      const auto capacity = query_capacity(kernel, resident, 1 << log_ranks);
      packed = kKnown | static_cast<uint64_t>(capacity.clusters) << 32 |
          static_cast<uint64_t>(capacity.shared_bytes);
      known.store(packed, std::memory_order_relaxed);
    }
    return {.shared_bytes = static_cast<int>(packed & 0xffffffffu),
        .clusters = static_cast<int>((packed & ~kKnown) >> 32)};
  }

 private:
  static constexpr uint64_t kKnown = uint64_t{1} << 63;
  std::atomic<uint64_t> known_[C10_COMPILE_TIME_MAX_GPUS][2][kRanks] = {};
};

// Two blocks a multiprocessor if their stages fit, of as few ranks as will do.
template <typename Kernel>
StagedLaunch plan_staged(
    StagedCapacities<Kernel>& capacities, Kernel kernel, int64_t rows, int64_t cols, int64_t vector) {
  for (const int resident : {2, 1}) {
    for (int log_ranks = 0; log_ranks < kRanks; ++log_ranks) {
      const int ranks = 1 << log_ranks;
      const int64_t per_block = (cols / vector + ranks - 1) / ranks;
      const int64_t stage_bytes = std::max<int64_t>(per_block, 1) * 16;
      const auto [shared_bytes, clusters] = capacities.of(kernel, resident, log_ranks);
      if (clusters == 0 || stage_bytes > shared_bytes / cuda::kMinStages) continue;
      return {.ranks = ranks,
          .stages = static_cast<int>(std::min<int64_t>(cuda::kMaxStages, shared_bytes / stage_bytes)),
          .stage_bytes = static_cast<int>(stage_bytes),
          .shared_bytes = shared_bytes,
          .clusters = static_cast<int>(std::min<int64_t>(clusters, rows))};
    }
  }
  return {};
}

// LIGER_OPS_CROSS_ENTROPY=two_pass leaves the kernels that read once aside, to measure and test the others.
bool two_pass_forced() {
  const char* value = std::getenv("LIGER_OPS_CROSS_ENTROPY");
  return value != nullptr && std::string_view(value) == "two_pass";
}

// Loss and gradient with one read, where a kernel for it fits the rows and the device.
template <typename T, bool PLAIN, bool ARGMAX>
bool launch_one_read(
    const CrossEntropyRows& args, const cuda::CrossEntropyArguments<T>& arguments, cudaStream_t stream) {
  constexpr int kVectors = 4;
  const int64_t rows = args.logits.size(0), cols = args.logits.size(1);
  const auto launch_registers = [&](auto threads) {
    if (cols > cuda::kRegistersClasses<T, threads(), kVectors>) return false;
    cuda::cross_entropy_registers_kernel<T, PLAIN, ARGMAX, threads(), kVectors>
        <<<cuda::grid_size(args.op, rows, 1), threads(), 0, stream>>>(arguments);
    return true;
  };
  if (launch_registers(std::integral_constant<int, 128>{}) ||
      launch_registers(std::integral_constant<int, 256>{}) ||
      launch_registers(std::integral_constant<int, 512>{})) {
    return true;
  }
  auto* kernel = cuda::cross_entropy_staged_kernel<T, PLAIN, ARGMAX, kStagedThreads>;
  static StagedCapacities<decltype(kernel)> capacities;
  const auto launch = plan_staged(capacities, kernel, rows, cols, cuda::kVecSize<T>);
  if (launch.clusters == 0) return false;
  cudaLaunchAttribute cluster;
  const auto config = staged_config(cluster, launch, stream);
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments, launch.stages, launch.stage_bytes));
  return true;
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
    dispatch_argmax([&](auto argmax) {
      if (!args.dlogits.defined()) {
        cuda::cross_entropy_forward_kernel<T, plain(), false, argmax(), kThreads>
            <<<blocks, kThreads, 0, stream>>>(arguments);
        return;
      }
      if constexpr (!std::is_same_v<T, double>) {
        if (!two_pass_forced() && launch_one_read<T, plain(), argmax()>(args, arguments, stream)) return;
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
    cuda::cross_entropy_backward_kernel<T, plain(), kThreads>
        <<<blocks, kThreads, 0, stream>>>(kernel_arguments<T>(args));
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

}  // namespace

const CrossEntropyDevice kCrossEntropyCuda = {
    .totals = totals_cuda, .forward = forward_cuda, .backward = backward_cuda, .reduce = reduce_cuda};

}  // namespace liger
