#pragma once

// Element types, conversions and 16-byte vectors.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace liger::cuda {

// float for 16-bit and float32 elements, double for float64.
template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateOf<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(Accumulate<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// x rounded to T, as storing and loading it would.
template <typename T>
__device__ __forceinline__ Accumulate<T> rounded(Accumulate<T> x) {
  return widen(narrow<T>(x));
}

// N elements, loaded and stored at once; the address is a multiple of the size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T data[N];

  __device__ __forceinline__ static Vec load(const T* from) { return *reinterpret_cast<const Vec*>(from); }
  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<Vec*>(to) = *this; }
};

// N elements as registers hold them best: two 16-bit elements in one. As an array of 16-bit elements each
// would take a register of its own, and instructions to take the pair apart and to put it together again.
template <typename T, int N>
struct Packed {
  using A = Accumulate<T>;
  static constexpr bool kPairs = sizeof(T) == 2 && N % 2 == 0;
  using Word = std::conditional_t<kPairs, uint32_t, T>;
  static constexpr int kWords = kPairs ? N / 2 : N;
  // Words a load or store takes: 16 bytes at most, whose multiple the address is.
  static constexpr int kChunk = sizeof(Word) * kWords > 16 ? 16 / sizeof(Word) : kWords;

  Word words[kWords];

  __device__ __forceinline__ static Packed load(const T* from) {
    Packed packed;
#pragma unroll
    for (int i = 0; i < kWords; i += kChunk) {
      const auto chunk = Vec<Word, kChunk>::load(reinterpret_cast<const Word*>(from) + i);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) packed.words[i + j] = chunk.data[j];
    }
    return packed;
  }

  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kWords; i += kChunk) {
      Vec<Word, kChunk> chunk;
#pragma unroll
      for (int j = 0; j < kChunk; ++j) chunk.data[j] = words[i + j];
      chunk.store(reinterpret_cast<Word*>(to) + i);
    }
  }

  __device__ __forceinline__ A operator[](int i) const {
    if constexpr (!kPairs) {
      return widen(words[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    } else {
      const auto pair = reinterpret_cast<const __half2&>(words[i / 2]);
      return i % 2 == 0 ? __low2float(pair) : __high2float(pair);
    }
  }

  __device__ __forceinline__ static Packed narrowed(const A (&from)[N]) {
    Packed packed;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (!kPairs) {
        packed.words[i] = narrow<T>(from[i]);
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const auto pair = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
        packed.words[i] = reinterpret_cast<const uint32_t&>(pair);
      } else {
        const auto pair = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
        packed.words[i] = reinterpret_cast<const uint32_t&>(pair);
      }
    }
    return packed;
  }
};

// Each value rounded to T.
template <typename T, int N>
__device__ __forceinline__ void round_all(Accumulate<T> (&values)[N]) {
  const auto packed = Packed<T, N>::narrowed(values);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = packed[i];
}

// W beside T may be wider (a float32 weight with bf16 activations): N elements as 16-byte loads.
template <typename T, int N>
__device__ __forceinline__ void load_wide(const T* from, Accumulate<T> (&to)[N]) {
  const auto packed = Packed<T, N>::load(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = packed[i];
}

// The N elements of `from` at `col`, or N times `absent` where from is null.
template <typename T, int N>
__device__ __forceinline__ void load_wide_or(
    const T* from, int col, Accumulate<T> absent, Accumulate<T> (&to)[N]) {
  if (from != nullptr) {
    load_wide<T, N>(from + col, to);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = absent;
  }
}

template <typename T>
constexpr int kVecSize = 16 / sizeof(T);

}  // namespace liger::cuda
