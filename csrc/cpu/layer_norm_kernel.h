// Included once per instruction set; see kernels.h. Formulas: ops/layer_norm.h.
//
// Two rows at a time: their sums do not wait for each other, and each load of a parameter, and each load and
// store of a partial sum, serves both. While rows are computed, the lines that are read and written next are
// on their way: the hardware's own prefetching starts anew with each row.

namespace liger::cpu {
inline namespace CPU_CAPABILITY {

// flatten: packs in arrays live in registers only where every call is inlined.
template <int kRows, typename T, typename W>
[[gnu::flatten]] inline void layer_norm_forward_rows(const LayerNormForward& args, int64_t row) {
  using P = Pack<T>;
  using A = Accumulate<T>;
  const int64_t cols = args.cols, stride = args.x_stride;
  const auto* x = static_cast<const T*>(args.x) + row * stride;
  const auto* weight = static_cast<const W*>(args.weight);
  const auto* bias = static_cast<const W*>(args.bias);
  auto* y = static_cast<T*>(args.y) + row * cols;
  const auto size = static_cast<A>(cols);

  touch_pages(y, kRows * cols);
  RunningSums<T, kRows> totals;
  for_each_pack<T>(cols, [&](int64_t i, auto count) {
    unroll<kRows>([&](auto r) {
      totals.add(r, P::load(x + r * stride + i, count));
      prefetch<true>(y + r * cols, i);
    });
    totals.advance();
  });
  P centers[kRows];
  unroll<kRows>([&](auto r) { centers[r] = P::fill(totals.total(r) / size); });

  RunningSums<T, kRows> differences, squares;
  for_each_pack<T>(cols, [&](int64_t i, auto count) {
    unroll<kRows>([&](auto r) {
      const auto difference = (P::load(x + r * stride + i, count) - centers[r]).first(count);
      differences.add(r, difference);
      squares.add_product(r, difference, difference);
    });
    differences.advance();
    squares.advance();
  });
  P corrections[kRows], scales[kRows];
  unroll<kRows>([&](auto r) {
    const A correction = differences.total(r) / size;
    // In float64, since an error here is one of the whole row.
    const double variance = static_cast<double>(squares.total(r)) / static_cast<double>(cols) -
        static_cast<double>(correction) * correction;
    // Rounding may leave a constant row a variance below 0. A NaN stays.
    const A scale = static_cast<A>(1 / std::sqrt((variance < 0 ? 0 : variance) + args.eps));
    static_cast<A*>(args.mean)[row + r] = totals.total(r) / size + correction;
    static_cast<A*>(args.rstd)[row + r] = scale;
    corrections[r] = P::fill(correction);
    scales[r] = P::fill(scale);
  });

  for_each_pack<T>(cols, [&](int64_t i, auto count) {
    const auto w = weight != nullptr ? P::load(weight + i, count) : P::fill(1);
    const auto b = bias != nullptr ? P::load(bias + i, count) : P::fill(0);
    unroll<kRows>([&](auto r) {
      const auto n = ((P::load(x + r * stride + i, count) - centers[r]) - corrections[r]) * scales[r];
      multiply_add(n, w, b).store(y + r * cols + i, count);
      prefetch(x + (kRows + r) * stride, i);
    });
  });
}

template <typename T, typename W>
void layer_norm_forward_typed(const LayerNormForward& args) {
  // The pairs are the same for any number of threads.
  constexpr int kRows = 2;
  const int64_t groups = (args.rows + kRows - 1) / kRows;
  at::parallel_for(0, groups, row_grain(kRows * args.cols), [&](int64_t begin, int64_t end) {
    for_each_row_group<kRows>(kRows * begin, std::min(kRows * end, args.rows),
        [&](int64_t row, auto count) { layer_norm_forward_rows<decltype(count)::value, T, W>(args, row); });
  });
}

inline void layer_norm_forward(const LayerNormForward& args) {
  dispatch_floating_pair(args.dtype, args.affine_dtype, [&](auto element, auto affine) {
    layer_norm_forward_typed<decltype(element), decltype(affine)>(args);
  });
}

template <int kRows, typename T, typename W>
[[gnu::flatten]] inline void layer_norm_backward_rows(
    const LayerNormBackward& args, int64_t row, Accumulate<T>* weight_sums, Accumulate<T>* bias_sums) {
  using P = Pack<T>;
  using A = Accumulate<T>;
  const int64_t cols = args.cols, x_stride = args.x_stride, dy_stride = args.dy_stride;
  const auto* dy = static_cast<const T*>(args.dy) + row * dy_stride;
  const auto* x = static_cast<const T*>(args.x) + row * x_stride;
  const auto* weight = static_cast<const W*>(args.weight);
  const auto* mean = static_cast<const A*>(args.mean) + row;
  const auto* rstd = static_cast<const A*>(args.rstd) + row;
  auto* dx = args.dx == nullptr ? nullptr : static_cast<T*>(args.dx) + row * cols;
  const auto size = static_cast<A>(cols);

  P centers[kRows];
  unroll<kRows>([&](auto r) { centers[r] = P::fill(mean[r]); });
  if (dx != nullptr) touch_pages(dx, kRows * cols);
  // m = dy * weight
  RunningSums<T, kRows> differences, sums, dots;
  for_each_pack<T>(cols, [&](int64_t i, auto count) {
    const auto w = weight != nullptr ? P::load(weight + i, count) : P::fill(1);
    unroll<kRows>([&](auto r) {
      const auto difference = (P::load(x + r * x_stride + i, count) - centers[r]).first(count);
      const auto m = P::load(dy + r * dy_stride + i, count) * w;
      differences.add(r, difference);
      sums.add(r, m);
      dots.add_product(r, m, difference);
      if (dx != nullptr) prefetch<true>(dx + r * cols, i);
    });
    differences.advance();
    sums.advance();
    dots.advance();
  });
  P corrections[kRows], scales[kRows], means_m[kRows], means_mn[kRows];
  unroll<kRows>([&](auto r) {
    const A correction = differences.total(r) / size;
    const A mean_m = sums.total(r) / size;
    const A mean_mn = rstd[r] * (dots.total(r) / size - correction * mean_m);
    corrections[r] = P::fill(correction);
    scales[r] = P::fill(rstd[r]);
    means_m[r] = P::fill(mean_m);
    means_mn[r] = P::fill(mean_mn);
  });

  for_each_pack<T>(cols, [&](int64_t i, auto count) {
    const auto w = weight != nullptr ? P::load(weight + i, count) : P::fill(1);
    auto weight_sum = weight_sums != nullptr ? P::template load<A>(weight_sums + i, count) : P::fill(0);
    auto bias_sum = bias_sums != nullptr ? P::template load<A>(bias_sums + i, count) : P::fill(0);
    unroll<kRows>([&](auto r) {
      const auto n = ((P::load(x + r * x_stride + i, count) - centers[r]) - corrections[r]) * scales[r];
      const auto g = P::load(dy + r * dy_stride + i, count);
      weight_sum = multiply_add(g, n, weight_sum);
      bias_sum = bias_sum + g;
      if (dx != nullptr) {
        (scales[r] * ((g * w - means_m[r]) - n * means_mn[r])).store(dx + r * cols + i, count);
      }
      prefetch(x + (kRows + r) * x_stride, i);
      prefetch(dy + (kRows + r) * dy_stride, i);
    });
    if (weight_sums != nullptr) weight_sum.store_wide(weight_sums + i, count);
    if (bias_sums != nullptr) bias_sum.store_wide(bias_sums + i, count);
  });
}

template <typename T, typename W>
void layer_norm_backward_typed(const LayerNormBackward& args) {
  using A = Accumulate<T>;
  auto* partial_weight = static_cast<A*>(args.partial_weight);
  auto* partial_bias = static_cast<A*>(args.partial_bias);
  const int64_t cols = args.cols;
  const auto body = [&](int64_t row, auto count, int64_t block) {
    layer_norm_backward_rows<decltype(count)::value, T, W>(args, row,
        partial_weight == nullptr ? nullptr : partial_weight + block * cols,
        partial_bias == nullptr ? nullptr : partial_bias + block * cols);
  };
  // Long rows whose length is a power of two meet in the same few sets of the second-level cache.
  if (cols * static_cast<int64_t>(sizeof(T)) < 32768) {
    for_each_row_in_blocks<2, A>(args.rows, args.row_blocks, cols, {partial_weight, partial_bias}, body);
  } else {
    for_each_row_in_blocks<1, A>(args.rows, args.row_blocks, cols, {partial_weight, partial_bias}, body);
  }
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
