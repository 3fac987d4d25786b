// The rows of a residual block's tail, see eca.h: a vector of elements is computed by one expression
// for both layouts. A row is a plane, whose coefficients are single values, or the channels of a
// pixel, each with coefficients of its own.
// Included once per instruction set by kernels.h, inside its namespace.

// ---- pieces of a row ----

// Up to kLanes elements of a row: whole vectors of memory, of which the first n count, or, where
// kExact, just n elements.
template <bool kExact, class T>
struct Piece {
  int64_t n;

  template <class U>  // U is T, or the accumulator for coefficients
  Vec<T> load_from(const U* p) const {
    if constexpr (kExact) return load_first(p, n);
    else return load(p);
  }
  // around: past the caches; then p is a multiple of a vector's size.
  void store_to(T* p, Vec<T> v, bool around) const {
    if constexpr (kExact) store_first(p, v, n);
    else if (around) store<true>(p, v);
    else store<false>(p, v);
  }
};

// Calls f(i, piece, k) for the elements [first, end) of a row, with k = 0 and 1 in turn: two sums
// are two chains of additions, and hide the latency of one. k is a constant, so that a sum stays in
// its register. The last piece may overhang into what follows in memory; a processor with masked
// loads and stores has no use for that.
template <class T, class F>
inline void each_piece_in_turn(int64_t first, int64_t end, bool overhang, F f) {
  constexpr int64_t w = kLanes<T>;
  const Piece<false, T> whole{w};
  int64_t i = first;
  for (; i + 2 * w <= end; i += 2 * w) {
    f(i, whole, Constant<0>());
    f(i + w, whole, Constant<1>());
  }
  if (i + w <= end) f(i, whole, Constant<0>()), i += w;
  if (i == end) return;
  if (overhang && kVectorBytes < 64) f(i, Piece<false, T>{end - i}, Constant<1>());
  else f(i, Piece<true, T>{end - i}, Constant<1>());
}

// Calls f(i, piece) for them.
template <class T, class F>
inline void each_piece(int64_t first, int64_t end, bool overhang, F f) {
  each_piece_in_turn<T>(first, end, overhang, [=](int64_t i, auto piece, auto) { f(i, piece); });
}

// v, for a sum: zero where another row's elements are.
template <bool kExact, class T>
inline Vec<T> counted(Piece<kExact, T> piece, Vec<T> v) {
  if (kExact || kVectorBytes == 64 || piece.n == kLanes<T>) return v;
  return first_lanes<Vec<T>>(piece.n) ? v : Vec<T>{};
}

// ---- coefficients; a null pointer for one that is not used ----

template <class T>
struct OfPlane {
  static constexpr bool kPlanes = true;
  Vec<T> value;
  explicit OfPlane(const Acc<T>* of) : value(of ? broadcast<Vec<T>>(*of) : Vec<T>{}) {}
  template <class P>
  Vec<T> at(int64_t, P) const {
    return value;
  }
};

template <class T>
struct OfPixel {
  static constexpr bool kPlanes = false;
  const Acc<T>* values;
  explicit OfPixel(const Acc<T>* of) : values(of) {}
  // What overhangs in the maps does not here: nothing need follow the last channel's value.
  template <class P>
  Vec<T> at(int64_t i, P piece) const {
    return piece.n < kLanes<T> ? load_first(values + i, piece.n) : load(values + i);
  }
};

// ---- the mask of ReLU ----

template <class V>
constexpr int kLanesOf = kVectorBytes / sizeof(decltype(V()[0] + 0));

// One bit for each lane.
template <class V>
inline uint32_t bits_of(Lanes<V> lanes) {
#if defined(ECA_AVX512)
  if constexpr (kLanesOf<V> == 16) return _mm512_movepi32_mask((__m512i)lanes);
  else return _mm512_movepi64_mask((__m512i)lanes);
#elif defined(ECA_AVX2)
  if constexpr (kLanesOf<V> == 8) return _mm256_movemask_ps((__m256)lanes);
  else return _mm256_movemask_pd((__m256d)lanes);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanesOf<V>; ++i) bits |= (lanes[i] ? 1u : 0u) << i;
  return bits;
