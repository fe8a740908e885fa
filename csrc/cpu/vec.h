// Included once per instruction set, inside no namespace, after CPU_CAPABILITY is defined. See kernels.h.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include "cpu/kernels.h"

namespace liger::cpu {
inline namespace CPU_CAPABILITY {

using at::vec::Vectorized;

// float for 16-bit and float32, double for float64.
template <typename T>
using Accumulate = at::opmath_type<T>;

// body(integral_constant<int, i>{}) for every i below N. Unrolled by the language, so that arrays of packs
// indexed by i live in registers.
template <typename Body, int... i>
inline void unroll(const Body& body, std::integer_sequence<int, i...>) {
  (body(std::integral_constant<int, i>{}), ...);
}
template <int N, typename Body>
inline void unroll(const Body& body) {
  unroll(body, std::make_integer_sequence<int, N>{});
}

// The elements of one Vectorized<T>, widened to the accumulate type: two vectors for 16-bit T, one otherwise.
template <typename T>
struct Pack {
  using A = Accumulate<T>;
  using V = Vectorized<A>;
  static constexpr int kVectors = sizeof(T) < sizeof(A) ? 2 : 1;
  static constexpr int64_t kSize = V::size() * kVectors;

  V v[kVectors];

  static Pack fill(A value) {
    Pack p;
    unroll<kVectors>([&](auto i) { p.v[i] = V(value); });
    return p;
  }

  // `count` elements of S (T itself, or the accumulate type) from `from`; the lanes beyond count are 0.
  template <typename S>
  static Pack load(const S* from, int64_t count = kSize) {
    Pack p;
    if constexpr (std::is_same_v<S, A>) {
      unroll<kVectors>([&](auto i) {
        const int64_t rest = std::clamp<int64_t>(count - i * V::size(), 0, V::size());
        p.v[i] = rest == V::size() ? V::loadu(from + i * V::size())
            : rest > 0             ? V::loadu(from + i * V::size(), rest)
                                   : V(A(0));
      });
    } else {
      static_assert(std::is_same_v<S, T>);
      const auto narrow = count == kSize ? Vectorized<T>::loadu(from) : Vectorized<T>::loadu(from, count);
      std::tie(p.v[0], p.v[1]) = at::vec::convert_to_float<T>(narrow);
    }
    return p;
  }

  void store(T* to, int64_t count = kSize) const {
    if constexpr (kVectors == 1) {
      count == kSize ? v[0].store(to) : v[0].store(to, count);
    } else {
      const auto narrow = at::vec::convert_from_float<T>(v[0], v[1]);
      count == kSize ? narrow.store(to) : narrow.store(to, count);
    }
  }

  void store_wide(A* to, int64_t count = kSize) const {
    unroll<kVectors>([&](auto i) {
      const int64_t rest = std::clamp<int64_t>(count - i * V::size(), 0, V::size());
      if (rest > 0) v[i].store(to + i * V::size(), rest);
    });
  }

  // The first `count` elements; 0 in the other lanes.
  Pack first(int64_t count) const {
    if (count == kSize) return *this;
    Pack p;
    for (int i = 0; i < kVectors; ++i) {
      p.v[i] = V::set(V(A(0)), v[i], std::clamp<int64_t>(count - i * V::size(), 0, V::size()));
    }
    return p;
  }

  // Each element rounded to T, as storing and loading it would.
  Pack rounded() const {
    if constexpr (kVectors == 1) {
      return *this;
    } else {
      Pack p;
      std::tie(p.v[0], p.v[1]) = at::vec::convert_to_float<T>(at::vec::convert_from_float<T>(v[0], v[1]));
      return p;
    }
  }

  A sum() const {
    V total = v[0];
    if constexpr (kVectors == 2) total = total + v[1];
    return at::vec::vec_reduce_all<A>([](V& a, V& b) { return a + b; }, total);
  }

  A max() const {
    V most = v[0];
    if constexpr (kVectors == 2) most = at::vec::maximum(most, v[1]);
    return at::vec::vec_reduce_all<A>([](V& a, V& b) { return at::vec::maximum(a, b); }, most);
  }
};

template <typename T, typename F, typename... Rest>
inline Pack<T> map(const F& f, const Pack<T>& first, const Rest&... rest) {
  Pack<T> out;
  unroll<Pack<T>::kVectors>([&](auto i) { out.v[i] = f(first.v[i], rest.v[i]...); });
  return out;
}

template <typename T>
inline Pack<T> operator+(const Pack<T>& a, const Pack<T>& b) {
  return map<T>([](auto x, auto y) { return x + y; }, a, b);
}
template <typename T>
inline Pack<T> operator-(const Pack<T>& a, const Pack<T>& b) {
  return map<T>([](auto x, auto y) { return x - y; }, a, b);
}
template <typename T>
inline Pack<T> operator*(const Pack<T>& a, const Pack<T>& b) {
  return map<T>([](auto x, auto y) { return x * y; }, a, b);
}
template <typename T>
inline Pack<T> operator/(const Pack<T>& a, const Pack<T>& b) {
  return map<T>([](auto x, auto y) { return x / y; }, a, b);
}
template <typename T>
inline Pack<T> multiply_add(const Pack<T>& a, const Pack<T>& b, const Pack<T>& c) {
  return map<T>([](auto x, auto y, auto z) { return at::vec::fmadd(x, y, z); }, a, b, c);
}

// N sums along rows, each in two levels: rounding errors grow with the square root of the terms of each
// level, not of all of them.
template <typename T, int N = 1>
class RunningSums {
 public:
  RunningSums() {
    unroll<N>([&](auto i) { settled_[i] = recent_[i] = Pack<T>::fill(0); });
  }
  void add(int i, const Pack<T>& term) { recent_[i] = recent_[i] + term; }
  void add_product(int i, const Pack<T>& a, const Pack<T>& b) { recent_[i] = multiply_add(a, b, recent_[i]); }
  // After one term for each sum.
  void advance() {
    if (C10_LIKELY(++count_ < kTerms)) return;
    unroll<N>([&](auto i) {
      settled_[i] = settled_[i] + recent_[i];
      recent_[i] = Pack<T>::fill(0);
    });
    count_ = 0;
  }
  Accumulate<T> total(int i) const { return (settled_[i] + recent_[i]).sum(); }

 private:
  static constexpr int kTerms = 32;

  Pack<T> settled_[N], recent_[N];
  int count_ = 0;
};

// body(start, count) over [0, size) in packs of T. The full packs pass a compile-time count, so that the
// common path holds no partial loads.
template <typename T, typename Body>
inline void for_each_pack(int64_t size, const Body& body) {
  constexpr int64_t step = Pack<T>::kSize;
  int64_t start = 0;
  for (; start + step <= size; start += step) body(start, std::integral_constant<int64_t, step>{});
  if (start < size) body(start, size - start);
}

// Asks for the cache lines of a row that is soon read, or written, as a loop over packs passes column i.
// Harmless beyond the end of the tensor.
template <bool kWrite = false, typename T>
inline void prefetch(const T* row, int64_t i) {
  if (i * sizeof(T) % 64 == 0) __builtin_prefetch(row + i, kWrite);
}

// Writes to every page of [to, to + size), whose contents are not yet written. New memory has no pages before
// its first write, and each prefetch of a line without one is a slow search in vain.
template <typename T>
inline void touch_pages(T* to, int64_t size) {
  for (int64_t i = 0; i < size; i += 4096 / sizeof(T)) to[i] = T(0);
  if (size > 0) to[size - 1] = T(0);
}

// body(row, integral_constant<int, n>) over [begin, end), n = kRows rows at a time and the rest one by one.
template <int kRows, typename Body>
inline void for_each_row_group(int64_t begin, int64_t end, const Body& body) {
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) body(row, std::integral_constant<int, kRows>{});
  for (; row < end; ++row) body(row, std::integral_constant<int, 1>{});
}

// Elements worth handing to a thread: enough that the fork costs less than the work.
constexpr int64_t kGrain = 32768;

inline int64_t row_grain(int64_t cols) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cols)); }

// f(T{}) for the dtype, one of those that checks.h admits.
template <typename F>
inline void dispatch_floating(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kBFloat16:
      return f(at::BFloat16{});
    case at::kHalf:
      return f(at::Half{});
    case at::kDouble:
      return f(double{});
    default:
      TORCH_INTERNAL_ASSERT(false, "unexpected dtype ", dtype);
  }
}

// f(T{}, S{}) where S is T or the accumulate type of T (a float32 weight beside 16-bit activations).
template <typename F>
inline void dispatch_floating_pair(at::ScalarType dtype, at::ScalarType side_dtype, const F& f) {
  dispatch_floating(dtype, [&](auto element) {
    using T = decltype(element);
    if (side_dtype == dtype) {
      f(T{}, T{});
    } else {
      f(T{}, Accumulate<T>{});
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace liger::cpu
