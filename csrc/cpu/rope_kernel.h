// Included once per instruction set; see kernels.h. Formulas: ops/rope.h.

namespace liger::cpu {
inline namespace CPU_CAPABILITY {

// One head of one position. For the inverse (the transpose), with c1, c2 the halves of cos and s1, s2 of sin:
//   out1 = x1 * c1 + x2 * s2,  out2 = x2 * c2 - x1 * s1
template <typename T, typename C>
inline void rotate_head(
    const T* x, T* out, const C* cos, const C* sin, int64_t head_dim, int64_t rotary_dim, bool inverse) {
  using P = Pack<T>;
  const int64_t half = rotary_dim / 2;
  for_each_pack<T>(half, [&](int64_t i, auto count) {
    const auto x1 = P::load(x + i, count), x2 = P::load(x + half + i, count);
    const auto c1 = P::load(cos + i, count), c2 = P::load(cos + half + i, count);
    const auto s1 = P::load(sin + i, count), s2 = P::load(sin + half + i, count);
    const auto out1 = inverse ? x1 * c1 + x2 * s2 : x1 * c1 - x2 * s1;
    const auto out2 = inverse ? x2 * c2 - x1 * s1 : x2 * c2 + x1 * s2;
    out1.store(out + i, count);
    out2.store(out + half + i, count);
  });
  std::copy(x + rotary_dim, x + head_dim, out + rotary_dim);
}

inline void rope(const Rope& args) {
  dispatch_floating_pair(args.dtype, args.angle_dtype, [&](auto element, auto angle) {
    using T = decltype(element);
    using C = decltype(angle);
    const int64_t heads = args.tensors[0].heads + args.tensors[1].heads;
    at::parallel_for(
        0, args.batch * args.positions, row_grain(heads * args.head_dim), [&](int64_t begin, int64_t end) {
          for (int64_t token = begin; token < end; ++token) {
            const int64_t batch = token / args.positions, position = token % args.positions;
            const C* cos = static_cast<const C*>(args.cos) + batch * args.cos_strides[0] +
                position * args.cos_strides[1];
            const C* sin = static_cast<const C*>(args.sin) + batch * args.sin_strides[0] +
                position * args.sin_strides[1];
            for (const auto& t : args.tensors) {
              const T* x = static_cast<const T*>(t.x) + batch * t.x_strides[0] + position * t.x_strides[2];
              T* out = static_cast<T*>(t.out) + batch * t.out_strides[0] + position * t.out_strides[2];
              for (int64_t head = 0; head < t.heads; ++head) {
                rotate_head(x + head * t.x_strides[1], out + head * t.out_strides[1], cos, sin, args.head_dim,
                    args.rotary_dim, args.inverse);
              }
            }
          }
        });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace liger::cpu
