// Included once per instruction set; see kernels.h and row_blocks.h.

namespace liger::cpu {
inline namespace CPU_CAPABILITY {

// body(row, integral_constant<int, n>, block) over the rows of every block, n = kRows rows at a time and the
// rest one by one. Before the first row of a block, its part of each partial sum ([row_blocks, cols], or
// null) is set to 0.
template <int kRows, typename A, size_t N, typename Body>
inline void for_each_row_in_blocks(
    int64_t rows, int64_t row_blocks, int64_t cols, A* const (&partials)[N], const Body& body) {
  const int64_t rows_per_block = (rows + row_blocks - 1) / row_blocks;
  at::parallel_for(0, row_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (A* partial : partials) {
        if (partial != nullptr) std::fill(partial + block * cols, partial + (block + 1) * cols, A(0));
      }
      const int64_t last = std::min(rows, (block + 1) * rows_per_block);
      for_each_row_group<kRows>(
          block * rows_per_block, last, [&](int64_t row, auto count) { body(row, count, block); });
    }
  });
}

// out[i] = the sum of partial[:, i] over N packs of columns, each of `count` elements: all, where N > 1.
template <int N, typename A, typename W, typename Count>
[[gnu::flatten]] inline void sum_columns(
    const A* partial, int64_t row_blocks, int64_t cols, Count count, W* out) {
  using P = Pack<A>;
  // Pairwise, which keeps the rounding errors of a long sum small: level l holds the sum of 2^l blocks while
  // bit l of the number of blocks so far is set.
  P levels[16][N], sums[N];
  for (int64_t block = 0; block < row_blocks; ++block) {
    unroll<N>([&](auto k) { sums[k] = P::load(partial + block * cols + k * P::kSize, count); });
    int level = 0;
    for (int64_t done = block; done % 2 == 1; done /= 2, ++level) {
      unroll<N>([&](auto k) { sums[k] = levels[level][k] + sums[k]; });
    }
    unroll<N>([&](auto k) { levels[level][k] = sums[k]; });
  }
  unroll<N>([&](auto k) { sums[k] = P::fill(0); });
  for (int level = 0; row_blocks >> level != 0; ++level) {
    if ((row_blocks >> level) % 2 == 1) unroll<N>([&](auto k) { sums[k] = sums[k] + levels[level][k]; });
  }
  A values[N * P::kSize];
  unroll<N>([&](auto k) { sums[k].store(values + k * P::kSize); });
  for (int64_t i = 0; i < N * count; ++i) out[i] = static_cast<W>(values[i]);
}

// out[col] = the sum of partial[:, col] in an order that depends on row_blocks alone; nothing where out is
// null.
template <typename A, typename W>
inline void sum_row_blocks(const A* partial, int64_t row_blocks, int64_t cols, W* out) {
  if (out == nullptr) return;
  at::parallel_for(0, cols, row_grain(row_blocks), [&](int64_t begin, int64_t end) {
    // The blocks are far apart in memory: whole cache lines at a time.
    constexpr int kPacks = 4;
    constexpr int64_t size = Pack<A>::kSize;
    int64_t col = begin;
    for (; col + kPacks * size <= end; col += kPacks * size) {
      sum_columns<kPacks>(
          partial + col, row_blocks, cols, std::integral_constant<int64_t, size>{}, out + col);
    }
    for_each_pack<A>(end - col, [&](int64_t i, auto count) {
      sum_columns<1>(partial + col + i, row_blocks, cols, count, out + col + i);
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace liger::cpu
