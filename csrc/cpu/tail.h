// The passes of a residual block's tail, see eca.h: moments, result, sums, gradients.
// Each reads every map once and writes every result once.
// Included once per instruction set by kernels.h, inside its namespace.

// Rows of all maps of a tail: planes, or pixels side by side.
struct TailRows {
  bool planes;
  int64_t step;        // rows of a map in one of ours: more than one where pixels are side by side
  int64_t length;      // elements
  int64_t mask_bytes;  // of one row of a map
  int64_t map_rows;    // of a sample

  TailRows(const Problem& p, const PixelRows& g)
      : planes(p.layout == Layout::kPlanes), step(planes ? 1 : g.fold),
        length(planes ? p.pixels : g.length), mask_bytes(mask_row_bytes(p)),
        map_rows(planes ? p.channels : p.pixels) {}

  uint8_t* mask_of(const uint8_t* mask, int64_t sample, int64_t row) const {
    return mask ? (uint8_t*)mask + (sample * map_rows + row) * mask_bytes : nullptr;
  }
};

// Pixels lie side by side only where the bits of each begin with a byte.
inline PixelRows tail_pixels(const Problem& p, bool dense) {
  return PixelRows(p, dense && p.channels % 8 == 0);
}

inline bool is_dense(const Problem& p, const Map& map) {
  return !map.data || map.row_stride == p.channels;
}

// What a pass writes, with `stream` around the caches. It is not written directly where it lies over
// an input that is still to be read, or where some vectors do not begin at multiples of their size.
template <class T>
struct Written {
  Map map;
  bool stream, direct;

  Written(const Problem& p, const Map& out, const Map& in, const Map& other)
      : map(out), stream(out.data && streams<T>(p, out, in) && out.data != other.data),
        direct(out.data != in.data && out.data != other.data && (!stream || aligned(p, out))) {}

 private:
  static bool aligned(const Problem& p, const Map& out) {
    const int64_t length = p.layout == Layout::kPlanes ? p.pixels : p.channels;
    const auto whole = [](int64_t n) { return n % kLanes<T> == 0; };
    return (uintptr_t)out.data % (kLanes<T> * sizeof(T)) == 0 && whole(length) &&
           whole(out.row_stride) && whole(out.sample_stride);
  }
};

// Calls f(row, part, out) for parts of `count` rows from `row` on; out[k] is where the k-th result of
// the part goes. Results that are not written directly are staged in the first-level cache.
// `stride` is the least one of the maps that f reads.
template <int kResults, class T, class F>
void write_rows(const TailRows& rows, const Written<T> (&results)[kResults], int64_t sample,
                int64_t row, int64_t count, int64_t length, int64_t stride, const F& f) {
  constexpr int64_t kStage = 8192 / kResults / sizeof(T);  // they fit into the first-level cache
  alignas(64) T stage[kResults][kStage + 64];
  bool staged = false, staged_dense = true, direct_dense = true;
  for (const Written<T>& r : results) {
    if (!r.map.data) continue;
    const bool dense = r.map.row_stride * rows.step == length;
    staged = staged || !r.direct;
    if (r.direct) direct_dense = direct_dense && dense;
    else staged_dense = staged_dense && dense;
  }
  // What overhangs is read from, and written to, the next row, which is written after.
  const int64_t safe =
      stride >= length && direct_dense ? overhanging_rows(length, stride, count, kLanes<T>) : 0;
  const int64_t together = !staged ? count : staged_dense ? max_of(kStage / length, 1) : 1;
  const int64_t part = staged ? min_of(length, kStage) : length;
  for (int64_t i = 0; i < count; i += together) {
    const int64_t some = min_of(together, count - i), at = row + i * rows.step;
    for (int64_t first = 0; first < length; first += part) {
      const int64_t end = min_of(first + part, length);
      RowOut<T> out[kResults];
      for (int k = 0; k < kResults; ++k) {
        const Written<T>& r = results[k];
        if (r.map.data && r.direct)
          out[k] = {row_of<T>(r.map, sample, at) + first, r.map.row_stride * rows.step, r.stream};
        else out[k] = {r.map.data ? stage[k] : nullptr, length, false};
      }
      f(at, RowPart{some, first, end, min_of(max_of(safe - i, 0), some)}, out);
      for (int k = 0; k < kResults; ++k) {
        if (!results[k].map.data || results[k].direct) continue;
        T* out = row_of<T>(results[k].map, sample, at) + first;
        const int64_t elements = some > 1 ? some * length : end - first;
        if (results[k].stream) stream_copy(out, stage[k], elements);
        else __builtin_memcpy(out, stage[k], elements * sizeof(T));
      }
    }
  }
}

