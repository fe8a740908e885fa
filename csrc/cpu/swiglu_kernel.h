// Included once per instruction set; see kernels.h. Formulas: ops/swiglu.h.

namespace liger::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
inline Pack<T> sigmoid(const Pack<T>& x) {
  const Vectorized<Accumulate<T>> one(1);
  return map<T>([&](auto v) { return one / (one + v.neg().exp()); }, x);
}

// body(row, begin, end) over spans of columns: whole rows where there are many, pieces of the row where there
// is one.
template <typename T, typename Body>
inline void for_each_span(int64_t rows, int64_t cols, const Body& body) {
  if (rows == 1) {
    at::parallel_for(0, cols, kGrain, [&](int64_t begin, int64_t end) { body(0, begin, end); });
  } else {
    at::parallel_for(0, rows, row_grain(cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(row, 0, cols);
    });
  }
}

inline void swiglu_forward(const Swiglu& args) {
  dispatch_floating(args.dtype, [&](auto element) {
    using T = decltype(element);
    using P = Pack<T>;
    for_each_span<T>(args.rows, args.cols, [&](int64_t row, int64_t begin, int64_t end) {
      const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride + begin;
      const T* up = static_cast<const T*>(args.up) + row * args.up_stride + begin;
      T* out = static_cast<T*>(args.out) + row * args.cols + begin;
      for_each_pack<T>(end - begin, [&](int64_t i, auto count) {
        const auto g = P::load(gate + i, count);
        const auto silu = (g * sigmoid<T>(g)).rounded();
        (silu * P::load(up + i, count)).store(out + i, count);
      });
    });
  });
}

inline void swiglu_backward(const Swiglu& args) {
  dispatch_floating(args.dtype, [&](auto element) {
    using T = decltype(element);
    using P = Pack<T>;
    const auto one = P::fill(1);
    for_each_span<T>(args.rows, args.cols, [&](int64_t row, int64_t begin, int64_t end) {
      const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride + begin;
      const T* up = static_cast<const T*>(args.up) + row * args.up_stride + begin;
      const T* dout = static_cast<const T*>(args.dout) + row * args.dout_stride + begin;
      T* dgate = static_cast<T*>(args.dgate) + row * args.cols + begin;
      T* dup = static_cast<T*>(args.dup) + row * args.cols + begin;
      for_each_pack<T>(end - begin, [&](int64_t i, auto count) {
        const auto g = P::load(gate + i, count);
        const auto d = P::load(dout + i, count);
        const auto s = sigmoid<T>(g);
        const auto silu = g * s;
        (d * silu).store(dup + i, count);
        (d * P::load(up + i, count) * (s + silu * (one - s))).store(dgate + i, count);
      });
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace liger::cpu
