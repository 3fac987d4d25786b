// The walk over pixels (NHWC). A gate needs every pixel of its sample: a thread reduces a slab of
// pixels, then rescales it in reverse order, because what it read last is still in the cache.
// Included once per instruction set by kernels.h, inside its namespace.

// Rows that are long enough for vectors: `fold` pixels side by side, where pixels have no gaps.
struct PixelRows {
  int64_t fold, length, rows, rest;  // `rest` elements follow the last whole row

  PixelRows(const Problem& p, bool dense) {
    constexpr int64_t kLength = 256;
    fold = dense ? max_of(1, min_of(kLength / p.channels, p.pixels)) : 1;
    length = fold * p.channels;
    rows = p.pixels / fold;
    rest = p.pixels % fold * p.channels;
  }
};

// reduce(n, row, end, total) adds rows into total. settle(n, sums, scale, shift) turns the sums of
// the channels into scale and shift of one pixel. rescale(n, row, end, scale, shift) writes rows.
// reduce and rescale include the rest where `end` is g.rows. With several kinds of sums, total has
// g.length of each, and sums has those of the channels, kind by kind.
template <class A, class Reduce, class Settle, class Rescale>
void walk_pixels(const Problem& p, const PixelRows& g, int64_t element_size, const ThreadPool& pool,
                 const Reduce& reduce, const Settle& settle, const Rescale& rescale,
                 int64_t kinds = 1) {
  const int64_t N = p.samples, C = p.channels, L = g.length;
  const int64_t work = max_of(p.pixels * C, 1);
  // With fewer samples than threads, a sample is split into slabs and the threads meet in between.
  const int64_t slabs =
      N >= pool.threads
          ? 1
          : max_of(1, min_of(min_of((pool.threads + N - 1) / max_of(N, 1), work / kGrain), g.rows));
  const auto start = [&](int64_t slab) { return g.rows * slab / slabs; };
  const auto sums = [&](int64_t n, int64_t slab, double* total) {
    for (int64_t i = 0; i < kinds * L; ++i) total[i] = 0;
    reduce(n, start(slab), start(slab + 1), total);
  };
  const auto gates = [&](int64_t n, double* total, A* scale, A* shift) {
    for (int64_t kind = 0; kind < kinds; ++kind)
      for (int64_t slab = 0; slab < slabs; ++slab)
        for (int64_t pixel = 0; pixel < L; pixel += C) {  // L is a multiple of C
          const double* from = total + (slab * kinds + kind) * L + pixel;
          double* to = total + kind * C;  // what is there has been added before
          for (int64_t c = 0; c < C; ++c) to[c] = (slab || pixel ? to[c] : 0) + from[c];
        }
    settle(n, total, scale, shift);
    for (int64_t i = C; i < L; ++i) scale[i] = scale[i - C], shift[i] = shift[i - C];
  };
  const auto apply = [&](int64_t n, int64_t slab, const A* scale, const A* shift) {
    rescale(n, start(slab), start(slab + 1), scale, shift);
    stream_fence();
  };
  if (slabs == 1) {
    // As many small samples together as stay in the cache: each switch from reading to writing
    // stops the prefetching, which cost up to 10 %.
    const int64_t most = pieces_in_cache(work * element_size);
    parallel(pool, N, max_of(kGrain / work, 1), [&](int64_t begin, int64_t end) {
      const int64_t group = min_of(most, end - begin);
      Array<double> total(kinds * L);
      Array<A> scale(group * L), shift(group * L);
      for (int64_t first = begin; first < end; first += group) {
        const int64_t count = min_of(group, end - first);
        for (int64_t i = 0; i < count; ++i) {
          sums(first + i, 0, total);
          gates(first + i, total, scale + i * L, shift + i * L);
        }
        for (int64_t i = 0; i < count; ++i) apply(first + i, 0, scale + i * L, shift + i * L);
      }
    });
    return;
  }
  Array<double> total(N * slabs * kinds * L);
  Array<A> scale(N * L), shift(N * L);
  parallel(pool, N * slabs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums(i / slabs, i % slabs, total + i * kinds * L);
  });
  parallel(pool, N, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      gates(n, total + n * slabs * kinds * L, scale + n * L, shift + n * L);
  });
  parallel(pool, N * slabs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      apply(i / slabs, i % slabs, scale + i / slabs * L, shift + i / slabs * L);
  });
}

template <bool kShift, class T>
void rescale_pixels(const PixelRows& g, const Map& y, const Map& x, int64_t n, int64_t first,
                    int64_t end, const Acc<T>* scale, const Acc<T>* shift, bool stream) {
  const auto row = [&](int64_t i, int64_t length) {
    affine_vector<kShift>(row_of<T>(y, n, i * g.fold), row_of<T>(x, n, i * g.fold), scale, shift,
                          length, stream);
  };
  // Blocks come in reverse order, the rows of a block in ascending order: hardware prefetches
  // upwards. With the rows reversed too, bfloat16 took 1.4 times as long.
  const int64_t row_bytes = g.length * (int64_t)sizeof(T);
  const int64_t block = pieces_in_cache(row_bytes);
  if (end == g.rows && g.rest) row(g.rows, g.rest);
  for (int64_t last = end; last > first; last -= block)
    for (int64_t i = max_of(first, last - block); i < last; ++i) row(i, g.length);
}

template <bool kDot, class T>
void reduce_pixels(const PixelRows& g, const Map& a, const Map& b, int64_t n, int64_t first,
                   int64_t end, double* total) {
  Array<Acc<T>> lane(g.length + kLanes<T>);
  const auto rows = [&](int64_t i, int64_t count, int64_t length) {
    reduce_rows<kDot>(total, (Acc<T>*)lane, row_of<T>(a, n, i * g.fold), a.row_stride * g.fold,
                      kDot ? row_of<T>(b, n, i * g.fold) : (T*)nullptr, b.row_stride * g.fold,
                      count, length);
  };
  rows(first, end - first, g.length);
  if (end == g.rows && g.rest) rows(g.rows, 1, g.rest);
}