// Calls f(n, row, count, length, scratch) for rows of all maps, as many at once as stay in a core's
// cache; `row` counts rows of a map. scratch has room for kScratch values of each element of a row.
// Backwards, because what the pass before has read last may still be in the outer cache.
constexpr int64_t kScratch = 11;

template <class A, class F>
void each_rows(const Problem& p, const PixelRows& g, int64_t bytes, bool backwards,
               const ThreadPool& pool, const F& f) {
  const TailRows rows(p, g);
  const int64_t each = rows.planes ? p.channels : g.rows;  // of a sample
  const int64_t tile = pieces_in_cache(rows.length * bytes);
  const int64_t grain = max_of(kGrain / max_of(rows.length, 1), 1);
  parallel(pool, p.samples * each, grain, [&](int64_t begin, int64_t end) {
    Array<A> scratch(rows.planes ? 0 : kScratch * rows.length);
    for (int64_t done = 0; done < end - begin;) {
      int64_t n, first, count;
      if (backwards) {
        const int64_t last = end - done, stop = (last - 1) % each + 1;
        n = (last - 1) / each, count = min_of(min_of(tile, stop), last - begin);
        first = stop - count;
      } else {
        n = (begin + done) / each, first = (begin + done) % each;
        count = min_of(min_of(tile, each - first), end - begin - done);
      }
      f(n, first * rows.step, count, rows.length, (A*)scratch);
      if (!rows.planes && first + count == each && g.rest)
        f(n, each * rows.step, 1, g.rest, (A*)scratch);
      done += count;
    }
    stream_fence();
  });
}

// ---- coefficients of the rows of a sample ----

// Values of a sample, or of all samples: a plane has one, each element of a row of pixels its own.
template <class A>
struct RowValues {
  const A* values;
  int64_t stride;  // from a row to the next

  RowValues() : values(nullptr), stride(0) {}
  // of: those of the sample's channels. scratch: g.length values, for pixels side by side.
  RowValues(const TailRows& rows, const PixelRows& g, const void* of, int64_t channels, A* scratch)
      : values((const A*)of), stride(rows.planes ? 1 : 0) {
    if (rows.planes || g.fold == 1) return;
    repeat_values<A>(g, scratch, values, channels);
    values = scratch;
  }
  const A* of_row(int64_t row) const { return values ? values + row * stride : nullptr; }
};

// The coefficients of v for the rows of a sample; null for those that are absent.
template <class A>
struct TailValues {
  RowValues<A> p, q, centre, identity_scale, identity_centre;

  TailValues(const TailRows& rows, const PixelRows& g, const TailCoefficients& k, int64_t sample,
             int64_t channels, A* scratch) {
    const auto of = [&](const void* values, int64_t sample_stride, int64_t place) {
      if (!values) return RowValues<A>();
      return RowValues<A>(rows, g, (const A*)values + sample * sample_stride, channels,
                          scratch + place * g.length);
    };
    p = of(k.p, channels, 0), q = of(k.q, channels, 1), centre = of(k.centre, 0, 2);
    identity_scale = of(k.identity_scale, 0, 3), identity_centre = of(k.identity_centre, 0, 4);
  }
};

template <class T, class Pass>
TailRow<T> tail_row(const Pass& t, const TailRows& rows, const TailValues<Acc<T>>& k,
                    int64_t sample, int64_t row) {
  return {t.activation,
          row_of<const T>(t.x, sample, row),
          t.identity.data ? row_of<const T>(t.identity, sample, row) : nullptr,
          nullptr,
          rows.mask_of(t.mask, sample, row),
          k.p.of_row(row),
          k.q.of_row(row),
          k.centre.of_row(row),
          k.identity_scale.of_row(row),
          k.identity_centre.of_row(row)};
}

