// The rows of attention after an activation, see eca.h: z, its sums and its gradients, a vector of
// elements at a time. Pieces and coefficients of rows are those of tail_rows.h.
// Included once per instruction set by kernels.h, inside its namespace.

// ---- activations and their slopes ----

template <class V>
struct ValueAndSlope {
  V value, slope;
};

// 1 / v for v from 1 to 2. A division of 16 lanes takes as long as the rest of an activation.
inline Vf reciprocal(Vf v) {
#if defined(ECA_AVX512)
  const Vf guess = (Vf)_mm512_maskz_rcp14_ps(__mmask16(-1), (__m512)v);
  return guess + guess * (1.0f - v * guess);
#else
  return 1.0f / v;
#endif
}

// 1 / (1 + exp(-v)), one rounding less accurate than sigmoid(), which divides twice.
inline Vf logistic(Vf v) {
  const Vf e = exp_nonpositive(v < 0.0f ? v : -v), share = reciprocal(1.0f + e);
  return v == v ? (v < 0.0f ? e * share : share) : v;
}
inline Vd logistic(Vd v) { return sigmoid(v); }

template <class V>
inline ValueAndSlope<V> silu(V v) {
  const V s = logistic(v), z = v * s;
  return {z, s + z * (broadcast<V>(1) - s)};
}

// A function of its own, as those of tail_rows.h.
template <class V>
__attribute__((noinline)) ValueAndSlope<V> gelu(V v) {
  const auto at = normal(v);
  return {v * at.cumulative, at.cumulative + v * at.density};
}

template <class V>
inline V hard_swish(V v) {
  constexpr auto kSixth = decltype(v[0] + 0)(1) / 6;
  const V zero = V{}, six = broadcast<V>(6), from = v + broadcast<V>(3);
  const V above = from < zero ? zero : from;
  return v * (above > six ? six : above) * kSixth;
}

template <class V>
inline V hard_swish_slope(V v) {
  constexpr auto kThird = decltype(v[0] + 0)(1) / 3;
  const V zero = V{}, one = broadcast<V>(1), three = broadcast<V>(3);
  const V between = v * kThird + 0.5f;
  return v <= -three ? zero : v < three ? between : one;
}

// ---- rows ----

// A row of the maps that a pass reads, and the coefficients of v.
template <class T>
struct ActivatedRow {
  const T *x, *dy;
  const Acc<T>*p, *q, *centre;
};

// The coefficients of the gradient, and where it goes.
template <class T>
struct GatedGradientRow {
  const Acc<T>*gate, *shift, *slope, *offset;
  RowOut<T> dx;
};

enum class SumsOf { kValue, kProduct, kAll };  // z; dy * z; that and the four for the norm

constexpr int kinds_of(SumsOf of) { return of == SumsOf::kAll ? 5 : 1; }

// What is done with rows, compiled for their layout and activation. RowStrides has no identity and
// no mask here.
template <class T>
struct GatedFunctions {
  void (*write)(ActivatedRow<T>, RowStrides, RowPart, const Acc<T>* gate, RowOut<T> y);
  void (*gradients)(ActivatedRow<T>, RowStrides, RowPart, GatedGradientRow<T>);
  // By SumsOf; of planes and of pixels as in RowFunctions.
  void (*sum_planes[3])(ActivatedRow<T>, RowStrides, RowPart, Vec<T>* lanes);
  void (*add_pixels[3])(ActivatedRow<T>, RowStrides, RowPart, Acc<T>* lanes, int64_t width);
};

enum class Curve { kStraight, kReLU, kHardSwish, kSilu, kGelu };

template <Curve kCurve, template <class> class Of, class T>
struct GatedKernels {
  using V = Vec<T>;

  // Of a plane, or of all rows of pixels.
  struct Coefficients {
    Of<T> p, q, centre;
    explicit Coefficients(const ActivatedRow<T>& row) : p(row.p), q(row.q), centre(row.centre) {}
  };

