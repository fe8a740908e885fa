// Included once per instruction set; see kernels.h. Formulas: ops/rms_norm.h, ops/add_rms_norm.h.

namespace liger::cpu {
inline namespace CPU_CAPABILITY {

template <typename T, typename W>
void rms_norm_forward_typed(const RmsNormForward& args) {
  using P = Pack<T>;
  using A = Accumulate<T>;
  const auto* x = static_cast<const T*>(args.x);
  const auto* residual = static_cast<const T*>(args.residual);
  const auto* weight = static_cast<const W*>(args.weight);
  auto* sum = static_cast<T*>(args.sum);
  auto* y = static_cast<T*>(args.y);
  auto* rstd = static_cast<A*>(args.rstd);
  const auto offset = P::fill(static_cast<A>(args.offset));
  at::parallel_for(0, args.rows, row_grain(args.cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x_row = x + row * args.x_stride;
      T* y_row = y + row * args.cols;
      RunningSums<T> squares;
      if (residual == nullptr) {
        for_each_pack<T>(args.cols, [&](int64_t i, auto count) {
          const auto value = P::load(x_row + i, count);
          squares.add_product(0, value, value);
          squares.advance();
        });
      } else {
        const T* residual_row = residual + row * args.residual_stride;
        T* sum_row = sum + row * args.cols;
        for_each_pack<T>(args.cols, [&](int64_t i, auto count) {
          const auto value = (P::load(x_row + i, count) + P::load(residual_row + i, count)).rounded();
          value.store(sum_row + i, count);
          squares.add_product(0, value, value);
          squares.advance();
        });
        x_row = sum_row;
      }
      // In float64, since an error here is one of the whole row.
      const double mean = static_cast<double>(squares.total(0)) / static_cast<double>(args.cols);
      const A scale = static_cast<A>(1 / std::sqrt(mean + args.eps));
      rstd[row] = scale;
      const auto scales = P::fill(scale);
      for_each_pack<T>(args.cols, [&](int64_t i, auto count) {
        auto value = P::load(x_row + i, count) * scales;
        if (args.round_normalized) value = value.rounded();
        if (weight != nullptr) value = value * (P::load(weight + i, count) + offset);
        value.store(y_row + i, count);
      });
    }
  });
}

inline void rms_norm_forward(const RmsNormForward& args) {
  dispatch_floating_pair(args.dtype, args.weight_dtype,
      [&](auto element, auto weight) { rms_norm_forward_typed<decltype(element), decltype(weight)>(args); });
}

template <typename T, typename W>
void rms_norm_backward_typed(const RmsNormBackward& args) {
  using P = Pack<T>;
  using A = Accumulate<T>;
  const auto* dy = static_cast<const T*>(args.dy);
  const auto* dsum = static_cast<const T*>(args.dsum);
  const auto* x = static_cast<const T*>(args.x);
  const auto* weight = static_cast<const W*>(args.weight);
  const auto* rstd = static_cast<const A*>(args.rstd);
  auto* dx = static_cast<T*>(args.dx);
  auto* partial = static_cast<A*>(args.partial);
  const int64_t cols = args.cols;
  const auto offset = P::fill(static_cast<A>(args.offset));

  for_each_row_in_blocks<1, A>(
      args.rows, args.row_blocks, cols, {partial}, [&](int64_t row, auto, int64_t block) {
        const T* dy_row = dy + row * args.dy_stride;
        const T* x_row = x + row * args.x_stride;
        A* sums = partial == nullptr ? nullptr : partial + block * cols;
        const auto scale = P::fill(rstd[row]);
        // m = dy * (offset + weight), n = x * rstd
        const auto scaled_gradient = [&](int64_t i, auto count) {
          auto m = P::load(dy_row + i, count);
          if (weight != nullptr) m = m * (P::load(weight + i, count) + offset);
          return m;
        };
        RunningSums<T> dot;
        for_each_pack<T>(cols, [&](int64_t i, auto count) {
          const auto n = P::load(x_row + i, count) * scale;
          dot.add_product(0, scaled_gradient(i, count), n);
          dot.advance();
          if (sums != nullptr) {
            const auto factor = args.round_normalized ? n.rounded() : n;
            const auto sum = P::template load<A>(sums + i, count);
            multiply_add(P::load(dy_row + i, count), factor, sum).store_wide(sums + i, count);
          }
        });
        if (dx == nullptr) return;
        const auto mean = P::fill(dot.total(0) / static_cast<A>(cols));
        for_each_pack<T>(cols, [&](int64_t i, auto count) {
          const auto n = P::load(x_row + i, count) * scale;
          auto gradient = scale * (scaled_gradient(i, count) - n * mean);
          if (dsum != nullptr) gradient = gradient + P::load(dsum + row * args.dsum_stride + i, count);
          gradient.store(dx + row * cols + i, count);
        });
      });
  sum_row_blocks(partial, args.row_blocks, cols, static_cast<W*>(args.dweight));
}

inline void rms_norm_backward(const RmsNormBackward& args) {
  dispatch_floating_pair(args.dtype, args.weight_dtype,
      [&](auto element, auto weight) { rms_norm_backward_typed<decltype(element), decltype(weight)>(args); });
}

}  // namespace CPU_CAPABILITY
}  // namespace liger::cpu