// The same with dy.
template <class T, class Pass>
TailRow<T> gradient_row(const Pass& t, const TailRows& rows, const TailValues<Acc<T>>& k,
                        int64_t sample, int64_t row) {
  TailRow<T> found = tail_row<T>(t, rows, k, sample, row);
  found.dy = row_of<const T>(t.dy, sample, row);
  return found;
}

inline RowStrides strides_of(const TailRows& rows, const Map& x, const Map& identity, const Map& dy,
                             bool mask) {
  const auto of = [&](const Map& map) { return map.data ? map.row_stride * rows.step : 0; };
  return {of(x), of(identity), of(dy), mask ? rows.mask_bytes * rows.step : 0, rows.planes ? 1 : 0};
}

// ---- the result ----

inline int64_t least_stride(const TailRows& rows, const Map& a, const Map& b, const Map& c) {
  int64_t least = a.row_stride;
  if (b.data) least = min_of(least, b.row_stride);
  if (c.data) least = min_of(least, c.row_stride);
  return least * rows.step;
}

constexpr Map kNoMap{nullptr, 0, 0};

// How the result is written.
template <class T>
struct TailPlan {
  const Tail& t;
  PixelRows g;
  TailRows rows;
  Written<T> results[1];
  int64_t stride;
  const RowFunctions<T>& functions;

  explicit TailPlan(const Tail& tail)
      : t(tail),
        g(tail_pixels(t.problem, is_dense(t.problem, t.x) && is_dense(t.problem, t.identity) &&
                                     is_dense(t.problem, t.y))),
        rows(t.problem, g), results{Written<T>(t.problem, t.y, t.x, t.identity)},
        stride(least_stride(rows, t.x, t.identity, kNoMap)),
        functions(row_functions<T>(t.problem, t.activation, t.identity)) {}

  void write(int64_t n, int64_t row, int64_t count, int64_t length, Acc<T>* scratch) const {
    const TailValues<Acc<T>> k(rows, g, t.coefficients, n, t.problem.channels, scratch);
    const RowStrides by = strides_of(rows, t.x, t.identity, kNoMap, t.mask);
    write_rows<1, T>(rows, results, n, row, count, length, stride,
                     [&](int64_t at, RowPart part, const RowOut<T>* out) {
                       functions.write(tail_row<T>(t, rows, k, n, at), by, part, out[0]);
                     });
  }
};

template <class T>
void tail_as(const Tail& t, const ThreadPool& pool) {
  const TailPlan<T> plan(t);
  each_rows<Acc<T>>(t.problem, plan.g, 3 * sizeof(T), true, pool,
                    [&](int64_t n, int64_t row, int64_t count, int64_t length, Acc<T>* scratch) {
                      plan.write(n, row, count, length, scratch);
                    });
}

// ---- sums ----

// Elements that the lanes add up before the totals get them.
constexpr int64_t kTailBlock = 1024;

// result[kind * distance + i], the sums over `count` planes from c on: kLanes of them side by side,
// or a long plane in parts, whose sums meet in double. f(plane, part, lanes) gives the lanes' sums,
// lanes[kind * kLanes + j] of the j-th plane; there are kMost kinds or fewer.
template <int kMost, class T, class F>
void sums_of_planes(const TailRows& rows, int64_t stride, int64_t c, int64_t count, int kinds,
                    double* result, int64_t distance, const F& f) {
  constexpr int64_t w = kLanes<T>;
  const int64_t length = rows.length;
  Vec<T> lanes[kMost * w];
  if (length > kTailBlock) {
    for (int64_t i = 0; i < count; ++i) {
      Total total[kMost];
      for (int64_t first = 0; first < length; first += kTailBlock) {
        f(c + i, RowPart{1, first, min_of(first + kTailBlock, length), 0}, lanes);
        for (int kind = 0; kind < kinds; ++kind) total[kind].add(sum(lanes[kind * w]));
      }
      for (int kind = 0; kind < kinds; ++kind) result[kind * distance + i] = total[kind].value();
    }
    return;
  }
  const int64_t safe = stride >= length ? overhanging_rows(length, stride, count, w) : 0;
  for (int64_t i = 0; i < count; i += w) {
    const int64_t some = min_of(w, count - i);
    f(c + i, RowPart{some, 0, length, min_of(max_of(safe - i, 0), some)}, lanes);
    for (int kind = 0; kind < kinds; ++kind) {
      for (int64_t j = some; j < w; ++j) lanes[kind * w + j] = Vec<T>{};
      const Vec<T> all = sums(lanes + kind * w);
      for (int64_t j = 0; j < some; ++j) result[kind * distance + i + j] = all[j];
    }
  }
}

