#pragma once

// Dynamic shared memory beyond what every kernel may have.

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/CallOnce.h>

#include <array>

namespace liger::cuda {

// Whether blocks may have `bytes` of dynamic shared memory beside the few hundred that sums take.
inline bool fits_shared_memory(int bytes) {
  return static_cast<std::size_t>(bytes) + 1024 <=
      at::cuda::getCurrentDeviceProperties()->sharedMemPerBlockOptin;
}

// Allows the kernel that an object of this type belongs to more dynamic shared memory than the 48 KiB that
// every kernel may have: once for every device.
class SharedMemoryLimit {
 public:
  template <typename Kernel>
  void raise(Kernel* kernel, int bytes) {
    c10::call_once(raised_[c10::cuda::current_device()], [&] {
      C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    });
  }

 private:
  std::array<c10::once_flag, C10_COMPILE_TIME_MAX_GPUS> raised_;
};

}  // namespace liger::cuda