#endif
}

template <class V>
inline Lanes<V> lanes_of(uint32_t bits) {
#if defined(ECA_AVX512)
  if constexpr (kLanesOf<V> == 16) return (Lanes<V>)_mm512_movm_epi32(__mmask16(bits));
  else return (Lanes<V>)_mm512_movm_epi64(__mmask8(bits));
#else
  Lanes<V> bit;
  for (int i = 0; i < kLanesOf<V>; ++i) bit[i] = 1 << i;
  return ((Lanes<V>{} + (decltype(bit[0] + 0))bits) & bit) != 0;
#endif
}

// Bits of the elements from i on, i a multiple of kLanes. A row's bits come in ascending order, and
// its first ones clear the byte.
template <class T>
inline void store_bits_of(uint8_t* mask, int64_t i, int64_t n, uint32_t bits) {
  constexpr int64_t w = kLanes<T>;
  if (n < w) bits &= (1u << n) - 1;
  if constexpr (w < 8) {
    mask[i / 8] = uint8_t((i % 8 ? mask[i / 8] : 0) | bits << i % 8);
  } else {
    mask[i / 8] = uint8_t(bits);
    if (w == 16 && n > 8) mask[i / 8 + 1] = uint8_t(bits >> 8);
  }
}

template <class T>
inline uint32_t load_bits_of(const uint8_t* mask, int64_t i, int64_t n) {
  if constexpr (kLanes<T> < 8) return mask[i / 8] >> i % 8;
  else if (kLanes<T> == 16 && n > 8) return mask[i / 8] | uint32_t(mask[i / 8 + 1]) << 8;
  return mask[i / 8];
}

// ---- activations: silu(v) = v * s(v) with the logistic function s, gelu(v) = v * Phi(v) ----

// The cumulative normal distribution Phi(v) = erfc(-v / sqrt(2)) / 2, and its density.
struct Normal {
  Vf cumulative, density;
  // Abramowitz and Stegun, 7.1.26, as PyTorch's vectors have it: within 1e-7.
  explicit Normal(Vf v) {
    const Vf z = (v < 0.0f ? -v : v) * 0.70710678f;
    const Vf t = 1.0f / (1.0f + z * 0.3275911f), e = exp_nonpositive(-z * z);
    Vf p = broadcast<Vf>(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Vf above = p * t * e * 0.5f;  // 1 - Phi(|v|)
    cumulative = v < 0.0f ? above : 1.0f - above;
    density = e * 0.39894228f;
  }
};

struct NormalDouble {
  Vd cumulative, density;
  explicit NormalDouble(Vd v) {
    for (int i = 0; i < kLanes<double>; ++i) {
      cumulative[i] = __builtin_erfc(-v[i] * 0.70710678118654752) / 2;
      density[i] = __builtin_exp(-v[i] * v[i] / 2) * 0.39894228040143268;
    }
  }
};

inline Normal normal(Vf v) { return Normal(v); }
inline NormalDouble normal(Vd v) { return NormalDouble(v); }

// Functions of their own: inlined in every row they would be most of the kernels' code.
template <class V>
__attribute__((noinline)) V activated(Activation activation, V v) {
  return activation == Activation::kSilu ? v * sigmoid(v) : v * normal(v).cumulative;
}

template <class V>
__attribute__((noinline)) V slope(Activation activation, V v) {
  if (activation == Activation::kSilu) {
    const V s = sigmoid(v), one = broadcast<V>(1);
    return s * (one + v * (one - s));
  }
  const auto at = normal(v);
  return at.cumulative + v * at.density;
}

// ---- rows ----

// A row of the maps that a pass reads, and what it needs to compute v.
template <class T>
struct TailRow {
  Activation activation;
  const T *x, *identity, *dy;
  uint8_t* mask;
  const Acc<T>*p, *q, *centre, *identity_scale, *identity_centre;
};

// From a row to the next, 0 for what is absent.
struct RowStrides {
  int64_t x, identity, dy, mask, coefficients;
};

// Where rows of a result go, from element `first` of the first row on.
template <class T>
struct RowOut {
  T* to;
  int64_t stride;
  bool around;  // the caches; then vectors begin at multiples of their size
};

// The coefficients of the gradients, and where those go.
template <class T>
struct GradientRow {
  const Acc<T>*p, *q, *r, *identity_p, *identity_q, *identity_r;
  RowOut<T> dx, d_identity;  // without `to` for one that is not asked for
};

// Elements [first, end) of `count` rows, of which the first `safe` may overhang.
struct RowPart {
  int64_t count, first, end, safe;
};

// What is done with rows, compiled for their layout, activation and whether the identity is read.
template <class T>
struct RowFunctions {
  bool reads_identity;
  void (*write)(TailRow<T>, RowStrides, RowPart, RowOut<T> y);  // and the mask
  void (*gradients)(TailRow<T>, RowStrides, RowPart, GradientRow<T>);
  // Of planes: lanes[kind * kLanes + j], the lanes' sums of g, of g * (x - centre) and of
  // g * (identity - identity_centre) of the j-th one.
  void (*sum_planes)(TailRow<T>, RowStrides, RowPart, Vec<T>* lanes);
  // Of pixels: adds these to the values at lanes, lanes + width and lanes + 2 * width.
  void (*add_pixels)(TailRow<T>, RowStrides, RowPart, Acc<T>* lanes, int64_t width);
};

enum class Shape { kStraight, kReLU, kSmooth };  // of the activation; kSmooth is SiLU or GELU

template <Shape kShape, bool kIdentity, template <class> class Of, class T>
struct RowKernels {
  using V = Vec<T>;
  static constexpr bool kPlanes = Of<T>::kPlanes;