// total[kind * g.length + i] += the sums over the rows [first, end) of a sample's pixels, with what
// follows the last whole row. f(row, part, lanes, width) adds rows to lanes[kind * width + i].
template <class T, class F>
void sums_of_pixels(const PixelRows& g, int64_t first, int64_t end, int kinds, double* total,
                    const F& f) {
  const int64_t width = g.length + kLanes<T>;
  Array<Acc<T>> lanes(kinds * width);
  constexpr int64_t kRows = 64;  // added in float before the double total gets them
  const auto add = [&](int64_t row, int64_t count, int64_t length) {
    for (int64_t block = 0; block < count; block += kRows) {
      for (int64_t i = 0; i < kinds * width; ++i) lanes[i] = 0;
      f((row + block) * g.fold, RowPart{min_of(kRows, count - block), 0, length, 0}, lanes, width);
      for (int kind = 0; kind < kinds; ++kind)
        for (int64_t i = 0; i < length; ++i) total[kind * g.length + i] += lanes[kind * width + i];
    }
  };
  add(first, end - first, g.length);
  if (end == g.rows && g.rest) add(g.rows, 1, g.rest);
}

// How the sums are taken.
template <class T>
struct SumsPlan {
  using A = Acc<T>;
  const TailSums& t;
  PixelRows g;
  TailRows rows;
  int64_t stride;
  const RowFunctions<T>& functions;
  int kinds;  // that are asked for

  explicit SumsPlan(const TailSums& tail, const PixelRows& pixels)
      : t(tail), g(pixels), rows(t.problem, g), stride(least_stride(rows, t.dy, t.x, t.identity)),
        functions(row_functions<T>(t.problem, t.activation, t.identity)),
        kinds(t.identity_sum ? 3 : 2) {}

  // result[kind * distance + i] of `count` planes from c on.
  void sum_planes(int64_t n, int64_t c, int64_t count, double* result, int64_t distance) const {
    const TailValues<A> k(rows, g, t.coefficients, n, t.problem.channels, nullptr);
    const RowStrides by = strides_of(rows, t.x, t.identity, t.dy, t.mask);
    sums_of_planes<3, T>(rows, stride, c, count, kinds, result, distance,
                         [&](int64_t plane, RowPart part, Vec<T>* lanes) {
                           functions.sum_planes(gradient_row<T>(t, rows, k, n, plane), by, part,
                                                lanes);
                         });
  }

  // total[kind * g.length + i] += the sums over the rows [first, end) of a sample's pixels, with
  // what follows the last whole row.
  void sum_pixels(int64_t n, int64_t first, int64_t end, double* total) const {
    Array<A> scratch(kScratch * g.length);
    const TailValues<A> k(rows, g, t.coefficients, n, t.problem.channels, scratch);
    const RowStrides by = strides_of(rows, t.x, t.identity, t.dy, t.mask);
    sums_of_pixels<T>(g, first, end, functions.reads_identity ? 3 : 2, total,
                      [&](int64_t row, RowPart part, A* lanes, int64_t width) {
                        functions.add_pixels(gradient_row<T>(t, rows, k, n, row), by, part, lanes,
                                             width);
                      });
  }
};

template <class T>
void tail_sums_as(const TailSums& t, const ThreadPool& pool) {
  using A = Acc<T>;
  const Problem& p = t.problem;
  const int64_t C = p.channels, distance = p.samples * C;
  const bool dense = is_dense(p, t.dy) && is_dense(p, t.x) && is_dense(p, t.identity);
  const SumsPlan<T> plan(t, tail_pixels(p, dense));
  if (p.layout == Layout::kPlanes) {
    each_rows<A>(p, plan.g, 2 * sizeof(T), false, pool,
                 [&](int64_t n, int64_t c, int64_t count, int64_t, A*) {
                   plan.sum_planes(n, c, count, t.sums + n * C + c, distance);
                 });
    return;
  }
  walk_pixels<A>(
      p, plan.g, 2 * sizeof(T), pool,
      [&](int64_t n, int64_t first, int64_t end, double* total) {
        plan.sum_pixels(n, first, end, total);
      },
      [&](int64_t n, const double* sums, A*, A*) {
        for (int kind = 0; kind < plan.kinds; ++kind)
          for (int64_t c = 0; c < C; ++c) t.sums[kind * distance + n * C + c] = sums[kind * C + c];
      },
      [](int64_t, int64_t, int64_t, const A*, const A*) {}, 3);
}

