// Fused ECA on the CPU: each byte of x (and dy) comes from memory once, each byte of y (dx) goes
// there once; the second reading finds the data in a cache.
//
// Planes (NCHW). A thread walks over its channels with a rolling halo: it reduces the planes of a
// tile and of the r channels after it, filters, and rescales the tile, whose planes were read just
// before. Only the 2r planes around a thread's share are reduced twice.
//
// Pixels (NHWC). A gate needs every pixel of the sample: a thread reduces a slab of pixels, and
// rescales it in reverse order, so that what was read last is still in the cache.
//
// Forward reduces x to its mean, filters it with the taps and multiplies x by the sigmoid. Backward
// reduces dy * x to dz, filters it with the transposed taps, and adds that to gate * dy. So both are
// the same two walks, with other functions at their ends.
//
// Included once per instruction set, after simd.h and rows.h, inside its namespace.

template <class A>
class Array {
 public:
  explicit Array(int64_t n) : data_(new A[n > 0 ? n : 1]()) {}
  ~Array() { delete[] data_; }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  operator A*() const { return data_; }

 private:
  A* data_;
};

// Calls f with a null pointer of the type that stands for the dtype.
template <class F>
auto visit(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat64: return f((double*)nullptr);
    case Dtype::kFloat16: return f((f16*)nullptr);
    case Dtype::kBFloat16: return f((bf16*)nullptr);
    default: return f((float*)nullptr);
  }
}

template <class T>
struct Pointee;
template <class T>
struct Pointee<T*> {
  using type = T;
};

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
T* row_of(const Map& map, int64_t sample, int64_t row) {
  return (T*)map.data + sample * map.sample_stride + row * map.row_stride;
}

// pool.run for a body that captures.
template <class F>
void parallel(const ThreadPool& pool, int64_t count, int64_t grain, const F& body) {
  pool.run(
      0, count, grain, [](int64_t begin, int64_t end, void* f) { (*(const F*)f)(begin, end); },
      (void*)&body);
}

// Fewer elements than this are not worth a second thread (PyTorch's own limit).
constexpr int64_t kGrain = 32768;

// ---- taps: the band matrix over channels, with all rules for its boundary ----

template <class A>
struct Taps {
  const int64_t k, r, channels;
  const bool per_channel, circular;
  Array<A> weight;  // (1 or channels, k)

  Taps(const Problem& p, const void* source, bool transposed)
      : k(p.kernel_size), r(k / 2), channels(p.channels),
        // An infinite tap must not meet the padding's zeros, which the transpose does not have.
        per_channel(p.taps_per_channel || (transposed && !p.circular && !finite(p, source))),
        circular(p.circular), weight((per_channel ? channels : 1) * k) {
    visit(p.taps_dtype, [&](auto* type) {
      const auto* w = (decltype(type))source;
      for (int64_t c = 0; c < (per_channel ? channels : 1); ++c)
        for (int64_t j = 0; j < k; ++j) {
          const int64_t from = per_channel && transposed ? channel(c + j - r) : c;
          const int64_t row = p.taps_per_channel ? from : 0, tap = transposed ? k - 1 - j : j;
          weight[c * k + j] = from < 0 ? A(0) : A(to_acc(w[row * k + tap]));
        }
    });
  }

  static bool finite(const Problem& p, const void* source) {
    bool all = true;
    visit(p.taps_dtype, [&](auto* type) {
      const auto* w = (decltype(type))source;
      for (int64_t j = 0; j < p.kernel_size; ++j) all = all && to_acc(w[j]) - to_acc(w[j]) == 0;
    });
    return all;
  }

  // The channel at position u, which may lie up to r outside; -1 where the padding is zero.
  int64_t channel(int64_t u) const {
    if (u >= 0 && u < channels) return u;
    return !circular ? -1 : u < 0 ? u + channels : u - channels;
  }

