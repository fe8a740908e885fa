#pragma once

// Thread-block clusters, and bulk copies into shared memory that run beside the threads: what sm_90 added.
// Under 900 everything here compiles to nothing, and no kernel that needs it may be launched.

#include <cstdint>

namespace liger::cuda {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// The blocks of the cluster, and this block's number among them. 1 and 0 without a cluster.
__device__ __forceinline__ int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
  std::uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
  return static_cast<int>(blocks);
#else
  return 1;
#endif
}

__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

// A barrier of all threads of the cluster. What a thread did before is seen by all after it.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// A barrier in shared memory for one arrival a phase and the bytes that this arrival announces. Bytes may
// come before they are announced.
struct CopyBarrier {
  std::uint64_t state;

  __device__ __forceinline__ void init() {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&state)) : "memory");
#endif
  }

  // Completes the phase once `bytes` have been copied; what the thread wrote before is seen by those that
  // waited.
  __device__ __forceinline__ void arrive(int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)), "r"(bytes)
        : "memory");
#endif
  }

  __device__ __forceinline__ void wait(int parity) {
#if __CUDA_ARCH__ >= 900
    std::uint32_t done;
    do {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n"
          "}"
          : "=r"(done)
          : "r"(shared_address(&state)), "r"(parity)
          : "memory");
    } while (done == 0);
#endif
  }
};

// Makes initialised barriers known to the units that copy and, past the next cluster barrier, to the cluster.
__device__ __forceinline__ void fence_copy_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// *pointer = value in the shared memory of a block of the cluster, asynchronously, counted by a barrier of
// that block: `pointer` and `barrier` are where those lie in this block's. Neither orders any other access.
template <typename V>
__device__ __forceinline__ void send_to_block(V* pointer, const V& value, CopyBarrier& barrier, int rank) {
  static_assert(sizeof(V) % 16 == 0 && alignof(V) >= 16);
#if __CUDA_ARCH__ >= 900
  std::uint32_t address, remote_barrier;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(remote_barrier)
      : "r"(shared_address(&barrier.state)), "r"(rank));
  const auto* words = reinterpret_cast<const uint4*>(&value);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(V) / 16); ++i) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::
            "r"(address + 16 * i),
        "r"(words[i].x), "r"(words[i].y), "r"(words[i].z), "r"(words[i].w), "r"(remote_barrier)
        : "memory");
  }
#endif
}

// One thread starts the copy of `bytes` from global to shared memory; all three are multiples of 16.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, CopyBarrier& barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&barrier.state))
      : "memory");
#endif
}

}  // namespace liger::cuda