// ---- gradients ----

// How the gradients are written.
template <class T>
struct GradientPlan {
  const TailGradients& t;
  PixelRows g;
  TailRows rows;
  Written<T> results[2];
  int64_t stride;
  const RowFunctions<T>& functions;

  explicit GradientPlan(const TailGradients& tail)
      : t(tail),
        g(tail_pixels(t.problem, is_dense(t.problem, t.dy) && is_dense(t.problem, t.x) &&
                                     is_dense(t.problem, t.identity) && is_dense(t.problem, t.dx) &&
                                     is_dense(t.problem, t.d_identity))),
        rows(t.problem, g), results{Written<T>(t.problem, t.dx, t.dy, t.x),
                                    Written<T>(t.problem, t.d_identity, t.dy, t.x)},
        stride(least_stride(rows, t.dy, t.x, t.identity)),
        functions(row_functions<T>(t.problem, t.activation, t.identity)) {}

  void write(int64_t n, int64_t row, int64_t count, int64_t length, Acc<T>* scratch) const {
    using A = Acc<T>;
    const int64_t C = t.problem.channels, L = g.length;
    const TailValues<A> k(rows, g, t.coefficients, n, C, scratch);
    const auto values = [&](const void* of, int64_t place) {
      return of ? RowValues<A>(rows, g, of, C, scratch + place * L) : RowValues<A>();
    };
    const RowValues<A> p = values((const A*)t.p + n * C, 5), q = values(t.q, 6),
                       r = values((const A*)t.r + n * C, 7), ip = values(t.identity_p, 8),
                       iq = values(t.identity_q, 9), ir = values(t.identity_r, 10);
    const RowStrides by = strides_of(rows, t.x, t.identity, t.dy, t.mask);
    write_rows<2, T>(rows, results, n, row, count, length, stride,
                     [&](int64_t at, RowPart part, const RowOut<T>* out) {
                       functions.gradients(gradient_row<T>(t, rows, k, n, at), by, part,
                                           {p.of_row(at), q.of_row(at), r.of_row(at), ip.of_row(at),
                                            iq.of_row(at), ir.of_row(at), out[0], out[1]});
                     });
  }
};

template <class T>
void tail_gradients_as(const TailGradients& t, const ThreadPool& pool) {
  const GradientPlan<T> plan(t);
  each_rows<Acc<T>>(t.problem, plan.g, 4 * sizeof(T), true, pool,
                    [&](int64_t n, int64_t row, int64_t count, int64_t length, Acc<T>* scratch) {
                      plan.write(n, row, count, length, scratch);
                    });
}

// ---- the whole tail in one pass ----

// p and q of the rows of a sample: those of channels [c, c + count).
template <class A>
void block_coefficients(const BlockTail& b, int64_t n, int64_t c, int64_t count, const A* gate,
                        A* p, A* q) {
  const A scale = b.scale ? ((const A*)b.scale)[n] : A(1);
  const A *alpha = (const A*)b.alpha + c, *beta = (const A*)b.beta + c,
          *shift = (const A*)b.shift + c;
  for (int64_t i = 0; i < count; ++i) {
    p[i] = gate[i] * scale * alpha[i];
    q[i] = gate[i] * scale * beta[i] + shift[i];
  }
}

// Calls f(row, count, length) for blocks of the rows [first, end) of pixels, the last one first.
template <class F>
void each_block(const PixelRows& g, int64_t bytes, int64_t first, int64_t end, const F& f) {
  const int64_t block = pieces_in_cache(g.length * bytes);
  if (end == g.rows && g.rest) f(g.rows * g.fold, 1, g.rest);
  for (int64_t last = end; last > first; last -= block) {
    const int64_t from = max_of(first, last - block);
    f(from * g.fold, last - from, g.length);
  }
}

// A plane at the border of a thread's share is reduced by both threads, which store the same value.
template <class A>
void store_shared(A* to, A value) {
  __atomic_store(to, &value, __ATOMIC_RELAXED);
}