  // The coefficients of v at the elements of a piece. They are loaded before anything is stored:
  // the compiler cannot know that a store leaves them as they are.
  struct At {
    V p, q, centre, identity_scale, identity_centre;
  };

  // Those of a plane, or of all rows of pixels.
  struct Coefficients {
    Of<T> p, q, centre, identity_scale, identity_centre;

    explicit Coefficients(const TailRow<T>& row)
        : p(row.p), q(row.q), centre(row.centre), identity_scale(row.identity_scale),
          identity_centre(row.identity_centre) {}
    template <class P>
    At at(int64_t i, P piece) const {
      At found{p.at(i, piece), q.at(i, piece), centre.at(i, piece), {}, {}};
      if constexpr (kIdentity) {
        found.identity_scale = identity_scale.at(i, piece);
        found.identity_centre = identity_centre.at(i, piece);
      }
      return found;
    }
  };

  static void advance(TailRow<T>& row, const RowStrides& by) {
    row.x += by.x, row.identity += by.identity, row.dy += by.dy, row.mask += by.mask;
    row.p += by.coefficients, row.q += by.coefficients, row.centre += by.coefficients;
    row.identity_scale += by.coefficients, row.identity_centre += by.coefficients;
  }

  template <class P>
  static V from_centre(const TailRow<T>& row, const At& k, int64_t i, P piece) {
    return piece.load_from(row.x + i) - k.centre;
  }
  template <class P>
  static V identity_from_centre(const TailRow<T>& row, const At& k, int64_t i, P piece) {
    return piece.load_from(row.identity + i) - k.identity_centre;
  }
  // v
  template <class P>
  static V argument(const TailRow<T>& row, const At& k, int64_t i, P piece) {
    const V v = k.p * from_centre(row, k, i, piece) + k.q;
    if constexpr (!kIdentity) return v;
    else return v + k.identity_scale * identity_from_centre(row, k, i, piece);
  }
  // g = dy * act'(v)
  template <class P>
  static V gradient(const TailRow<T>& row, const At& k, int64_t i, P piece) {
    const V g = piece.load_from(row.dy + i);
    if constexpr (kShape == Shape::kReLU)
      return lanes_of<V>(load_bits_of<T>(row.mask, i, piece.n)) ? g : V{};
    else if constexpr (kShape == Shape::kSmooth)
      return g * slope(row.activation, argument(row, k, i, piece));
    else return g;
  }

