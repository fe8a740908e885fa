// Included once per instruction set; see kernels.h. Formulas: ops/rope.h.

namespace liger::cpu {
inline namespace CPU_CAPABILITY {

// Pairs [begin, end) of one head of one position. For the inverse (the transpose), with c1, c2 the cosines
// and s1, s2 the sines at the pair's columns:  out1 = x1 * c1 + x2 * s2,  out2 = x2 * c2 - x1 * s1
template <typename T, typename C>
inline void rotate_halves(
    const T* x, T* out, const C* cos, const C* sin, int64_t half, int64_t begin, int64_t end, bool inverse) {
  using P = Pack<T>;
  for_each_pack<T>(end - begin, [&](int64_t offset, auto count) {
    const int64_t i = begin + offset;
    const auto x1 = P::load(x + i, count), x2 = P::load(x + half + i, count);
    const auto c1 = P::load(cos + i, count), c2 = P::load(cos + half + i, count);
    const auto s1 = P::load(sin + i, count), s2 = P::load(sin + half + i, count);
    const auto out1 = inverse ? x1 * c1 + x2 * s2 : x1 * c1 - x2 * s1;
    const auto out2 = inverse ? x2 * c2 - x1 * s1 : x2 * c2 + x1 * s2;
    out1.store(out + i, count);
    out2.store(out + half + i, count);
  });
}

template <typename T, typename C>
inline void rotate_neighbours(
    const T* x, T* out, const C* cos, const C* sin, int64_t begin, int64_t end, bool inverse) {
  using A = Accumulate<T>;
  for (int64_t i = 2 * begin; i < 2 * end; i += 2) {
    const A x1 = x[i], x2 = x[i + 1];
    const A c1 = cos[i], c2 = cos[i + 1], s1 = sin[i], s2 = sin[i + 1];
    out[i] = static_cast<T>(inverse ? x1 * c1 + x2 * s2 : x1 * c1 - x2 * s1);
    out[i + 1] = static_cast<T>(inverse ? x2 * c2 - x1 * s1 : x2 * c2 + x1 * s2);
  }
}

inline void rope(const Rope& args) {
  dispatch_floating_pair(args.dtype, args.angle_dtype, [&](auto element, auto angle) {
    using T = decltype(element);
    using C = decltype(angle);
    const int64_t heads = args.tensors[0].heads + args.tensors[1].heads;
    const int64_t half = args.rotary_dim / 2;
    const int64_t sections[4] = {0, args.section_ends[0], args.section_ends[1], half};
    const auto rotate_token = [&](int64_t token) {
      const int64_t batch = token / args.positions, position = token % args.positions;
      const C* cos =
          static_cast<const C*>(args.cos) + batch * args.cos_strides[1] + position * args.cos_strides[2];
      const C* sin =
          static_cast<const C*>(args.sin) + batch * args.sin_strides[1] + position * args.sin_strides[2];
      for (const auto& t : args.tensors) {
        for (int64_t head = 0; head < t.heads; ++head) {
          const T* x = static_cast<const T*>(t.x) + batch * t.x_strides[0] + head * t.x_strides[1] +
              position * t.x_strides[2];
          T* out = static_cast<T*>(t.out) + batch * t.out_strides[0] + head * t.out_strides[1] +
              position * t.out_strides[2];
          for (int64_t plane = 0; plane < 3; ++plane) {
            const int64_t begin = sections[plane], end = sections[plane + 1];
            const C* plane_cos = cos + plane * args.cos_strides[0];
            const C* plane_sin = sin + plane * args.sin_strides[0];
            if (args.interleaved) {
              rotate_neighbours(x, out, plane_cos, plane_sin, begin, end, args.inverse);
            } else {
              rotate_halves(x, out, plane_cos, plane_sin, half, begin, end, args.inverse);
            }
          }
          std::copy(x + args.rotary_dim, x + args.head_dim, out + args.rotary_dim);
        }
      }
    };
    at::parallel_for(
        0, args.batch * args.positions, row_grain(heads * args.head_dim), [&](int64_t begin, int64_t end) {
          for (int64_t token = begin; token < end; ++token) rotate_token(token);
        });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace liger::cpu