template <class T>
void block_tail_as(const BlockTail& b, const ThreadPool& pool) {
  using A = Acc<T>;
  const Problem& p = b.problem;
  const int64_t C = p.channels, S = p.pixels;
  const Taps<A> taps(p, b.weight, false);
  const A *alpha = (const A*)b.alpha, *beta = (const A*)b.beta, *centre = (const A*)b.rest.centre;
  A *distance = (A*)b.distance, *gate = (A*)b.gate;
  Array<A> own_p(p.samples * C), own_q(p.samples * C);
  Tail t{p, b.activation, b.rest, b.x, b.identity, b.y, b.mask};
  t.coefficients.p = own_p, t.coefficients.q = own_q;
  const TailPlan<T> plan(t);
  if (p.layout == Layout::kPlanes) {
    walk_planes<A>(
        p, taps, pieces_in_cache(2 * S * sizeof(T)), b.x.data == b.y.data, pool,
        [&](int64_t n, int64_t c, int64_t count, A* out) {
          reduce_planes<false, T>(out, b.x, b.x, n, c, count, S, true);
          for (int64_t i = 0; i < count; ++i) {
            const A d = out[i] / S - centre[c + i];
            store_shared(distance + n * C + c + i, d);
            out[i] = alpha[c + i] * d + beta[c + i];
          }
        },
        [&](int64_t n, int64_t c, int64_t count, const A*, const A* filtered) {
          const int64_t at = n * C + c;
          sigmoid_row(gate + at, filtered, count);
          block_coefficients<A>(b, n, c, count, gate + at, own_p + at, own_q + at);
          plan.write(n, c, count, S, nullptr);
        });
    return;
  }
  walk_pixels<A>(
      p, plan.g, 2 * sizeof(T), pool,
      [&](int64_t n, int64_t first, int64_t end, double* total) {
        reduce_pixels<false, T>(plan.g, b.x, b.x, n, first, end, total);
      },
      [&](int64_t n, const double* sums, A* z, A* mean) {
        for (int64_t c = 0; c < C; ++c) {
          distance[n * C + c] = sums[c] / S - centre[c];
          mean[c] = alpha[c] * distance[n * C + c] + beta[c];
        }
        filter_sample(taps, z, mean);
        sigmoid_row(gate + n * C, z, C);
        block_coefficients<A>(b, n, 0, C, gate + n * C, own_p + n * C, own_q + n * C);
      },
      [&](int64_t n, int64_t first, int64_t end, const A*, const A*) {
        Array<A> scratch(kScratch * plan.g.length);
        each_block(plan.g, 2 * sizeof(T), first, end,
                   [&](int64_t row, int64_t count, int64_t length) {
                     plan.write(n, row, count, length, scratch);
                   });
      });
}