  // out[i] = sum_j weight[begin + i][j] * in[i + j], where in[0] is channel begin - r
  void filter(A* out, const A* in, int64_t begin, int64_t count) const {
    constexpr int64_t w = kLanes<A>;
    int64_t i = 0;
    if (!per_channel)
      for (; i + w <= count; i += w) {
        Vec<A> z = Vec<A>{};
        for (int64_t j = 0; j < k; ++j) z += weight[j] * load(in + i + j);
        store<false>(out + i, z);
      }
    for (; i < count; ++i) {
      const A* own = weight + (per_channel ? (begin + i) * k : 0);
      A z = 0;
      for (int64_t j = 0; j < k; ++j) z += own[j] * in[i + j];
      out[i] = z;
    }
  }
};

// The channels of a sample as filter() wants them: out[u + r] for u from -r to channels + r - 1.
template <class A>
void pad(A* out, const A* in, const Taps<A>& taps) {
  for (int64_t u = -taps.r; u < taps.channels + taps.r; ++u) {
    const int64_t from = taps.channel(u);
    out[u + taps.r] = from < 0 ? A(0) : in[from];
  }
}

template <class A>
void filter_sample(const Taps<A>& taps, A* out, const A* in) {
  Array<A> row(taps.channels + 2 * taps.r);
  pad<A>(row, in, taps);
  taps.filter(out, row, 0, taps.channels);
}

template <class A>
void sigmoid_row(A* out, const A* in, int64_t n) {
  constexpr int64_t w = kLanes<A>;
  int64_t i = 0;
  for (; i + w <= n; i += w) store<false>(out + i, sigmoid(load(in + i)));
  if (i < n) store_first(out + i, sigmoid(load_first(in + i, n - i)), n - i);
}

// dweight[j] = sum over samples n and channels c of dz[n][c] * mean[n][c + j - r], in this order
// whatever the number of threads. Padding takes part, so that NaN spreads as in a plain convolution.
template <class A>
void taps_gradient(const Problem& p, const Taps<A>& taps, const A* dz, const A* mean, void* dweight,
                   const ThreadPool& pool) {
  const int64_t N = p.samples, C = p.channels, k = taps.k, length = C + 2 * taps.r;
  const int64_t rows = p.taps_per_channel ? C : 1;
  Array<A> padded(N * length);
  Array<double> total(rows * k), partial(p.taps_per_channel ? 0 : N * k);
  parallel(pool, N, max_of(kGrain / (C * k), 1), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      A* row = padded + n * length;
      pad(row, mean + n * C, taps);
      for (int64_t j = 0; j < k && !p.taps_per_channel; ++j)
        partial[n * k + j] = reduce_row<true>(dz + n * C, row + j, C);
    }
  });
  if (p.taps_per_channel)
    parallel(pool, C, max_of(kGrain / (N * k), 1), [&](int64_t begin, int64_t end) {
      for (int64_t n = 0; n < N; ++n)
        for (int64_t c = begin; c < end; ++c)
          for (int64_t j = 0; j < k; ++j)
            total[c * k + j] += (double)dz[n * C + c] * padded[n * length + c + j];
    });
  else
    for (int64_t n = 0; n < N; ++n)
      for (int64_t j = 0; j < k; ++j) total[j] += partial[n * k + j];
  visit(p.taps_dtype, [&](auto* type) {
    auto* out = (decltype(type))dweight;
    for (int64_t i = 0; i < rows * k; ++i) out[i] = from_double(total[i], type);
  });
}

// ---- the walk over planes ----

