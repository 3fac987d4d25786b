// The walk over planes (NCHW). A thread takes its channels tile by tile: it reduces the planes of a
// tile and of the r channels after it, filters them, and rescales the tile, whose planes are still
// in the cache. Only the 2r planes around a thread's share are reduced twice.
// Included once per instruction set by kernels.h, inside its namespace.

// reduce(n, c, count, out) reduces `count` planes from channel c on; out has room for whole vectors,
// and so has all that finish() gets. finish(n, c, count, values, filtered) gets the values of a tile
// and their convolution, and rescales the planes. With in_place that overwrites what reduce() reads.
// `most` planes are a tile.
template <class A, class Reduce, class Finish>
void walk_planes(const Problem& p, const Taps<A>& taps, int64_t most, bool in_place,
                 const ThreadPool& pool, const Reduce& reduce, const Finish& finish) {
  const int64_t C = p.channels, r = taps.r, planes = p.samples * C, tile = min_of(most, C);
  const int64_t work = max_of(planes * p.pixels / kGrain, 1);
  const int64_t shares = min_of(min_of(pool.threads, work), planes);

  // Calls f(n, samples, first, last) for each piece of a thread's share: channels [first, last) of
  // one sample, or of up to `group` whole samples.
  const auto each_share = [&](int64_t group, const auto& f) {
    parallel(pool, shares, 1, [&](int64_t begin, int64_t end) {
      // Share by share: a second loop may deal them differently, and their borders must not move.
      for (int64_t share = begin; share < end; ++share)
        for (int64_t i = planes * share / shares, to = planes * (share + 1) / shares; i < to;) {
          const int64_t n = i / C, first = i - n * C;
          const int64_t whole = first ? 0 : (to - i) / C, samples = max_of(min_of(whole, group), 1);
          const int64_t last = min_of(to - n * C, C);
          f(n, samples, first, last);
          i = (n + samples - 1) * C + last;
        }
    });
  };

  // A share needs the values of r channels on both sides. Reducing those planes again is expensive
  // where shares are small, and wrong in place: another thread may have overwritten them. In these
  // cases the threads first reduce all planes, or those around the borders, and meet.
  const bool shared = shares > 1 && r > 0;
  const bool all_first = shared && (planes < 16 * r * shares || (in_place && taps.circular));
  const bool borders_first = shared && in_place && !all_first;
  Array<A> known(all_first || borders_first ? planes : 0);
  const auto remember = [&](int64_t n, int64_t first, int64_t last) {
    if (first >= last) return;
    Array<A> values(whole_vectors<A>(last - first));  // what follows in `known` is another thread's
    reduce(n, first, last - first, values);
    __builtin_memcpy(known + (n * C + first), values, (last - first) * sizeof(A));
  };
  if (all_first)
    each_share(1,
               [&](int64_t n, int64_t, int64_t first, int64_t last) { remember(n, first, last); });
  if (borders_first)
    each_share(1, [&](int64_t n, int64_t, int64_t first, int64_t last) {
      remember(n, max_of(first - r, 0), first);
      remember(n, last, min_of(last + r, C));
    });

  // Small samples go through the cache together: each switch from reading to writing costs time.
  each_share(most / tile, [&](int64_t n, int64_t samples, int64_t first, int64_t last) {
    const int64_t width = last - first + 2 * r;
    Array<A> padded(samples * width + kLanes<A>), filtered(whole_vectors<A>(tile));
    // The place of the value at position u of sample n + i, first - r <= u < last + r.
    const auto row_at = [&](int64_t i, int64_t u) { return padded + (i * width + u - first + r); };
    const auto fill = [&](int64_t i, int64_t u, int64_t end) {
      while (u < end) {
        A* out = row_at(i, u);
        const int64_t from = taps.channel(u);
        const bool own = from >= first && from < last;
        int64_t run = 1;
        if (from < 0) *out = 0;
        else if (u >= last && own) *out = *row_at(i, from);  // wrapped around
        else if (all_first || (borders_first && !own)) *out = known[(n + i) * C + from];
        else reduce(n + i, from, run = u == from ? min_of(end, own ? last : C) - u : 1, out);
        u += run;
      }
    };
    int64_t filled = first - r;
    for (int64_t c = first; c < last; c += tile) {
      const int64_t count = min_of(tile, last - c);
      // A tile may be less than a vector, and scalar stores would hold up the vector loads after them.
      const int64_t vectors = taps.per_channel ? count : whole_vectors<A>(count);
      for (int64_t i = 0; i < samples; ++i) fill(i, filled, c + count + r);
      filled = c + count + r;
      for (int64_t i = 0; i < samples; ++i) {
        taps.filter(filtered, row_at(i, c - r), c, vectors);
        finish(n + i, c, count, row_at(i, c), filtered);
      }
    }
    stream_fence();
  });
}

// out[i] = sum of a plane of a, or of a * b
template <bool kDot, class T>
void reduce_planes(Acc<T>* out, const Map& a, const Map& b, int64_t n, int64_t c, int64_t count,
                   int64_t length, bool room = false) {
  if (length > 0 && length < kSmallPlane && a.row_stride >= length &&
      (!kDot || b.row_stride >= length)) {
    reduce_small_planes<kDot>(out, row_of<const T>(a, n, c), a.row_stride, row_of<const T>(b, n, c),
                              b.row_stride, length, count, room);
    return;
  }
  for (int64_t i = 0; i < count; ++i)
    out[i] =
        reduce_row<kDot>(row_of<T>(a, n, c + i), kDot ? row_of<T>(b, n, c + i) : nullptr, length);
}

// y = scale * x + shift, plane by plane
template <bool kShift, class T>
void rescale_planes(const Map& y, const Map& x, int64_t n, int64_t c, int64_t count, int64_t length,
                    const Acc<T>* scale, const Acc<T>* shift, bool stream) {
  if (length >= kLanes<T> && length < kSmallPlane && x.row_stride == length &&
      y.row_stride == length) {
    T *to = row_of<T>(y, n, c), *from = row_of<T>(x, n, c);
    if (stream) affine_dense_planes<kShift, true>(to, from, scale, shift, length, count);
    else affine_dense_planes<kShift, false>(to, from, scale, shift, length, count);
    return;
  }
  if (length > 0 && length < kSmallPlane && x.row_stride >= length && y.row_stride == length) {
    constexpr int64_t kStage = 8192 / sizeof(T);  // fits into the first-level cache
    alignas(64) T stage[kStage + 64];
    const bool direct = !stream && y.data != x.data;
    const int64_t step = direct ? count : max_of(1, kStage / length);
    for (int64_t i = 0; i < count; i += step) {
      const int64_t rows = min_of(step, count - i);
      T* to = row_of<T>(y, n, c + i);
      affine_small_planes<kShift>(direct ? to : stage, row_of<T>(x, n, c + i), x.row_stride,
                                  scale + i, shift + i, length, rows);
      if (stream) stream_copy(to, stage, rows * length);
      else if (!direct) __builtin_memcpy(to, stage, rows * length * sizeof(T));
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i)
    affine_row<kShift>(row_of<T>(y, n, c + i), row_of<T>(x, n, c + i), scale[i], shift[i], length,
                       stream);
}
