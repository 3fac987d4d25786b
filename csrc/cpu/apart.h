// Pooling and rescaling on their own, for gates that are made elsewhere. Each byte of a map is read
// from memory once and written once: dx = gate * dy needs no sum, so it is computed as dy is read.
// Included once per instruction set by kernels.h, inside its namespace.

// Calls f(n, c, count) for all planes, as many at once as stay in a core's cache.
template <class F>
void each_planes(const Problem& p, int64_t element_size, const ThreadPool& pool, const F& f) {
  const int64_t C = p.channels, tile = pieces_in_cache(p.pixels * element_size);
  const int64_t grain = max_of(kGrain / max_of(p.pixels, 1), 1);
  parallel(pool, p.samples * C, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t count = min_of(min_of(tile, C - i % C), end - i);
      f(i / C, i % C, count);
      i += count;
    }
    stream_fence();
  });
}

// Repeats the values of a sample's channels along a row of g.length elements.
template <class A>
void repeat_values(const PixelRows& g, A* row, const A* values, int64_t channels) {
  for (int64_t i = 0; i < g.length; i += channels)
    __builtin_memcpy(row + i, values, channels * sizeof(A));
}

template <bool kDot, class T>
void reduce_as(const Reduce& r, const ThreadPool& pool) {
  using A = Acc<T>;
  const Problem& p = r.problem;
  const int64_t C = p.channels, S = p.pixels;
  const Map& first = kDot ? r.dy : r.x;
  const A* gate = (const A*)r.gate;
  A* result = (A*)r.result;
  const bool stream = r.dx.data && streams<T>(p, r.dx, r.dy);
  if (p.layout == Layout::kPlanes) {
    each_planes(p, (kDot ? 2 : 1) * sizeof(T), pool, [&](int64_t n, int64_t c, int64_t count) {
      A* out = result + n * C + c;
      reduce_planes<kDot, T>(out, first, r.x, n, c, count, S);
      for (int64_t i = 0; i < count && !kDot; ++i) out[i] /= S;
      const A* a = gate + (r.dx.data ? n * C + c : 0);
      if (r.dx.data) rescale_planes<false, T>(r.dx, r.dy, n, c, count, S, a, a, stream);
    });
    return;
  }
  const bool dense = first.row_stride == C && r.x.row_stride == C;
  const PixelRows g(p, dense && (!r.dx.data || r.dx.row_stride == C));
  const int64_t row_bytes = 2 * g.length * (int64_t)sizeof(T);
  const int64_t block = r.dx.data ? pieces_in_cache(row_bytes) : g.rows;
  walk_pixels<A>(
      p, g, (kDot ? 2 : 1) * sizeof(T), pool,
      [&](int64_t n, int64_t begin, int64_t end, double* total) {
        Array<A> scale(r.dx.data ? g.length : 0);
        if (r.dx.data) repeat_values<A>(g, scale, gate + n * C, C);
        for (int64_t row = begin; row < end; row += block) {
          const int64_t last = min_of(row + block, end);
          reduce_pixels<kDot, T>(g, first, r.x, n, row, last, total);
          if (r.dx.data)
            rescale_pixels<false, T>(g, r.dx, r.dy, n, row, last, scale, scale, stream);
        }
        stream_fence();
      },
      [&](int64_t n, const double* sums, A*, A*) {
        for (int64_t c = 0; c < C; ++c) result[n * C + c] = kDot ? sums[c] : sums[c] / S;
      },
      [](int64_t, int64_t, int64_t, const A*, const A*) {});
}

template <bool kShift, class T>
void scale_as(const Scale& s, const ThreadPool& pool) {
  using A = Acc<T>;
  const Problem& p = s.problem;
  const int64_t C = p.channels, S = p.pixels;
  const A *gate = (const A*)s.gate, *shift = kShift ? (const A*)s.shift : gate;
  const bool stream = streams<T>(p, s.y, s.x);
  if (p.layout == Layout::kPlanes) {
    each_planes(p, 2 * sizeof(T), pool, [&](int64_t n, int64_t c, int64_t count) {
      const int64_t i = n * C + c;
      rescale_planes<kShift, T>(s.y, s.x, n, c, count, S, gate + i, shift + i, stream);
    });
    return;
  }
  const PixelRows g(p, s.x.row_stride == C && s.y.row_stride == C);
  walk_pixels<A>(
      p, g, sizeof(T), pool, [](int64_t, int64_t, int64_t, double*) {},
      [&](int64_t n, const double*, A* scale, A* added) {
        __builtin_memcpy(scale, gate + n * C, C * sizeof(A));
        __builtin_memcpy(added, shift + n * C, C * sizeof(A));
      },
      [&](int64_t n, int64_t first, int64_t end, const A* scale, const A* added) {
        rescale_pixels<kShift, T>(g, s.y, s.x, n, first, end, scale, added, stream);
      });
}

inline void reduce(const Reduce& r, const ThreadPool& pool) {
  visit(r.problem.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    if (r.dy.data) reduce_as<true, T>(r, pool);
    else reduce_as<false, T>(r, pool);
  });
}

inline void scale(const Scale& s, const ThreadPool& pool) {
  visit(s.problem.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    if (s.shift) scale_as<true, T>(s, pool);
    else scale_as<false, T>(s, pool);
  });
}