  static void advance(ActivatedRow<T>& row, const RowStrides& by) {
    row.x += by.x, row.dy += by.dy;
    row.p += by.coefficients, row.q += by.coefficients, row.centre += by.coefficients;
  }

  template <class P>
  static V from_centre(const ActivatedRow<T>& row, const Coefficients& k, int64_t i, P piece) {
    return piece.load_from(row.x + i) - k.centre.at(i, piece);
  }

  static V value(V v) {
    if constexpr (kCurve == Curve::kStraight) return v;
    else if constexpr (kCurve == Curve::kReLU) return v <= V{} ? V{} : v;  // NaN is kept
    else if constexpr (kCurve == Curve::kHardSwish) return hard_swish(v);
    else if constexpr (kCurve == Curve::kSilu) return v * logistic(v);
    else return gelu(v).value;
  }

  static ValueAndSlope<V> both(V v) {
    const V one = broadcast<V>(1);
    if constexpr (kCurve == Curve::kStraight) return {v, one};
    else if constexpr (kCurve == Curve::kReLU) return {v <= V{} ? V{} : v, v <= V{} ? V{} : one};
    else if constexpr (kCurve == Curve::kHardSwish) return {hard_swish(v), hard_swish_slope(v)};
    else if constexpr (kCurve == Curve::kSilu) return silu(v);
    else return gelu(v);
  }

  // g * slope. Where an activation is flat, an infinite g must not become NaN.
  static V sloped(V g, V slope) {
    if constexpr (kCurve == Curve::kReLU) return slope == V{} ? V{} : g;
    else if constexpr (kCurve == Curve::kHardSwish) return slope == V{} ? V{} : g * slope;
    else return g * slope;
  }

  static void write(ActivatedRow<T> row, RowStrides by, RowPart part, const Acc<T>* gate,
                    RowOut<T> y) {
    for (int64_t j = 0; j < part.count; ++j, advance(row, by), y.to += y.stride) {
      const Coefficients k(row);
      const Of<T> a(gate + j * by.coefficients);
      each_piece<T>(part.first, part.end, j < part.safe, [&](int64_t i, auto piece) {
        const V v = k.p.at(i, piece) * from_centre(row, k, i, piece) + k.q.at(i, piece);
        piece.store_to(y.to + (i - part.first), a.at(i, piece) * value(v), y.around);
      });
    }
  }

  static void gradients(ActivatedRow<T> row, RowStrides by, RowPart part, GatedGradientRow<T> to) {
    const bool by_x = to.slope;
    for (int64_t j = 0; j < part.count; ++j, advance(row, by)) {
      const Coefficients k(row);
      const Of<T> gate(to.gate), shift(to.shift), slope(to.slope), offset(to.offset);
      const RowOut<T> dx = to.dx;
      each_piece<T>(part.first, part.end, j < part.safe, [&](int64_t i, auto piece) {
        const V p = k.p.at(i, piece), x = from_centre(row, k, i, piece);
        const V dz = gate.at(i, piece) * piece.load_from(row.dy + i) + shift.at(i, piece);
        V d = p * sloped(dz, both(p * x + k.q.at(i, piece)).slope);
        if (by_x) d += slope.at(i, piece) * x + offset.at(i, piece);
        piece.store_to(dx.to + (i - part.first), d, dx.around);
      });
      to.dx.to += dx.stride;
      to.gate += by.coefficients, to.shift += by.coefficients;
      if (by_x) to.slope += by.coefficients, to.offset += by.coefficients;
    }
  }

  // What one piece adds to each sum.
  template <SumsOf kOf, class P>
  static void terms(const ActivatedRow<T>& row, const Coefficients& k, int64_t i, P piece,
                    V (&to)[kinds_of(kOf)]) {
    const V x = from_centre(row, k, i, piece);
    const V v = k.p.at(i, piece) * x + k.q.at(i, piece);
    if constexpr (kOf == SumsOf::kValue) {
      to[0] = value(v);
    } else if constexpr (kOf == SumsOf::kProduct) {
      to[0] = piece.load_from(row.dy + i) * value(v);
    } else {
      const V dy = piece.load_from(row.dy + i);
      const ValueAndSlope<V> at = both(v);
      const V g = sloped(dy, at.slope);
      to[0] = dy * at.value, to[1] = g, to[2] = g * x, to[3] = at.slope, to[4] = at.slope * x;
    }
  }