// reduce(n, c, count, out) reduces `count` planes from c on. finish(n, c, count, values, filtered)
// gets these values for a tile, together with their convolution, and rescales the planes, which
// overwrites what reduce() reads if in_place.
template <class A, class Reduce, class Finish>
void walk_planes(const Problem& p, const Taps<A>& taps, int64_t element_size, bool in_place,
                 const ThreadPool& pool, const Reduce& reduce, const Finish& finish) {
  const int64_t C = p.channels, r = taps.r, planes = p.samples * C;
  const int64_t plane_bytes = max_of(p.pixels * element_size, 1);
  // A quarter of a core's cache: the tile's planes are still there when they are rescaled. Measured
  // with 1 MB: a half or an eighth costs up to 10 %.
  const int64_t tile = min_of(max_of(core_cache_bytes() / 4 / plane_bytes, 1), C);
  const int64_t work = max_of(planes * p.pixels / kGrain, 1);
  const int64_t shares = min_of(min_of(pool.threads, work), planes);

  // Calls f(n, first, last) for the channels of each sample that belong to a thread's share.
  const auto each_share = [&](const auto& f) {
    parallel(pool, shares, 1, [&](int64_t begin, int64_t end) {
      // Share by share, because two such loops may give a thread different numbers of them.
      for (int64_t share = begin; share < end; ++share)
        for (int64_t i = planes * share / shares, to = planes * (share + 1) / shares; i < to;) {
          const int64_t n = i / C, last = min_of(to - n * C, C);
          f(n, i - n * C, last);
          i = n * C + last;
        }
    });
  };

  // A share needs the values of r channels on both sides. Reducing these planes again is cheap, but
  // not where shares are small, nor possible where another thread may have overwritten them: then
  // the threads first reduce all planes, or those around the borders, and meet.
  const bool shared = shares > 1 && r > 0;
  const bool all_first = shared && (planes < 16 * r * shares || (in_place && taps.circular));
  const bool borders_first = shared && in_place && !all_first;
  Array<A> known(all_first || borders_first ? planes : 0);
  if (all_first)
    each_share([&](int64_t n, int64_t first, int64_t last) {
      reduce(n, first, last - first, known + (n * C + first));
    });
  if (borders_first)
    each_share([&](int64_t n, int64_t first, int64_t last) {
      const int64_t before = max_of(first - r, 0), after = min_of(last + r, C);
      if (before < first) reduce(n, before, first - before, known + (n * C + before));
      if (last < after) reduce(n, last, after - last, known + (n * C + last));
    });

  each_share([&](int64_t n, int64_t first, int64_t last) {
    Array<A> padded(last - first + 2 * r), filtered(tile);
    A* row = padded;  // row[u - first + r] is the value at position u
    const auto fill = [&](int64_t u, int64_t end) {
      while (u < end) {
        A* out = row + (u - first + r);
        const int64_t from = taps.channel(u);
        const bool own = from >= first && from < last;
        int64_t run = 1;
        if (from < 0) *out = 0;
        else if (u >= last && own) *out = row[from - first + r];  // wrapped around
        else if (all_first || (borders_first && !own)) *out = known[n * C + from];
        else reduce(n, from, run = u == from ? min_of(end, own ? last : C) - u : 1, out);
        u += run;
      }
    };
    int64_t filled = first - r;
    for (int64_t c = first; c < last; c += tile) {
      const int64_t count = min_of(tile, last - c);
      fill(filled, c + count + r);
      filled = c + count + r;
      taps.filter(filtered, row + (c - first), c, count);
      finish(n, c, count, row + (c - first + r), filtered);
    }
    stream_fence();
  });
}

