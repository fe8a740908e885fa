// Included once per instruction set; see kernels.h. Formulas: ops/swiglu.h, ops/geglu.h.

#include "ops/glu_rows.h"
#include "ops/normal_tail.h"

namespace liger::cpu {
inline namespace CPU_CAPABILITY {

// Activations on vectors of the accumulate type of T: the value, and for backward the value and the
// derivative.

struct Silu {
  template <typename V>
  static V sigmoid(const V& x) {
    const V one(1);
    return one / (one + x.neg().exp());
  }

  template <typename T, typename V>
  static V value(const V& x) {
    return x * sigmoid(x);
  }

  template <typename T, typename V>
  static void value_and_slope(const V& x, V& value, V& slope) {
    const V s = sigmoid(x);
    value = x * s;
    slope = s + value * (V(1) - s);
  }
};

// A distribution function and its complement: with `tail` the smaller of the two, Phi(x) is tail left of 0
// and 1 - tail right of it.
template <typename V>
inline V distribution(const V& x, const V& tail) {
  return V::blendv(V(1) - tail, tail, x < V(0));
}

// Phi(x) = sigmoid(2 u), and with e = exp(-2 |u|):  Phi(-|x|) = e / (1 + e),  Phi' = Phi (1 - Phi) 2 u'.
struct GeluTanh {
  // 2 sqrt(2 / pi), and 0.044715 times that.
  static constexpr double kLinear = 1.5957691216057308;
  static constexpr double kCubic = 0.044715 * kLinear;

  template <typename V>
  static V tail(const V& x) {
    const V size = x.abs();
    const V e = (size * (V(kLinear) + V(kCubic) * size * size)).neg().exp();
    return e / (V(1) + e);
  }

  template <typename T, typename V>
  static V value(const V& x) {
    return x * distribution(x, tail(x));
  }

  template <typename T, typename V>
  static void value_and_slope(const V& x, V& value, V& slope) {
    const V t = tail(x);
    const V phi = distribution(x, t);
    // The tail is 0 long before this bound, beyond which u' could overflow and 0 * infinity is no slope.
    const V bounded = at::vec::clamp(x, V(-64), V(64));
    const V inner_slope = V(kLinear) + V(3 * kCubic) * bounded * bounded;
    value = x * phi;
    slope = phi + bounded * inner_slope * (t * (V(1) - t));
  }
};

struct GeluErf {
  static constexpr double kSqrtHalf = 0.7071067811865476;
  static constexpr double kInvSqrtTwoPi = 0.3989422804014327;

  template <typename V>
  static V bell(const V& x) {
    return (x * x * V(-0.5)).exp();
  }

  // Phi(-|x|); `bell` is a function so that erfc, which does without, does not pay for it.
  template <typename T, typename V, typename Bell>
  static V tail(const V& x, const Bell& bell) {
    if constexpr (sizeof(T) == 2) {
      return bell() * normal_tail_polynomial(V(1) / (V(1) + V(kNormalTailScale) * x.abs()));
    } else {
      return V(0.5) * (x.abs() * V(kSqrtHalf)).erfc();
    }
  }

  template <typename T, typename V>
  static V value(const V& x) {
    return x * distribution(x, tail<T>(x, [&] { return bell(x); }));
  }

  template <typename T, typename V>
  static void value_and_slope(const V& x, V& value, V& slope) {
    const V b = bell(x);
    const V phi = distribution(x, tail<T>(x, [&] { return b; }));
    value = x * phi;
    slope = phi + x * (V(kInvSqrtTwoPi) * b);
  }
};

template <typename F>
inline void dispatch_activation(GluActivation activation, const F& f) {
  switch (activation) {
    case GluActivation::kSilu:
      return f(Silu{});
    case GluActivation::kGeluTanh:
      return f(GeluTanh{});
    case GluActivation::kGeluErf:
      return f(GeluErf{});
  }
}

// body(row, begin, end) over spans of columns: whole rows where there are many, pieces of the row where there
// is one.
template <typename Body>
inline void for_each_span(int64_t rows, int64_t cols, const Body& body) {
  if (rows == 1) {
    at::parallel_for(0, cols, kGrain, [&](int64_t begin, int64_t end) { body(0, begin, end); });
  } else {
    at::parallel_for(0, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(row, 0, cols);
    });
  }
}

inline void glu_forward(const GluRows& args, GluActivation activation) {
  dispatch_floating(args.dtype, [&](auto element) {
    using T = decltype(element);
    using P = Pack<T>;
    dispatch_activation(activation, [&](auto act) {
      for_each_span(args.rows, args.cols, [&](int64_t row, int64_t begin, int64_t end) {
        const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride + begin;
        const T* up = static_cast<const T*>(args.up) + row * args.up_stride + begin;
        T* out = static_cast<T*>(args.out) + row * args.cols + begin;
        for_each_pack<T>(end - begin, [&](int64_t i, auto count) {
          const auto value =
              map<T>([&](auto x) { return act.template value<T>(x); }, P::load(gate + i, count));
          (value.rounded() * P::load(up + i, count)).store(out + i, count);
        });
      });
    });
  });
}

inline void glu_backward(const GluRows& args, GluActivation activation) {
  dispatch_floating(args.dtype, [&](auto element) {
    using T = decltype(element);
    using P = Pack<T>;
    dispatch_activation(activation, [&](auto act) {
      for_each_span(args.rows, args.cols, [&](int64_t row, int64_t begin, int64_t end) {
        const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride + begin;
        const T* up = static_cast<const T*>(args.up) + row * args.up_stride + begin;
        const T* dout = static_cast<const T*>(args.dout) + row * args.dout_stride + begin;
        T* dgate = static_cast<T*>(args.dgate) + row * args.grad_stride + begin;
        T* dup = static_cast<T*>(args.dup) + row * args.grad_stride + begin;
        for_each_pack<T>(end - begin, [&](int64_t i, auto count) {
          // All is read before anything is written: gradients may go over gate and up.
          const auto g = P::load(gate + i, count);
          const auto u = P::load(up + i, count);
          const auto d = P::load(dout + i, count);
          P value, slope;
          for (int k = 0; k < P::kVectors; ++k)
            act.template value_and_slope<T>(g.v[k], value.v[k], slope.v[k]);
          (d * value).store(dup + i, count);
          (d * u * slope).store(dgate + i, count);
        });
      });
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace liger::cpu
