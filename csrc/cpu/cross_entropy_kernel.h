// Included once per instruction set; see kernels.h. Formulas:
// ops/cross_entropy.h.

namespace liger::cpu {
inline namespace CPU_CAPABILITY {

// Classes per step of the forward pass: the maximum and the sum read them one
// after the other, so the second read comes from the first-level cache. Segment
// sums are added up in float64.
constexpr int64_t kSegment = 4096;

// The lanes from `count` on replaced by `value`. No work for full packs.
template <typename T, typename Count>
inline Pack<T> with_tail(const Pack<T>& pack, Count count, Accumulate<T> value) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    using V = typename Pack<T>::V;
    Pack<T> out;
    for (int i = 0; i < Pack<T>::kVectors; ++i) {
      out.v[i] = V::set(V(value), pack.v[i], std::clamp<int64_t>(count - i * V::size(), 0, V::size()));
    }
    return out;
  } else {
    return pack;
  }
}

template <typename T>
inline Pack<T> exp(const Pack<T>& x) {
  return map<T>([](auto v) { return v.exp(); }, x);
}

template <typename T>
inline Pack<T> tanh(const Pack<T>& x) {
  return map<T>([](auto v) { return v.tanh(); }, x);
}

template <typename A>
inline A soft_capped(A x, A softcap) {
  return softcap == 0 ? x : softcap * std::tanh(x / softcap);
}

template <typename T>
inline Accumulate<T> max_of(const T* x, int64_t size) {
  using P = Pack<T>;
  using A = Accumulate<T>;
  constexpr int64_t kUnroll = 4;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  const auto larger = [](const P& a, const P& b) {
    return map<T>([](auto u, auto v) { return at::vec::maximum(u, v); }, a, b);
  };
  P most[kUnroll];
  for (auto& m : most) m = P::fill(lowest);
  int64_t start = 0;
  for (; start + kUnroll * P::kSize <= size; start += kUnroll * P::kSize) {
    for (int64_t j = 0; j < kUnroll; ++j) most[j] = larger(most[j], P::load(x + start + j * P::kSize));
  }
  for_each_pack<T>(size - start, [&](int64_t i, auto count) {
    most[0] = larger(most[0], with_tail<T>(P::load(x + start + i, count), count, lowest));
  });
  return larger(larger(most[0], most[1]), larger(most[2], most[3])).max();
}

// The first position of `value`, which is the maximum and occurs. NaN equals NaN here.
template <typename T>
inline int64_t first_of(const T* x, int64_t size, Accumulate<T> value) {
  using A = Accumulate<T>;
  constexpr int64_t kBlock = 128;
  const auto found = [value](A v) { return v == value || (v != v && value != value); };
  int64_t begin = 0;
  while (!found(max_of(x + begin, std::min(kBlock, size - begin)))) begin += kBlock;
  while (!found(static_cast<A>(x[begin]))) ++begin;
  return begin;
}

template <typename A>
struct RowStatistics {
  A max;                // of y
  double log_sum;       // log(sum(exp(y - max)))
  double weighted_sum;  // sum(w * y), with label smoothing only
  int64_t argmax;       // the first class with the largest x, NaN being largest; if asked for
};

template <typename T, bool SOFTCAP, bool SMOOTHING>
inline RowStatistics<Accumulate<T>> row_statistics(
    const T* x, int64_t cols, Accumulate<T> softcap, const Accumulate<T>* weight, bool find_argmax) {
  using P = Pack<T>;
  using A = Accumulate<T>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  const auto cap = P::fill(softcap);
  A most = lowest;
  double sum = 0;
  double weighted_sum = 0;
  A largest = lowest;  // of x: soft-capped, different logits may round to the same
  int64_t argmax = 0;
  for (int64_t begin = 0; begin < cols; begin += kSegment) {
    const int64_t size = std::min(kSegment, cols - begin);
    const A largest_here = max_of(x + begin, size);
    if (find_argmax && (largest_here > largest || (largest_here != largest_here && largest == largest))) {
      largest = largest_here;
      argmax = begin + first_of(x + begin, size, largest);
    }
    const A segment_max = soft_capped(largest_here, softcap);
    // Not "segment_max > most": NaN has to come through.
    if (!(segment_max <= most)) {
      sum *= std::exp(static_cast<double>(most) - static_cast<double>(segment_max));
      most = segment_max;
    }
    if (most == lowest) {  // nothing but -inf so far
      weighted_sum = lowest;
      continue;
    }
    const auto shift = P::fill(most);
    auto exps = P::fill(0);
    auto shifted_sum = P::fill(0);
    auto weights = P::fill(0);
    for_each_pack<T>(size, [&](int64_t i, auto count) {
      auto y = P::load(x + begin + i, count);
      if constexpr (SOFTCAP) y = cap * tanh<T>(y / cap);
      const auto shifted = y - shift;
      exps = exps + exp<T>(with_tail<T>(shifted, count, lowest));
      if constexpr (SMOOTHING) {
        if (weight == nullptr) {
          shifted_sum = shifted_sum + with_tail<T>(shifted, count, 0);
        } else {
          const auto w = P::template load<A>(weight + begin + i, count);
          shifted_sum = multiply_add(w, with_tail<T>(shifted, count, 0), shifted_sum);
          weights = weights + w;
        }
      }
    });
    sum += static_cast<double>(exps.sum());
    if constexpr (SMOOTHING) {
      const double segment_weight =
          weight == nullptr ? static_cast<double>(size) : static_cast<double>(weights.sum());
      weighted_sum += static_cast<double>(shifted_sum.sum()) + static_cast<double>(most) * segment_weight;
    }
  }
  return {most, std::log(sum), weighted_sum, argmax};
}

