// Included once per instruction set; see kernels.h. Formulas: ops/rms_norm.h.

namespace liger::cpu {
inline namespace CPU_CAPABILITY {

template <typename T, typename W>
void rms_norm_forward_typed(const RmsNormForward& args) {
  using P = Pack<T>;
  using A = Accumulate<T>;
  const auto* x = static_cast<const T*>(args.x);
  const auto* weight = static_cast<const W*>(args.weight);
  auto* y = static_cast<T*>(args.y);
  auto* rstd = static_cast<A*>(args.rstd);
  const auto offset = P::fill(static_cast<A>(args.offset));
  at::parallel_for(0, args.rows, row_grain(args.cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x_row = x + row * args.x_stride;
      T* y_row = y + row * args.cols;
      auto squares = P::fill(0);
      for_each_pack<T>(args.cols, [&](int64_t i, auto count) {
        const auto value = P::load(x_row + i, count);
        squares = multiply_add(value, value, squares);
      });
      const A mean = squares.sum() / static_cast<A>(args.cols);
      const A scale = A(1) / std::sqrt(mean + static_cast<A>(args.eps));
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

// The weight gradient is summed over fixed blocks of rows, then over the blocks in order: the result does not
// depend on the number of threads.
template <typename T, typename W>
void rms_norm_backward_typed(const RmsNormBackward& args) {
  using P = Pack<T>;
  using A = Accumulate<T>;
  const auto* dy = static_cast<const T*>(args.dy);
  const auto* x = static_cast<const T*>(args.x);
  const auto* weight = static_cast<const W*>(args.weight);
  const auto* rstd = static_cast<const A*>(args.rstd);
  auto* dx = static_cast<T*>(args.dx);
  auto* partial = static_cast<A*>(args.partial);
  const int64_t cols = args.cols;
  const int64_t rows_per_block = (args.rows + args.row_blocks - 1) / args.row_blocks;
  const auto offset = P::fill(static_cast<A>(args.offset));

  at::parallel_for(0, args.row_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      A* sums = partial == nullptr ? nullptr : partial + block * cols;
      if (sums != nullptr) std::fill(sums, sums + cols, A(0));
      const int64_t last = std::min(args.rows, (block + 1) * rows_per_block);
      for (int64_t row = block * rows_per_block; row < last; ++row) {
        const T* dy_row = dy + row * args.dy_stride;
        const T* x_row = x + row * args.x_stride;
        const auto scale = P::fill(rstd[row]);
        // m = dy * (offset + weight), n = x * rstd
        const auto scaled_gradient = [&](int64_t i, auto count) {
          auto m = P::load(dy_row + i, count);
          if (weight != nullptr) m = m * (P::load(weight + i, count) + offset);
          return m;
        };
        auto dot = P::fill(0);
        for_each_pack<T>(cols, [&](int64_t i, auto count) {
          const auto n = P::load(x_row + i, count) * scale;
          dot = multiply_add(scaled_gradient(i, count), n, dot);
          if (sums != nullptr) {
            const auto factor = args.round_normalized ? n.rounded() : n;
            const auto sum = P::template load<A>(sums + i, count);
            multiply_add(P::load(dy_row + i, count), factor, sum).store_wide(sums + i, count);
          }
        });
        if (dx == nullptr) continue;
        const auto mean = P::fill(dot.sum() / static_cast<A>(cols));
        for_each_pack<T>(cols, [&](int64_t i, auto count) {
          const auto n = P::load(x_row + i, count) * scale;
          (scale * (scaled_gradient(i, count) - n * mean)).store(dx + row * cols + i, count);
        });
      }
    }
  });

  if (args.dweight == nullptr) return;
  auto* dweight = static_cast<W*>(args.dweight);
  at::parallel_for(0, cols, row_grain(args.row_blocks), [&](int64_t begin, int64_t end) {
    for (int64_t col = begin; col < end; ++col) {
      A sum = 0;
      for (int64_t block = 0; block < args.row_blocks; ++block) sum += partial[block * cols + col];
      dweight[col] = static_cast<W>(sum);
    }
  });
}

inline void rms_norm_backward(const RmsNormBackward& args) {
  dispatch_floating_pair(args.dtype, args.weight_dtype,
      [&](auto element, auto weight) { rms_norm_backward_typed<decltype(element), decltype(weight)>(args); });
}

}  // namespace CPU_CAPABILITY
}  // namespace liger::cpu