  static void write(TailRow<T> row, RowStrides by, RowPart part, RowOut<T> y) {
    const auto one = [&](const TailRow<T>& of, const At& k, int64_t i, auto piece, T* to) {
      V v = argument(of, k, i, piece);
      if constexpr (kShape == Shape::kSmooth) v = activated(of.activation, v);
      if constexpr (kShape == Shape::kReLU) {
        const Lanes<V> kept = ~(v <= V{});  // NaN is kept
        v = kept ? v : V{};
        if (of.mask) store_bits_of<T>(of.mask, i, piece.n, bits_of<V>(kept));
      }
      piece.store_to(to + (i - part.first), v, y.around);
    };
    int64_t j = 0;
    if constexpr (!kPlanes) {  // two rows share the loads of their coefficients
      const Coefficients k(row);
      for (; in_pairs(by) && j + 2 <= part.count; j += 2, y.to += 2 * y.stride) {
        TailRow<T> next = row;
        advance(next, by);
        each_piece<T>(part.first, part.end, false, [&](int64_t i, auto piece) {
          const At at = k.at(i, piece);
          one(row, at, i, piece, y.to);
          one(next, at, i, piece, y.to + y.stride);
        });
        row = next;
        advance(row, by);
      }
    }
    for (; j < part.count; ++j, advance(row, by), y.to += y.stride) {
      const Coefficients k(row);
      each_piece<T>(part.first, part.end, j < part.safe,
                    [&](int64_t i, auto piece) { one(row, k.at(i, piece), i, piece, y.to); });
    }
  }

  static void gradients(TailRow<T> row, RowStrides by, RowPart part, GradientRow<T> to) {
    const bool by_x = to.q, by_identity = to.identity_q, need_dx = to.dx.to,
               need_d_identity = to.d_identity.to;
    // The next row, or two that have the same coefficients.
    const auto rows = [&](auto count, bool overhang) __attribute__((always_inline)) {
      constexpr int kRows = decltype(count)::value;
      const Coefficients k(row);
      const Of<T> p(to.p), q(to.q), r(to.r), identity_p(to.identity_p), identity_q(to.identity_q),
          identity_r(to.identity_r);
      TailRow<T> of[kRows];
      for (TailRow<T>& one : of) one = row, advance(row, by);
      const RowOut<T> dx = to.dx, d_identity = to.d_identity;
      each_piece<T>(part.first, part.end, overhang, [&](int64_t i, auto piece) {
        const At at = k.at(i, piece);
        V g[kRows], d[kRows];
        for (int j = 0; j < kRows; ++j) g[j] = gradient(of[j], at, i, piece);
        if (need_dx) {
          const V by_g = p.at(i, piece), rest = r.at(i, piece);
          for (int j = 0; j < kRows; ++j) d[j] = by_g * g[j] + rest;
          if (by_x) {
            const V slope = q.at(i, piece);
            for (int j = 0; j < kRows; ++j) d[j] += slope * from_centre(of[j], at, i, piece);
          }
          for (int j = 0; j < kRows; ++j)
            piece.store_to(dx.to + j * dx.stride + (i - part.first), d[j], dx.around);
        }
        if (!need_d_identity) return;
        const V by_g = identity_p.at(i, piece);
        for (int j = 0; j < kRows; ++j) d[j] = by_g * g[j];
        if constexpr (kIdentity)
          if (by_identity) {
            const V slope = identity_q.at(i, piece), rest = identity_r.at(i, piece);
            for (int j = 0; j < kRows; ++j)
              d[j] += slope * identity_from_centre(of[j], at, i, piece) + rest;
          }
        for (int j = 0; j < kRows; ++j)
          piece.store_to(d_identity.to + j * d_identity.stride + (i - part.first), d[j],
                         d_identity.around);
      });
      to.dx.to += need_dx ? kRows * dx.stride : 0;
      to.d_identity.to += need_d_identity ? kRows * d_identity.stride : 0;
      to.p += by.coefficients, to.r += by.coefficients;
      to.identity_p += to.identity_p ? by.coefficients : 0;
      if (by_x) to.q += by.coefficients;
      if (by_identity) to.identity_q += by.coefficients, to.identity_r += by.coefficients;
    };
    int64_t j = 0;
    if constexpr (!kPlanes)
      for (; in_pairs(by) && j + 2 <= part.count; j += 2) rows(Constant<2>(), false);
    for (; j < part.count; ++j) rows(Constant<1>(), j < part.safe);
  }

