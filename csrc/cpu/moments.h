// The mean of each plane and the sum of its squared distances from it, see eca.h, in one pass.
// Included once per instruction set by kernels.h, inside its namespace.

// The mean of `count` values and the sum of their squared distances from it, in parts that are
// merged (Chan, Golub and LeVeque, 1979).
struct Moment {
  double count = 0, mean = 0, squares = 0;

  // n values whose distances from `pivot` and squared distances have these sums
  void add(double n, double pivot, double distance, double square) {
    const double shift = distance / n, total = count + n;
    const double between = pivot + shift - mean;
    squares += square - distance * shift + between * between * count * n / total;
    mean += between * n / total;
    count = total;
  }
};

// Elements of a plane that are read twice out of a core's cache.
constexpr int64_t kMomentBlock = 4096;
// Rows of pixels whose mean is the first pivot, and rows that are added in float.
constexpr int64_t kPivotRows = 16, kMomentRows = 64;

template <class T>
Moment moment_of(const T* x, int64_t length) {
  using V = Vec<T>;
  Moment m;
  for (int64_t first = 0; first < length; first += kMomentBlock) {
    const int64_t n = min_of(kMomentBlock, length - first);
    const Acc<T> pivot = Acc<T>(reduce_row<false>(x + first, x, n) / n);
    const V about = broadcast<V>(pivot);
    Total distance, square;
    for (int64_t i = first; i < first + n; i += kTailBlock) {
      V d[2] = {V{}, V{}}, s[2] = {V{}, V{}};
      const int64_t end = min_of(i + kTailBlock, first + n);
      each_piece_in_turn<T>(i, end, false, [&](int64_t j, auto piece, auto turn) {
        V v = piece.load_from(x + j) - about;
        if (piece.n < kLanes<T>) v = first_lanes<V>(piece.n) ? v : V{};
        // This pass reads the first-level cache. What the next one will read comes meanwhile.
        __builtin_prefetch(x + j + n);
        d[turn.value] += v;
        s[turn.value] += v * v;
      });
      distance.add(sum(d[0] + d[1]));
      square.add(sum(s[0] + s[1]));
    }
    m.add(n, pivot, distance.value(), square.value());
  }
  return m;
}

// The moments of kLanes planes of less than kSmallPlane elements side by side.
template <class T>
void small_moments(double* mean, double* squares, const T* x, int64_t stride, int64_t length,
                   int64_t count) {
  using V = Vec<T>;
  constexpr int64_t w = kLanes<T>;
  const int64_t safe = stride >= length ? overhanging_rows(length, stride, count, w) : 0;
  const double share = 1.0 / length;
  for (int64_t c = 0; c < count; c += w) {
    const int64_t some = min_of(w, count - c);
    V distance[w], square[w];
    Acc<T> pivot[w];
    reduce_small_planes<false>(pivot, x + c * stride, stride, x, stride, length, some, true);
    for (int64_t j = 0; j < w; ++j) {
      V d[2] = {V{}, V{}}, s[2] = {V{}, V{}};
      if (j < some) {
        pivot[j] *= Acc<T>(share);
        const V about = broadcast<V>(pivot[j]);
        const T* row = x + (c + j) * stride;
        each_piece_in_turn<T>(0, length, c + j < safe, [&](int64_t i, auto piece, auto turn) {
          V v = piece.load_from(row + i) - about;
          if (piece.n < w) v = first_lanes<V>(piece.n) ? v : V{};
          d[turn.value] += v;
          s[turn.value] += v * v;
        });
      }
      distance[j] = d[0] + d[1], square[j] = s[0] + s[1];
    }
    const V all_d = sums(distance), all_s = sums(square);
    for (int64_t j = 0; j < some; ++j) {
      const double shift = all_d[j] * share;
      mean[c + j] = pivot[j] + shift, squares[c + j] = all_s[j] - all_d[j] * shift;
    }
  }
}

// Calls f(i, piece, first, many) for the pieces of `count` rows of pixels. With by_four it gets four
// rows at a time, and what is left over one by one: `many` is four or one.
template <class T, class F>
void each_pixels(int64_t count, int64_t length, bool by_four, const F& f) {
  for (int64_t row = 0; row < count;) {
    const bool four = by_four && row + 4 <= count;
    each_piece<T>(0, length, false, [&](int64_t i, auto piece) {
      if (four) f(i, piece, row, Constant<4>());
      else f(i, piece, row, Constant<1>());
    });
    row += four ? 4 : 1;
  }
}