// What a row needs besides its logits.
template <typename A>
struct RowContext {
  A y_target, lse, lse_low;
  A target_weight;
  A ce_scale, z_scale;  // upstream gradient times the factor of token scaling, over divisor

  A log_p() const { return (y_target - lse) - lse_low; }
};

// dx may be x.
template <typename T, bool SOFTCAP, bool SMOOTHING>
inline void row_gradient(
    const CrossEntropy& args, const T* x, T* dx, int64_t target, const RowContext<Accumulate<T>>& row) {
  using P = Pack<T>;
  using A = Accumulate<T>;
  const auto* weight = SMOOTHING ? static_cast<const A*>(args.weight) : nullptr;
  const A softcap = static_cast<A>(args.softcap);
  const A smoothing = static_cast<A>(SMOOTHING ? args.label_smoothing / static_cast<double>(args.cols) : 0);
  const A weight_sum = static_cast<const A*>(args.totals)[2];
  const A ce_factor = (1 - static_cast<A>(args.label_smoothing)) * row.target_weight + smoothing * weight_sum;
  const A z_factor = 2 * static_cast<A>(args.lse_square_scale) * row.lse;

  // The true class apart: with p - 1 from expm1 nothing cancels, and it is
  // rounded once.
  A d_target =
      row.ce_scale * (ce_factor * std::expm1(row.log_p()) + smoothing * (weight_sum - row.target_weight)) +
      row.z_scale * z_factor * std::exp(row.log_p());
  if constexpr (SOFTCAP) d_target *= (1 - row.y_target / softcap) * (1 + row.y_target / softcap);

  const auto lse = P::fill(row.lse);
  const auto lse_low = P::fill(row.lse_low);
  const auto p_scale = P::fill(row.ce_scale * ce_factor + row.z_scale * z_factor);
  const auto smooth_scale = P::fill(row.ce_scale * smoothing);
  const auto cap = P::fill(softcap);
  const auto one = P::fill(1);
  for_each_pack<T>(args.cols, [&](int64_t i, auto count) {
    auto y = P::load(x + i, count);
    auto slope = one;
    if constexpr (SOFTCAP) {
      const auto t = tanh<T>(y / cap);
      slope = (one - t) * (one + t);
      y = cap * t;
    }
    auto d = exp<T>((y - lse) - lse_low) * p_scale;
    if constexpr (SMOOTHING) {
      d = weight == nullptr ? d - smooth_scale : d - smooth_scale * P::template load<A>(weight + i, count);
    }
    if constexpr (SOFTCAP) d = d * slope;
    d.store(dx + i, count);
  });
  dx[target] = static_cast<T>(d_target);
}

// f(T{}, softcap, smoothing), the last two as compile-time booleans.
template <typename F>
inline void dispatch_cross_entropy(const CrossEntropy& args, const F& f) {
  dispatch_floating(args.dtype, [&](auto element) {
    const bool softcap = args.softcap != 0;
    const bool smoothing = args.label_smoothing != 0;
    if (softcap && smoothing) return f(element, std::true_type{}, std::true_type{});
    if (softcap) return f(element, std::true_type{}, std::false_type{});
    if (smoothing) return f(element, std::false_type{}, std::true_type{});
    f(element, std::false_type{}, std::false_type{});
  });
}

template <typename A>
inline RowContext<A> row_context(
    const CrossEntropy& args, int64_t row, int64_t target, A y_target, A lse, A lse_low) {
  RowContext<A> context{.y_target = y_target, .lse = lse, .lse_low = lse_low};
  const auto* totals = static_cast<const A*>(args.totals);
  A upstream = args.dloss == nullptr ? A(1) : static_cast<const A*>(args.dloss)[row * args.dloss_stride];
  if (args.use_token_scaling) upstream *= std::exp(context.log_p());
  int exponent = 0;
  const A ce_divisor = args.divide ? totals[0] : std::frexp(totals[0], &exponent);
  const A z_divisor = std::ldexp(totals[1], -exponent);
  context.target_weight = args.weight == nullptr ? A(1) : static_cast<const A*>(args.weight)[target];
  context.ce_scale = ce_divisor == 0 ? A(0) : upstream / ce_divisor;
  context.z_scale = z_divisor == 0 ? A(0) : upstream / z_divisor;
  return context;
}

