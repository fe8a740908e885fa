#pragma once

// The tail of the normal distribution in float32 arithmetic, for any vector type and device:
//
//   (1 - Phi(z)) / exp(-z^2 / 2) = p(t),  t = 1 / (1 + 0.28 z),  z >= 0,
//
// with a polynomial p fitted for the least relative error, 1.7e-7 over all z. It costs a fraction of erfc,
// shares the exponential with the density, and keeps the relative precision that 1 + erf loses in the tail.

#ifdef __CUDACC__
#define LIGER_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LIGER_HOST_DEVICE inline
#endif

namespace liger {

constexpr float kNormalTailScale = 0.28f;

template <typename V>
LIGER_HOST_DEVICE V normal_tail_polynomial(const V& t) {
  V sum(0.024733691660980918f);
  sum = sum * t + V(-0.0936470791429789f);
  sum = sum * t + V(0.09251468722393308f);
  sum = sum * t + V(-0.0065220958750166905f);
  sum = sum * t + V(0.07280956036275466f);
  sum = sum * t + V(0.08362163653058743f);
  sum = sum * t + V(0.10308593007281865f);
  sum = sum * t + V(0.11169972562056282f);
  sum = sum * t + V(0.11170385889468834f);
  return sum * t;
}

}  // namespace liger

#undef LIGER_HOST_DEVICE