// out[i] = sum of a plane of a, or of a * b
template <bool kDot, class T>
void reduce_planes(Acc<T>* out, const Map& a, const Map& b, int64_t n, int64_t c, int64_t count,
                   int64_t length) {
  if (length > 0 && length < kSmallPlane && a.row_stride >= length &&
      (!kDot || b.row_stride >= length)) {
    reduce_small_planes<kDot>(out, row_of<T>(a, n, c), a.row_stride,
                              kDot ? row_of<T>(b, n, c) : (const T*)nullptr, b.row_stride, length,
                              count);
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
  if (length > 0 && length < kSmallPlane && x.row_stride >= length && y.row_stride == length) {
    constexpr int64_t kStage = 8192 / sizeof(T);  // in the first-level cache
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

// ---- the walk over pixels ----

// Pixels as rows that are long enough for vectors: `fold` pixels side by side, where they lie so.
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

// reduce(n, row, end, total) adds the rows into total; rescale(n, row, end, scale, shift) writes
// them; both include the rest if end is the last row. settle(n, sums, filter, scale, shift) turns
// the sums of the channels into what rescale needs for one pixel.
template <class A, class Reduce, class Settle, class Rescale>
void walk_pixels(const Problem& p, const PixelRows& g, const ThreadPool& pool, const Reduce& reduce,
                 const Settle& settle, const Rescale& rescale) {
  const int64_t N = p.samples, C = p.channels, L = g.length;
  const int64_t work = max_of(p.pixels * C, 1);
  // With fewer samples than threads, a sample is split into slabs and the threads meet in between.
  const int64_t slabs =
      N >= pool.threads
          ? 1
          : max_of(1, min_of(min_of((pool.threads + N - 1) / max_of(N, 1), work / kGrain), g.rows));
  const auto start = [&](int64_t slab) { return g.rows * slab / slabs; };
  const auto sums = [&](int64_t n, int64_t slab, double* total) {
    for (int64_t i = 0; i < L; ++i) total[i] = 0;
    reduce(n, start(slab), start(slab + 1), total);
  };
  const auto gates = [&](int64_t n, double* total, A* scale, A* shift) {
    for (int64_t i = C; i < slabs * L; ++i) total[i % C] += total[i];  // L is a multiple of C
    settle(n, total, scale, shift);
    for (int64_t i = C; i < L; ++i) scale[i] = scale[i - C], shift[i] = shift[i - C];
  };
  const auto apply = [&](int64_t n, int64_t slab, const A* scale, const A* shift) {
    rescale(n, start(slab), start(slab + 1), scale, shift);
    stream_fence();
  };
  if (slabs == 1) {
    parallel(pool, N, max_of(kGrain / work, 1), [&](int64_t begin, int64_t end) {
      Array<double> total(L);
      Array<A> scale(L), shift(L);
      for (int64_t n = begin; n < end; ++n) {
        sums(n, 0, total);
        gates(n, total, scale, shift);
        apply(n, 0, scale, shift);
      }
    });
    return;
  }
  Array<double> total(N * slabs * L);
  Array<A> scale(N * L), shift(N * L);
  parallel(pool, N * slabs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums(i / slabs, i % slabs, total + i * L);
  });
  parallel(pool, N, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      gates(n, total + n * slabs * L, scale + n * L, shift + n * L);
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
  // Blocks in reverse order, but ascending within: hardware prefetches upwards. Reversed row by row,
  // bfloat16 took 1.4 times as long.
  const int64_t row_bytes = g.length * (int64_t)sizeof(T);
  const int64_t block = max_of(1, core_cache_bytes() / 4 / row_bytes);
  if (end == g.rows && g.rest) row(g.rows, g.rest);
  for (int64_t last = end; last > first; last -= block)
    for (int64_t i = max_of(first, last - block); i < last; ++i) row(i, g.length);
}

template <bool kDot, class T>
void reduce_pixels(const PixelRows& g, const Map& a, const Map& b, int64_t n, int64_t first,
                   int64_t end, double* total) {
  Array<Acc<T>> lane(g.length);
  const auto rows = [&](int64_t i, int64_t count, int64_t length) {
    reduce_rows<kDot>(total, (Acc<T>*)lane, row_of<T>(a, n, i * g.fold), a.row_stride * g.fold,
                      kDot ? row_of<T>(b, n, i * g.fold) : (T*)nullptr, b.row_stride * g.fold,
                      count, length);
  };
  rows(first, end - first, g.length);
  if (end == g.rows && g.rest) rows(g.rows, 1, g.rest);
}

// ---- the two operations ----

// Streaming stores pay only where input and output do not fit into the caches together, and never
// where the lines that are written are in a cache already.
template <class T>
bool streams(const Problem& p, const Map& out, const Map& in) {
  const int64_t bytes = p.samples * p.channels * p.pixels * (int64_t)sizeof(T);
  return out.data != in.data && 2 * bytes > last_level_cache_bytes();
}

template <class T>
void forward_as(const Forward& f, const ThreadPool& pool) {
  using A = Acc<T>;
  const Problem& p = f.problem;
  const int64_t C = p.channels, S = p.pixels;
  const Taps<A> taps(p, f.weight, false);
  A *mean = (A*)f.mean, *gate = (A*)f.gate;
  const bool stream = streams<T>(p, f.y, f.x);
  if (p.layout == Layout::kPlanes) {
    walk_planes<A>(
        p, taps, sizeof(T), f.x.data == f.y.data, pool,
        [&](int64_t n, int64_t c, int64_t count, A* out) {
          reduce_planes<false, T>(out, f.x, f.x, n, c, count, S);
          for (int64_t i = 0; i < count; ++i) out[i] /= S;
        },
        [&](int64_t n, int64_t c, int64_t count, const A* values, const A* filtered) {
          A* own = gate + n * C + c;
          __builtin_memcpy(mean + n * C + c, values, count * sizeof(A));
          sigmoid_row(own, filtered, count);
          rescale_planes<false, T>(f.y, f.x, n, c, count, S, own, own, stream);
        });
    return;
  }
  const PixelRows g(p, f.x.row_stride == C && f.y.row_stride == C);
  walk_pixels<A>(
      p, g, pool,
      [&](int64_t n, int64_t first, int64_t end, double* total) {
        reduce_pixels<false, T>(g, f.x, f.x, n, first, end, total);
      },
      [&](int64_t n, const double* sums, A* scale, A*) {
        for (int64_t c = 0; c < C; ++c) mean[n * C + c] = sums[c] / S;
        filter_sample(taps, scale, mean + n * C);
        sigmoid_row(scale, scale, C);
        __builtin_memcpy(gate + n * C, scale, C * sizeof(A));
      },
      [&](int64_t n, int64_t first, int64_t end, const A* scale, const A*) {
        rescale_pixels<false, T>(g, f.y, f.x, n, first, end, scale, scale, stream);
      });
}

template <class T>
void backward_as(const Backward& b, const ThreadPool& pool) {
  using A = Acc<T>;
  const Problem& p = b.problem;
  const int64_t C = p.channels, S = p.pixels;
  const Taps<A> taps(p, b.weight, true);
  const A *mean = (const A*)b.mean, *gate = (const A*)b.gate;
  Array<A> dz(p.samples * C);
  const bool stream = b.dx.data && streams<T>(p, b.dx, b.dy);
  if (p.layout == Layout::kPlanes) {
    walk_planes<A>(
        p, taps, 2 * sizeof(T), false, pool,
        [&](int64_t n, int64_t c, int64_t count, A* out) {
          reduce_planes<true, T>(out, b.dy, b.x, n, c, count, S);
          const A* a = gate + n * C + c;
          for (int64_t i = 0; i < count; ++i) out[i] *= a[i] * (1 - a[i]);
        },
        [&](int64_t n, int64_t c, int64_t count, const A* values, A* filtered) {
          __builtin_memcpy(dz + (n * C + c), values, count * sizeof(A));
          for (int64_t i = 0; i < count; ++i) filtered[i] /= S;
          if (b.dx.data)
            rescale_planes<true, T>(b.dx, b.dy, n, c, count, S, gate + n * C + c, filtered, stream);
        });
  } else {
    const bool dense = b.dy.row_stride == C && b.x.row_stride == C;
    const PixelRows g(p, dense && (!b.dx.data || b.dx.row_stride == C));
    walk_pixels<A>(
        p, g, pool,
        [&](int64_t n, int64_t first, int64_t end, double* total) {
          reduce_pixels<true, T>(g, b.dy, b.x, n, first, end, total);
        },
        [&](int64_t n, const double* sums, A* scale, A* shift) {
          A* own = dz + n * C;
          for (int64_t c = 0; c < C; ++c) {
            scale[c] = gate[n * C + c];
            own[c] = sums[c] * scale[c] * (1 - scale[c]);
          }
          filter_sample(taps, shift, own);
          for (int64_t c = 0; c < C; ++c) shift[c] /= S;
        },
        [&](int64_t n, int64_t first, int64_t end, const A* scale, const A* shift) {
          if (b.dx.data)
            rescale_pixels<true, T>(g, b.dx, b.dy, n, first, end, scale, shift, stream);
        });
  }
  if (b.dweight) taps_gradient<A>(p, taps, dz, mean, b.dweight, pool);
}

inline void forward(const Forward& f, const ThreadPool& pool) {
  visit(f.problem.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    forward_as<T>(f, pool);
  });
}

inline void backward(const Backward& b, const ThreadPool& pool) {
  visit(b.problem.dtype, [&](auto* type) {
    using T = typename Pointee<decltype(type)>::type;
    backward_as<T>(b, pool);
  });
}