inline void cross_entropy_forward(const CrossEntropy& args) {
  dispatch_cross_entropy(args, [&](auto element, auto softcap, auto smoothing) {
    using T = decltype(element);
    using A = Accumulate<T>;
    constexpr bool kSoftcap = decltype(softcap)::value;
    constexpr bool kSmoothing = decltype(smoothing)::value;
    auto* ce = static_cast<A*>(args.ce);
    auto* lse = static_cast<A*>(args.lse_out);
    auto* lse_low = static_cast<A*>(args.lse_low_out);
    auto* row_scale = static_cast<A*>(args.row_scale);
    at::parallel_for(0, args.rows, row_grain(args.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(args.logits) + row * args.logits_stride;
        T* dx = args.dlogits == nullptr ? nullptr : static_cast<T*>(args.dlogits) + row * args.dlogits_stride;
        const int64_t target = args.target[row];
        if (target == args.ignore_index) {
          ce[row] = 0;
          if (lse_low != nullptr) lse_low[row] = 0;
          lse[row] = 0;
          if (row_scale != nullptr) row_scale[row] = 0;
          if (args.predicted != nullptr) args.predicted[row] = -1;
          if (dx != nullptr) std::fill(dx, dx + args.cols, static_cast<T>(0.0f));
          continue;
        }
        const A cap = static_cast<A>(args.softcap);
        const auto statistics = row_statistics<T, kSoftcap, kSmoothing>(
            x, args.cols, cap, static_cast<const A*>(args.weight), args.predicted != nullptr);
        if (args.predicted != nullptr) args.predicted[row] = statistics.argmax;
        const double max = static_cast<double>(statistics.max);
        lse[row] = static_cast<A>(max + statistics.log_sum);
        const A low = static_cast<A>((max - static_cast<double>(lse[row])) + statistics.log_sum);
        if (lse_low != nullptr) lse_low[row] = low;
        const A y_target = soft_capped(static_cast<A>(x[target]), cap);
        const auto context = row_context<A>(args, row, target, y_target, lse[row], low);
        const double neg_log_p = (max - static_cast<double>(y_target)) + statistics.log_sum;
        double loss = (1 - args.label_smoothing) * static_cast<double>(context.target_weight) * neg_log_p;
        if constexpr (kSmoothing) {
          const double weight_sum = static_cast<double>(static_cast<const A*>(args.totals)[2]);
          loss += args.label_smoothing / static_cast<double>(args.cols) *
              (weight_sum * (max + statistics.log_sum) - statistics.weighted_sum);
        }
        if (args.use_token_scaling) {
          const double p = std::exp(-neg_log_p);
          loss *= p;
          row_scale[row] = static_cast<A>(p);
        }
        ce[row] = static_cast<A>(loss);
        if (dx != nullptr) row_gradient<T, kSoftcap, kSmoothing>(args, x, dx, target, context);
      }
    });
  });
}

inline void cross_entropy_backward(const CrossEntropy& args) {
  dispatch_cross_entropy(args, [&](auto element, auto softcap, auto smoothing) {
    using T = decltype(element);
    using A = Accumulate<T>;
    at::parallel_for(0, args.rows, row_grain(args.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(args.logits) + row * args.logits_stride;
        T* dx = static_cast<T*>(args.dlogits) + row * args.dlogits_stride;
        const int64_t target = args.target[row];
        if (target == args.ignore_index) {
          std::fill(dx, dx + args.cols, static_cast<T>(0.0f));
          continue;
        }
        const A y_target = soft_capped(static_cast<A>(x[target]), static_cast<A>(args.softcap));
        const auto context = row_context<A>(args, row, target, y_target, static_cast<const A*>(args.lse)[row],
            static_cast<const A*>(args.lse_low)[row]);
        row_gradient<T, decltype(softcap)::value, decltype(smoothing)::value>(args, x, dx, target, context);
      }
    });
  });
}

inline void scale(const Scale& args) {
  dispatch_floating(args.dtype, [&](auto element) {
    using T = decltype(element);
    using P = Pack<T>;
    const auto factor = P::fill(static_cast<Accumulate<T>>(args.factor));
    at::parallel_for(0, args.size, kGrain, [&](int64_t begin, int64_t end) {
      const T* in = static_cast<const T*>(args.in) + begin;
      T* out = static_cast<T*>(args.out) + begin;
      for_each_pack<T>(end - begin,
          [&](int64_t i, auto count) { (P::load(in + i, count) * factor).store(out + i, count); });
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace liger::cpu
