// Included once per instruction set; see kernels.h. Formulas: ops/layer_norm.h.

namespace liger::cpu {
inline namespace CPU_CAPABILITY {

template <typename T, typename W>
void layer_norm_forward_typed(const LayerNormForward& args) {
  using P = Pack<T>;
  using A = Accumulate<T>;
  const auto* x = static_cast<const T*>(args.x);
  const auto* weight = static_cast<const W*>(args.weight);
  const auto* bias = static_cast<const W*>(args.bias);
  auto* y = static_cast<T*>(args.y);
  auto* mean = static_cast<A*>(args.mean);
  auto* rstd = static_cast<A*>(args.rstd);
  const auto size = static_cast<A>(args.cols);
  at::parallel_for(0, args.rows, row_grain(args.cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x_row = x + row * args.x_stride;
      T* y_row = y + row * args.cols;
      RunningSum<T> total;
      for_each_pack<T>(args.cols, [&](int64_t i, auto count) { total.add(P::load(x_row + i, count)); });
      const A center = total.total() / size;
      const auto centers = P::fill(center);
      RunningSum<T> differences, squares;
      for_each_pack<T>(args.cols, [&](int64_t i, auto count) {
        const auto difference = (P::load(x_row + i, count) - centers).first(count);
        differences.add(difference);
        squares.add_product(difference, difference);
      });
      const A correction = differences.total() / size;
      // In float64, since an error here is one of the whole row.
      const double variance = static_cast<double>(squares.total()) / static_cast<double>(args.cols) -
          static_cast<double>(correction) * correction;
      // Rounding may leave a constant row a variance below 0. A NaN stays.
      const A scale = static_cast<A>(1 / std::sqrt((variance < 0 ? 0 : variance) + args.eps));
      mean[row] = center + correction;
      rstd[row] = scale;
      const auto corrections = P::fill(correction);
      const auto scales = P::fill(scale);
      for_each_pack<T>(args.cols, [&](int64_t i, auto count) {
        auto value = ((P::load(x_row + i, count) - centers) - corrections) * scales;
        if (weight != nullptr && bias != nullptr) {
          value = multiply_add(value, P::load(weight + i, count), P::load(bias + i, count));
        } else if (weight != nullptr) {
          value = value * P::load(weight + i, count);
        } else if (bias != nullptr) {
          value = value + P::load(bias + i, count);
        }
        value.store(y_row + i, count);
      });
    }
  });
}

inline void layer_norm_forward(const LayerNormForward& args) {
  dispatch_floating_pair(args.dtype, args.affine_dtype, [&](auto element, auto affine) {
    layer_norm_forward_typed<decltype(element), decltype(affine)>(args);
  });
}

template <typename T, typename W>
void layer_norm_backward_typed(const LayerNormBackward& args) {
  using P = Pack<T>;
  using A = Accumulate<T>;
  const auto* dy = static_cast<const T*>(args.dy);
  const auto* x = static_cast<const T*>(args.x);
  const auto* weight = static_cast<const W*>(args.weight);
  const auto* mean = static_cast<const A*>(args.mean);
  const auto* rstd = static_cast<const A*>(args.rstd);
  auto* dx = static_cast<T*>(args.dx);
  auto* partial_weight = static_cast<A*>(args.partial_weight);
  auto* partial_bias = static_cast<A*>(args.partial_bias);
  const int64_t cols = args.cols;
  const auto size = static_cast<A>(cols);

  for_each_row_in_blocks<A>(
      args.rows, args.row_blocks, cols, {partial_weight, partial_bias}, [&](int64_t row, int64_t block) {
        const T* dy_row = dy + row * args.dy_stride;
        const T* x_row = x + row * args.x_stride;
        A* bias_sums = partial_bias == nullptr ? nullptr : partial_bias + block * cols;
        const auto centers = P::fill(mean[row]);
        // m = dy * weight
        const auto scaled_gradient = [&](int64_t i, auto count) {
          auto m = P::load(dy_row + i, count);
          if (weight != nullptr) m = m * P::load(weight + i, count);
          return m;
        };
        RunningSum<T> sum, dot, differences;
        for_each_pack<T>(cols, [&](int64_t i, auto count) {
          const auto difference = (P::load(x_row + i, count) - centers).first(count);
          const auto m = scaled_gradient(i, count);
          sum.add(m);
          dot.add_product(m, difference);
          differences.add(difference);
          if (bias_sums != nullptr) {
            const auto partial = P::template load<A>(bias_sums + i, count);
            (partial + P::load(dy_row + i, count)).store_wide(bias_sums + i, count);
          }
        });
        if (dx == nullptr && partial_weight == nullptr) return;
        const A correction = differences.total() / size;
        const A mean_m = sum.total() / size;
        const A mean_mn = rstd[row] * (dot.total() / size - correction * mean_m);

        const auto corrections = P::fill(correction);
        const auto scale = P::fill(rstd[row]);
        const auto means_m = P::fill(mean_m);
        const auto means_mn = P::fill(mean_mn);
        A* sums = partial_weight == nullptr ? nullptr : partial_weight + block * cols;
        for_each_pack<T>(cols, [&](int64_t i, auto count) {
          const auto n = ((P::load(x_row + i, count) - centers) - corrections) * scale;
          if (sums != nullptr) {
            const auto partial = P::template load<A>(sums + i, count);
            multiply_add(P::load(dy_row + i, count), n, partial).store_wide(sums + i, count);
          }
          if (dx != nullptr) {
            (scale * ((scaled_gradient(i, count) - means_m) - n * means_mn))
                .store(dx + row * cols + i, count);
          }
        });
      });
  sum_row_blocks(partial_weight, args.row_blocks, cols, static_cast<W*>(args.dweight));
  if (args.bias_dtype == args.dtype) {
    sum_row_blocks(partial_bias, args.row_blocks, cols, static_cast<T*>(args.dbias));
  } else {
    sum_row_blocks(partial_bias, args.row_blocks, cols, static_cast<A*>(args.dbias));
  }
}

inline void layer_norm_backward(const LayerNormBackward& args) {
  dispatch_floating_pair(args.dtype, args.weight_dtype, [&](auto element, auto weight) {
    layer_norm_backward_typed<decltype(element), decltype(weight)>(args);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace liger::cpu