  template <SumsOf kOf>
  static void sum_planes(ActivatedRow<T> row, RowStrides by, RowPart part, V* lanes) {
    constexpr int kKinds = kinds_of(kOf);
    for (int64_t j = 0; j < part.count; ++j, advance(row, by)) {
      const Coefficients k(row);
      V all[2][kKinds] = {};
      each_piece_in_turn<T>(part.first, part.end, j < part.safe,
                            [&](int64_t i, auto piece, auto turn) {
                              V more[kKinds];
                              terms<kOf>(row, k, i, piece, more);
                              // act(0) and act'(0) need not be zero, so what overhangs is left out.
                              if (piece.n < kLanes<T>)
                                for (V& v : more) v = first_lanes<V>(piece.n) ? v : V{};
                              for (int kind = 0; kind < kKinds; ++kind)
                                all[turn.value][kind] += more[kind];
                            });
      for (int kind = 0; kind < kKinds; ++kind)
        lanes[kind * kLanes<T> + j] = all[0][kind] + all[1][kind];
    }
  }

  template <SumsOf kOf>
  static void add_pixels(ActivatedRow<T> row, RowStrides by, RowPart part, Acc<T>* lanes,
                         int64_t width) {
    constexpr int kKinds = kinds_of(kOf);
    const Coefficients k(row);
    // Two rows at a time take half of the additions into memory.
    const int64_t step = in_other_pages<T>(by.x) ? 2 : 1;
    for (int64_t j = 0; j < part.count; j += step) {
      const bool two = j + 2 <= part.count && step == 2;
      ActivatedRow<T> next = row;
      if (two) advance(next, by);
      each_piece<T>(0, part.end, false, [&](int64_t i, auto piece) {
        V sums[kKinds];
        terms<kOf>(row, k, i, piece, sums);
        if (two) {
          V more[kKinds];
          terms<kOf>(next, k, i, piece, more);
          for (int kind = 0; kind < kKinds; ++kind) sums[kind] += more[kind];
        }
        for (int kind = 0; kind < kKinds; ++kind) {
          Acc<T>* to = lanes + kind * width + i;
          store<false>(to, load(to) + sums[kind]);
        }
      });
      row = next;
      advance(row, by);
    }
  }
};

template <Curve kCurve, class T>
const GatedFunctions<T>& gated_functions_for(Layout layout) {
  using Planes = GatedKernels<kCurve, OfPlane, T>;
  using Pixels = GatedKernels<kCurve, OfPixel, T>;
  constexpr SumsOf kValue = SumsOf::kValue, kProduct = SumsOf::kProduct, kAll = SumsOf::kAll;
  static constexpr GatedFunctions<T> planes{
      Planes::write,
      Planes::gradients,
      {Planes::template sum_planes<kValue>, Planes::template sum_planes<kProduct>,
       Planes::template sum_planes<kAll>},
      {}};
  static constexpr GatedFunctions<T> pixels{
      Pixels::write,
      Pixels::gradients,
      {},
      {Pixels::template add_pixels<kValue>, Pixels::template add_pixels<kProduct>,
       Pixels::template add_pixels<kAll>}};
  return layout == Layout::kPlanes ? planes : pixels;
}

template <class T>
const GatedFunctions<T>& gated_functions(const Activated& of) {
  const Layout layout = of.problem.layout;
  switch (of.activation) {
    case Activation::kNone: return gated_functions_for<Curve::kStraight, T>(layout);
    case Activation::kRelu: return gated_functions_for<Curve::kReLU, T>(layout);
    case Activation::kHardSwish: return gated_functions_for<Curve::kHardSwish, T>(layout);
    case Activation::kSilu: return gated_functions_for<Curve::kSilu, T>(layout);
    default: return gated_functions_for<Curve::kGelu, T>(layout);
  }
}