  static void sum_planes(TailRow<T> row, RowStrides by, RowPart part, V* lanes) {
    for (int64_t j = 0; j < part.count; ++j, advance(row, by)) {
      const Coefficients k(row);
      V all[2][3] = {};
      each_piece_in_turn<T>(
          part.first, part.end, j < part.safe, [&](int64_t i, auto piece, auto turn) {
            const At at = k.at(i, piece);
            const V g = counted(piece, gradient(row, at, i, piece));
            V(&to)[3] = all[turn.value];
            to[0] += g;
            to[1] += g * counted(piece, from_centre(row, at, i, piece));
            if constexpr (kIdentity)
              to[2] += g * counted(piece, identity_from_centre(row, at, i, piece));
          });
      for (int kind = 0; kind < (kIdentity ? 3 : 2); ++kind)
        lanes[kind * kLanes<T> + j] = all[0][kind] + all[1][kind];
    }
  }

  static void add_pixels(TailRow<T> row, RowStrides by, RowPart part, Acc<T>* lanes,
                         int64_t width) {
    const Coefficients k(row);
    // Two rows at a time take half of the additions into memory.
    const int64_t step = in_pairs(by) ? 2 : 1;
    for (int64_t j = 0; j < part.count; j += step) {
      const bool two = j + 2 <= part.count && step == 2;
      TailRow<T> next = row;
      if (two) advance(next, by);
      each_piece<T>(0, part.end, false, [&](int64_t i, auto piece) {
        const At at = k.at(i, piece);
        const V g = gradient(row, at, i, piece), x = from_centre(row, at, i, piece);
        V sums[3] = {g, g * x, V{}};
        if constexpr (kIdentity) sums[2] = g * identity_from_centre(row, at, i, piece);
        if (two) {
          const V more = gradient(next, at, i, piece);
          sums[0] += more, sums[1] += more * from_centre(next, at, i, piece);
          if constexpr (kIdentity) sums[2] += more * identity_from_centre(next, at, i, piece);
        }
        for (int kind = 0; kind < (kIdentity ? 3 : 2); ++kind) {
          Acc<T>* to = lanes + kind * width + i;
          store<false>(to, load(to) + sums[kind]);
        }
      });
      row = next;
      advance(row, by);
    }
  }

  static bool in_pairs(const RowStrides& by) { return in_other_pages<T>(by.x); }
};

template <Shape kShape, bool kIdentity, class T>
const RowFunctions<T>& row_functions_for(Layout layout) {
  using Planes = RowKernels<kShape, kIdentity, OfPlane, T>;
  using Pixels = RowKernels<kShape, kIdentity, OfPixel, T>;
  static constexpr RowFunctions<T> planes{kIdentity, Planes::write, Planes::gradients,
                                          Planes::sum_planes, nullptr};
  static constexpr RowFunctions<T> pixels{kIdentity, Pixels::write, Pixels::gradients, nullptr,
                                          Pixels::add_pixels};
  return layout == Layout::kPlanes ? planes : pixels;
}

template <class T>
const RowFunctions<T>& row_functions(const Problem& p, Activation activation, const Map& identity) {
  const auto with = [&](auto shape) -> const RowFunctions<T>& {
    constexpr Shape kShape = decltype(shape)::value;
    return identity.data ? row_functions_for<kShape, true, T>(p.layout)
                         : row_functions_for<kShape, false, T>(p.layout);
  };
  if (activation == Activation::kNone) return with(Constant<Shape::kStraight>());
  if (activation == Activation::kRelu) return with(Constant<Shape::kReLU>());
  return with(Constant<Shape::kSmooth>());
}