// Adds `count` rows of pixels to the moments of each element of a row, into which `before` rows
// have gone. Distances are taken from the mean of those, so a row is read once: where that mean is
// far off, the distance between the two means makes most of the squares, and rounding the distances
// within the rows matters little. The first rows are read twice, for a mean to begin with.
template <class T>
void add_pixel_moments(const T* x, int64_t stride, int64_t count, int64_t length, int64_t before,
                       double* mean, double* squares, Acc<T>* scratch) {
  using V = Vec<T>;
  using A = Acc<T>;
  const int64_t width = whole_vectors<T>(length);
  A *pivot = scratch, *distance = scratch + width, *square = scratch + 2 * width;
  for (int64_t i = 0; i < 3 * width; i += kLanes<T>) store<false>(scratch + i, V{});
  const bool apart = in_other_pages<T>(stride);
  if (before > 0) {
    for (int64_t i = 0; i < length; ++i) pivot[i] = A(mean[i]);
  } else {
    for (int64_t i = 0; i < length; ++i) mean[i] = squares[i] = 0;
    const int64_t rows = min_of(kPivotRows, count);
    each_pixels<T>(rows, length, apart, [&](int64_t i, auto piece, int64_t row, auto many) {
      V v = load(pivot + i);
      for (int j = 0; j < decltype(many)::value; ++j)
        v += piece.load_from(x + (row + j) * stride + i);
      store<false>(pivot + i, v);
    });
    const A each = A(1) / rows;
    for (int64_t i = 0; i < width; ++i) pivot[i] *= each;
  }
  each_pixels<T>(count, length, apart, [&](int64_t i, auto piece, int64_t row, auto many) {
    const V about = load(pivot + i);
    V d = load(distance + i), s = load(square + i);
    for (int j = 0; j < decltype(many)::value; ++j) {
      const V v = piece.load_from(x + (row + j) * stride + i) - about;
      d += v, s += v * v;
    }
    store<false>(distance + i, d);
    store<false>(square + i, s);
  });
  // Moment::add() for all elements: they have the same counts.
  const double n = count, share = 1 / n, part = n / (before + n), weight = before * part;
  for (int64_t i = 0; i < length; ++i) {
    const double shift = distance[i] * share, between = pivot[i] + shift - mean[i];
    squares[i] += square[i] - distance[i] * shift + between * between * weight;
    mean[i] += between * part;
  }
}

template <class T>
void moments_as(const Moments& t, const ThreadPool& pool) {
  using A = Acc<T>;
  const Problem& p = t.problem;
  const int64_t C = p.channels, S = p.pixels, N = p.samples;
  const PixelRows g = tail_pixels(p, is_dense(p, t.x));
  if (p.layout == Layout::kPlanes) {
    each_rows<A>(p, g, sizeof(T), false, pool,
                 [&](int64_t n, int64_t c, int64_t count, int64_t, A*) {
                   double *mean = t.mean + n * C + c, *squares = t.squares + n * C + c;
                   if (S < kSmallPlane)
                     return small_moments<T>(mean, squares, row_of<const T>(t.x, n, c),
                                             t.x.row_stride, S, count);
                   for (int64_t i = 0; i < count; ++i) {
                     const Moment m = moment_of(row_of<const T>(t.x, n, c + i), S);
                     mean[i] = m.mean, squares[i] = m.squares;
                   }
                 });
    return;
  }
  // Each thread has some rows of a sample; with as many samples as threads, all of them.
  const int64_t L = g.length;
  const int64_t slabs = N >= pool.threads ? 1 : max_of(1, min_of(pool.threads, S * C / kGrain));
  const bool whole = slabs == 1 && L == C && !g.rest;  // then a part is the result
  Array<double> parts(whole ? 0 : N * slabs * 2 * L);
  const auto start = [&](int64_t slab) { return g.rows * slab / slabs; };
  parallel(pool, N * slabs, 1, [&](int64_t begin, int64_t end) {
    Array<A> scratch(3 * (L + kLanes<T>));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / slabs, first = start(i % slabs), last = start(i % slabs + 1);
      double* mean = whole ? t.mean + n * C : parts + i * 2 * L;
      double* squares = whole ? t.squares + n * C : mean + L;
      for (int64_t row = first; row < last; row += kMomentRows)
        add_pixel_moments<T>(row_of<const T>(t.x, n, row * g.fold), t.x.row_stride * g.fold,
                             min_of(kMomentRows, last - row), L, row - first, mean, squares,
                             scratch);
    }
  });
  if (whole) return;
  parallel(pool, N, 1, [&](int64_t begin, int64_t end) {
    Array<A> scratch(3 * (L + kLanes<T>));
    Array<double> rest(2 * L);
    for (int64_t n = begin; n < end; ++n) {
      if (g.rest) {
        add_pixel_moments<T>(row_of<const T>(t.x, n, g.rows * g.fold), 0, 1, g.rest, 0, rest,
                             rest + L, scratch);
      }
      for (int64_t c = 0; c < C; ++c) {
        Moment m;
        const auto merge = [&](double count, double mean, double squares) {
          if (count > 0) m.add(count, mean, 0, squares);
        };
        for (int64_t slab = 0; slab < slabs; ++slab)
          for (int64_t i = c; i < L; i += C) {
            const double* part = parts + (n * slabs + slab) * 2 * L;
            merge(start(slab + 1) - start(slab), part[i], part[L + i]);
          }
        for (int64_t i = c; i < g.rest; i += C) merge(1, rest[i], rest[L + i]);
        t.mean[n * C + c] = m.mean, t.squares[n * C + c] = m.squares;
      }
    }
  });
}

inline void moments(const Moments& t, const ThreadPool& pool) {
  visit(t.problem.dtype,
        [&](auto* type) { moments_as<typename Pointee<decltype(type)>::type>(t, pool); });
}
