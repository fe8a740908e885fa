// Included once per instruction set; see kernels.h. Formulas: ops/glu.h.

namespace liger::cpu {
inline namespace CPU_CAPABILITY {

// value(x) is act(x); value_and_slope(x) is {act(x), act'(x)}.
template <typename T>
struct Silu {
  using V = Vectorized<Accumulate<T>>;

  static V value(V x) { return x / (V(1) + x.neg().exp()); }

  static std::pair<V, V> value_and_slope(V x) {
    const V s = V(1) / (V(1) + x.neg().exp());
    const V silu = x * s;
    return {silu, s + silu * (V(1) - s)};
  }
};

// (1 + tanh(u)) / 2 is sigmoid(2u), which keeps its digits where it is small.
template <typename T>
struct GeluTanh {
  using A = Accumulate<T>;
  using V = Vectorized<A>;
  static constexpr A kCubic = 0.044715;

  // Beyond 30 the sigmoid is 0 or 1, and x^3 could overflow.
  static V clamped(V x) { return at::vec::clamp(x, V(-30), V(30)); }

  static V sigmoid_of_2u(V x) {
    const V scale(2 * std::sqrt(2 / M_PI));
    return V(1) / (V(1) + (scale * x * (V(1) + V(kCubic) * x * x)).neg().exp());
  }

  static V value(V x) { return x * sigmoid_of_2u(clamped(x)); }

  static std::pair<V, V> value_and_slope(V x) {
    const V bounded = clamped(x), s = sigmoid_of_2u(bounded);
    const V slope_of_2u = V(2 * std::sqrt(2 / M_PI)) * (V(1) + V(3 * kCubic) * bounded * bounded);
    return {x * s, s + bounded * s * (V(1) - s) * slope_of_2u};
  }
};

template <typename T>
struct Gelu {
  using V = Vectorized<Accumulate<T>>;

  static V phi(V x) { return V(0.5) * (x * V(-M_SQRT1_2)).erfc(); }

  static V value(V x) { return x * phi(x); }

  static std::pair<V, V> value_and_slope(V x) {
    const V p = phi(x);
    const V density = V(M_2_SQRTPI * M_SQRT1_2 / 2) * (V(-0.5) * x * x).exp();
    return {x * p, p + x * density};
  }
};

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

template <typename T, typename Act>
inline void glu_forward(const Glu& args) {
  using P = Pack<T>;
  for_each_span(args.rows, args.cols, [&](int64_t row, int64_t begin, int64_t end) {
    const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride + begin;
    const T* up = static_cast<const T*>(args.up) + row * args.up_stride + begin;
    T* out = static_cast<T*>(args.out) + row * args.cols + begin;
    for_each_pack<T>(end - begin, [&](int64_t i, auto count) {
      const auto activated = map<T>([](auto x) { return Act::value(x); }, P::load(gate + i, count));
      (activated.rounded() * P::load(up + i, count)).store(out + i, count);
    });
  });
}

template <typename T, typename Act>
inline void glu_backward(const Glu& args) {
  using P = Pack<T>;
  for_each_span(args.rows, args.cols, [&](int64_t row, int64_t begin, int64_t end) {
    const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride + begin;
    const T* up = static_cast<const T*>(args.up) + row * args.up_stride + begin;
    const T* dout = static_cast<const T*>(args.dout) + row * args.dout_stride + begin;
    T* dgate = static_cast<T*>(args.dgate) + row * args.gradient_stride + begin;
    T* dup = static_cast<T*>(args.dup) + row * args.gradient_stride + begin;
    for_each_pack<T>(end - begin, [&](int64_t i, auto count) {
      const auto x = P::load(gate + i, count), d = P::load(dout + i, count);
      P value, slope;
      for (int j = 0; j < P::kVectors; ++j) {
        std::tie(value.v[j], slope.v[j]) = Act::value_and_slope(x.v[j]);
      }
      (d * value).store(dup + i, count);
      (d * P::load(up + i, count) * slope).store(dgate + i, count);
    });
  });
}

// f(T{}, Act{}) for the dtype and the activation.
template <typename F>
inline void dispatch_glu(const Glu& args, const F& f) {
  dispatch_floating(args.dtype, [&](auto element) {
    using T = decltype(element);
    switch (args.activation) {
      case Activation::kSilu:
        return f(T{}, Silu<T>{});
      case Activation::kGeluTanh:
        return f(T{}, GeluTanh<T>{});
      case Activation::kGelu:
        return f(T{}, Gelu<T>{});
    }
  });
}

inline void glu_forward(const Glu& args) {
  dispatch_glu(args, [&](auto element, auto act) { glu_forward<decltype(element), decltype(act)>(args); });
}

inline void glu_backward(const Glu& args) {
  dispatch_glu(args, [&](auto element, auto act) { glu_backward<decltype(element), decltype(act)>(args); });
}

}  // namespace CPU_CAPABILITY
}  // namespace liger::cpu
