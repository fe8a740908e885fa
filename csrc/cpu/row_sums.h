// Included once per instruction set; see kernels.h and row_blocks.h.

namespace liger::cpu {
inline namespace CPU_CAPABILITY {

// body(row, block) over the rows of every block. Before the first row of a block, its part of each partial
// sum ([row_blocks, cols], or null) is set to 0.
template <typename A, size_t N, typename Body>
inline void for_each_row_in_blocks(
    int64_t rows, int64_t row_blocks, int64_t cols, A* const (&partials)[N], const Body& body) {
  const int64_t rows_per_block = (rows + row_blocks - 1) / row_blocks;
  at::parallel_for(0, row_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (A* partial : partials) {
        if (partial != nullptr) std::fill(partial + block * cols, partial + (block + 1) * cols, A(0));
      }
      const int64_t last = std::min(rows, (block + 1) * rows_per_block);
      for (int64_t row = block * rows_per_block; row < last; ++row) body(row, block);
    }
  });
}

// out[col] = the sum of partial[:, col] in an order that depends on row_blocks alone; nothing where out is
// null.
template <typename A, typename W>
inline void sum_row_blocks(const A* partial, int64_t row_blocks, int64_t cols, W* out) {
  if (out == nullptr) return;
  at::parallel_for(0, cols, row_grain(row_blocks), [&](int64_t begin, int64_t end) {
    for_each_pack<A>(end - begin, [&](int64_t i, auto count) {
      const int64_t col = begin + i;
      // Pairwise, which keeps the rounding errors of a long sum small: level l holds the sum of 2^l blocks
      // while bit l of the number of blocks so far is set.
      Pack<A> levels[64];
      for (int64_t block = 0; block < row_blocks; ++block) {
        auto sum = Pack<A>::load(partial + block * cols + col, count);
        int level = 0;
        for (int64_t done = block; done % 2 == 1; done /= 2) sum = levels[level++] + sum;
        levels[level] = sum;
      }
      auto sum = Pack<A>::fill(0);
      for (int level = 0; row_blocks >> level != 0; ++level) {
        if ((row_blocks >> level) % 2 == 1) sum = sum + levels[level];
      }
      A sums[Pack<A>::kSize];
      sum.store(sums);
      for (int64_t j = 0; j < count; ++j) out[col + j] = static_cast<W>(sums[j]);
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace liger::cpu