template <class T>
void block_tail_backward_as(const BlockTailBackward& b, const ThreadPool& pool) {
  using A = Acc<T>;
  const BlockTail& f = b.forward;
  const Problem& p = f.problem;
  const int64_t C = p.channels, S = p.pixels, distance = p.samples * C;
  const Taps<A> taps(p, f.weight, true);
  const A *alpha = (const A*)f.alpha, *beta = (const A*)f.beta;
  const A *means = (const A*)f.distance, *gate = (const A*)f.gate;
  A* dmean = (A*)b.dmean;
  Array<A> own_p(distance), own_q(distance), own_r(distance), dz(distance);
  for (int64_t n = 0; n < p.samples; ++n)
    block_coefficients<A>(f, n, 0, C, gate + n * C, own_p + n * C, own_q + n * C);
  TailCoefficients k = f.rest;
  k.p = own_p, k.q = own_q;
  const int kinds = b.identity_sum ? 3 : 2;
  const TailSums t{p, f.activation, k, b.dy, f.x, f.identity, f.mask, b.sums, b.identity_sum};
  const TailGradients d{p,      f.activation, k,     b.dy,    f.x,   f.identity,       f.mask,
                        b.dx,   b.d_identity, own_p, nullptr, own_r, k.identity_scale, nullptr,
                        nullptr};
  const GradientPlan<T> plan(d);
  const PixelRows& g = plan.g;
  const SumsPlan<T> sums_plan(t, g);
  // dz of channels [c, c + count) from their sums, kind by kind at this distance.
  const auto slopes = [&](int64_t n, int64_t c, int64_t count, const double* sums, int64_t apart,
                          A* out) {
    const A scale = f.scale ? ((const A*)f.scale)[n] : A(1);
    for (int64_t i = 0; i < count; ++i) {
      const A a = gate[n * C + c + i];
      // Without a norm, beta is zero, and an infinite sum of g must not become NaN.
      const double by_beta = beta[c + i] == 0 ? 0 : beta[c + i] * sums[i];
      const double da = scale * (alpha[c + i] * sums[apart + i] + by_beta);
      out[i] = A(da) * a * (1 - a);
    }
  };
  const auto settle = [&](int64_t n, int64_t c, int64_t count, const A* values, const A* filtered) {
    const int64_t at = n * C + c;
    __builtin_memcpy(dz + at, values, count * sizeof(A));
    __builtin_memcpy(dmean + at, filtered, count * sizeof(A));
    for (int64_t i = 0; i < count; ++i) own_r[at + i] = alpha[c + i] * filtered[i] / S;
  };
  if (p.layout == Layout::kPlanes) {
    walk_planes<A>(
        p, taps, pieces_in_cache(2 * S * sizeof(T)), false, pool,
        [&](int64_t n, int64_t c, int64_t count, A* out) {
          Array<double> sums(3 * count);
          sums_plan.sum_planes(n, c, count, sums, count);
          for (int kind = 0; kind < kinds; ++kind)
            for (int64_t i = 0; i < count; ++i)
              store_shared(b.sums + kind * distance + n * C + c + i, sums[kind * count + i]);
          slopes(n, c, count, sums, count, out);
        },
        [&](int64_t n, int64_t c, int64_t count, const A* values, const A* filtered) {
          settle(n, c, count, values, filtered);
          plan.write(n, c, count, S, nullptr);
        });
  } else {
    walk_pixels<A>(
        p, g, 2 * sizeof(T), pool,
        [&](int64_t n, int64_t first, int64_t end, double* total) {
          sums_plan.sum_pixels(n, first, end, total);
        },
        [&](int64_t n, const double* sums, A* z, A* dm) {
          for (int kind = 0; kind < kinds; ++kind)
            for (int64_t c = 0; c < C; ++c)
              b.sums[kind * distance + n * C + c] = sums[kind * C + c];
          slopes(n, 0, C, sums, C, z);
          filter_sample(taps, dm, z);
          settle(n, 0, C, z, dm);
        },
        [&](int64_t n, int64_t first, int64_t end, const A*, const A*) {
          Array<A> scratch(kScratch * g.length);
          each_block(g, 2 * sizeof(T), first, end, [&](int64_t row, int64_t count, int64_t length) {
            plan.write(n, row, count, length, scratch);
          });
        },
        3);
  }
  if (!b.dweight) return;
  Array<A> mean(distance);
  for (int64_t i = 0; i < distance; ++i) mean[i] = alpha[i % C] * means[i] + beta[i % C];
  taps_gradient<A>(p, taps, dz, mean, b.dweight, pool);
}

// ---- for each dtype ----

inline void tail(const Tail& t, const ThreadPool& pool) {
  visit(t.problem.dtype,
        [&](auto* type) { tail_as<typename Pointee<decltype(type)>::type>(t, pool); });
}

inline void tail_sums(const TailSums& t, const ThreadPool& pool) {
  visit(t.problem.dtype,
        [&](auto* type) { tail_sums_as<typename Pointee<decltype(type)>::type>(t, pool); });
}

inline void tail_gradients(const TailGradients& t, const ThreadPool& pool) {
  visit(t.problem.dtype,
        [&](auto* type) { tail_gradients_as<typename Pointee<decltype(type)>::type>(t, pool); });
}

inline void block_tail(const BlockTail& b, const ThreadPool& pool) {
  visit(b.problem.dtype,
        [&](auto* type) { block_tail_as<typename Pointee<decltype(type)>::type>(b, pool); });
}

inline void block_tail_backward(const BlockTailBackward& b, const ThreadPool& pool) {
  visit(b.forward.problem.dtype, [&](auto* type) {
    block_tail_backward_as<typename Pointee<decltype(type)>::type>(b, pool);
  });
}
