#pragma once

// Reductions in a fixed order, with the result in every thread.

namespace liger::cuda {

// Sum over WIDTH neighbouring lanes of a warp, in each of them. `lanes` are those that take part.
template <int WIDTH = 32, typename A>
__device__ __forceinline__ A warp_sum(A value, unsigned int lanes = 0xffffffffu) {
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(lanes, value, offset);
  return value;
}

// N sums over WIDTH neighbouring lanes at once: with every exchange a lane hands half of the sums over to its
// partner, until WIDTH / kSumSlots<N> neighbours own the same one. That takes about N exchanges in place of
// N * log2(WIDTH), and adds in the order of warp_sum.
template <int N>
inline constexpr int kSumSlots = N <= 1 ? 1 : 2 * kSumSlots<(N + 1) / 2>;

template <int WIDTH, typename A, int N>
__device__ __forceinline__ A warp_sums(const A (&values)[N], unsigned int lanes) {
  if constexpr (N == 1) {
    return warp_sum<WIDTH>(values[0], lanes);
  } else {
    static_assert(kSumSlots<N> <= WIDTH);
    constexpr int kHalf = kSumSlots<N> / 2;
    const bool upper = (threadIdx.x & (WIDTH / 2)) != 0;
    A sums[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const A first = values[i], second = i + kHalf < N ? values[i + kHalf] : A(0);
      sums[i] = (upper ? second : first) + __shfl_xor_sync(lanes, upper ? first : second, WIDTH / 2);
    }
    return warp_sums<WIDTH / 2>(sums, lanes);
  }
}

// N sums over the TPR threads that share a row, in each of them and in a fixed order. RPB rows share a block;
// a row is half a warp, a warp, or the whole block.
//
// One barrier a call: two buffers alternate, so a thread that runs ahead writes where nobody reads any more
// (whoever reads the sums of the call before last would not have passed the last call's barrier).
template <typename A, int N, int TPR, int RPB>
class RowSum {
  static_assert(TPR == 16 || TPR == 32 || RPB == 1);
  static constexpr int kWarps = TPR < 32 ? 1 : TPR / 32;
  static_assert(kWarps <= 32 && (kWarps & (kWarps - 1)) == 0);
  static constexpr int kWidth = TPR < 32 ? TPR : 32;
  // Lanes of a warp that own the same sum.
  static constexpr int kLanes = kWidth / kSumSlots<N>;

 public:
  struct Storage {
    A warps[2][kWarps][kSumSlots<N>];
  };

  __device__ __forceinline__ explicit RowSum(Storage& storage) : storage_(storage) {}

  __device__ __forceinline__ void all(A (&values)[N]) {
    // The halves of a warp may have different numbers of rows, so each waits for its own lanes alone.
    const unsigned int lanes =
        kWidth == 32 ? 0xffffffffu : ((1u << kWidth % 32) - 1) << (threadIdx.x % 32 / kWidth * kWidth);
    A own = warp_sums<kWidth>(values, lanes);
    if constexpr (kWarps > 1) {
      auto& warps = storage_.warps[buffer_];
      buffer_ ^= 1;
      const int slot = threadIdx.x % kWidth / kLanes;
      if (threadIdx.x % kLanes == 0) warps[threadIdx.x / 32][slot] = own;
      __syncthreads();
      // The lanes that own a sum share out the warps.
      constexpr int kShare = kWarps > kLanes ? kWarps / kLanes : 1;
      own = 0;
#pragma unroll
      for (int i = 0; i < kShare; ++i) own += warps[(i * kLanes + threadIdx.x % kLanes) % kWarps][slot];
#pragma unroll
      for (int offset = (kWarps < kLanes ? kWarps : kLanes) / 2; offset > 0; offset /= 2) {
        own += __shfl_xor_sync(lanes, own, offset);
      }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = N == 1 ? own : __shfl_sync(lanes, own, i * kLanes, kWidth);
    }
  }

  __device__ __forceinline__ A all(A value) {
    static_assert(N == 1);
    A values[1] = {value};
    all(values);
    return values[0];
  }

 private:
  Storage& storage_;
  int buffer_ = 0;
};

}  // namespace liger::cuda
