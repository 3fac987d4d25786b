// The only loops over feature maps: reductions and rescaling of rows of consecutive elements.
// Included once per instruction set by kernels.h, inside its namespace.

// Elements that the lanes add up before the total gets them: so few that the error does not grow
// with the size of the map.
constexpr int64_t kBlock = 2048;

// Neumaier's sum, which keeps the rounding error of each addition. float64 maps need it: their
// total is no wider than their lanes.
struct Total {
  double sum = 0, error = 0;

  void add(double value) {
    const double next = sum + value;
    const bool larger = (sum < 0 ? -sum : sum) >= (value < 0 ? -value : value);
    error += larger ? (sum - next) + value : (value - next) + sum;
    sum = next;
  }
  // The error of an infinite sum is NaN.
  double value() const { return error == error ? sum + error : sum; }
};

// sum of p[i] (kDot = false, q unused) or of p[i] * q[i]
template <bool kDot, class T>
double reduce_row(const T* p, const T* q, int64_t n) {
  using V = Vec<T>;
  constexpr int64_t w = kLanes<T>;
  const auto term = [=](int64_t i) -> V {
    if constexpr (kDot) return load(p + i) * load(q + i);
    return load(p + i);
  };
  Total total;
  int64_t i = 0;
  while (i + w <= n) {
    const int64_t end = i + kBlock < n ? i + kBlock : n;
    V s0 = V{}, s1 = V{}, s2 = V{}, s3 = V{};  // four chains hide the latency of an addition
    for (; i + 4 * w <= end; i += 4 * w) {
      s0 += term(i);
      s1 += term(i + w);
      s2 += term(i + 2 * w);
      s3 += term(i + 3 * w);
    }
    for (; i + w <= end; i += w) s0 += term(i);
    total.add(sum((s0 + s1) + (s2 + s3)));
  }
  if (i < n) {
    V rest = load_first(p + i, n - i);
    if constexpr (kDot) rest *= load_first(q + i, n - i);
    total.add(sum(rest));
  }
  return total.value();
}

// Calls f(i, n) for consecutive pieces of [0, length): n = w for whole vectors, less at the ends.
// With kStream the whole vectors start where y is aligned.
template <bool kStream, class T, class F>
inline void each_vector(const T* y, int64_t length, F f) {
  constexpr int64_t w = kLanes<T>;
  int64_t i = 0;
  if constexpr (kStream) {
    const int64_t head = (w - (int64_t)((uintptr_t)y / sizeof(T)) % w) % w;
    i = head < length ? head : length;
    if (i > 0) f(0, i);
  }
  for (; i + w <= length; i += w) f(i, w);
  if (i < length) f(i, length - i);
}

// y[i] = scale * x[i] + shift; without kShift, scale * x[i]. x and y may be the same row.
template <bool kShift, bool kStream, class T>
void affine_row_as(T* y, const T* x, Acc<T> scale, Acc<T> shift, int64_t length) {
  using V = Vec<T>;
  const V a = broadcast<V>(scale), b = broadcast<V>(shift);
  const auto f = [=](V v) { return kShift ? a * v + b : a * v; };
  each_vector<kStream>(y, length, [=](int64_t i, int64_t n) {
    if (n == kLanes<T>) store<kStream>(y + i, f(load(x + i)));
    else store_first(y + i, f(load_first(x + i, n)), n);
  });
}

template <bool kShift, class T>
void affine_row(T* y, const T* x, Acc<T> scale, Acc<T> shift, int64_t length, bool stream) {
  if (stream) affine_row_as<kShift, true>(y, x, scale, shift, length);
  else affine_row_as<kShift, false>(y, x, scale, shift, length);
}

// ---- planes of less than kSmallPlane elements: many at once ----

// For rows this short the work around a row costs as much as the row. So rows are read and written
// in whole vectors that overhang into the next row, and the sums of kLanes rows meet in one vector.
constexpr int64_t kSmallPlane = 512;

// How many of `count` rows may be read in whole vectors, because enough rows follow them in memory.
inline int64_t overhanging_rows(int64_t length, int64_t stride, int64_t count, int64_t lanes) {
  const int64_t overhang = (lanes - length % lanes) % lanes;
  const int64_t rows = count - (overhang + stride - 1) / stride;
  return rows > 0 ? rows : 0;
}

// The sums of a row of p, or of p * q, lane by lane. last() loads what follows the whole vectors.
template <bool kDot, class T, class Last>
inline Vec<T> lane_sums(const T* p, const T* q, int64_t length, Last last) {
  using V = Vec<T>;
  constexpr int64_t w = kLanes<T>;
  const int64_t vectors = length / w, whole = vectors * w;
  V even = V{}, odd = V{};
#pragma GCC unroll 4
  for (int64_t i = 0; i < vectors; ++i) {
    V v = load(p + i * w);
    if constexpr (kDot) v *= load(q + i * w);
    if (i & 1) odd += v;
    else even += v;
  }
  if (whole < length) {
    V v = last(p + whole);
    if constexpr (kDot) v *= last(q + whole);
    odd += v;
  }
  return even + odd;
}

// out[c] = sum over the row c of p, or of p * q, for `count` rows
template <bool kDot, class T>
void reduce_small_planes(Acc<T>* out, const T* p, int64_t p_stride, const T* q, int64_t q_stride,
                         int64_t length, int64_t count) {
  using V = Vec<T>;
  constexpr int64_t w = kLanes<T>;
  const int64_t safe = kDot && q_stride < p_stride ? overhanging_rows(length, q_stride, count, w)
                                                   : overhanging_rows(length, p_stride, count, w);
  const int64_t rest = length % w;
  const Lanes<V> kept = first_lanes<V>(rest);
  const auto overhanging = [=](const T* from) { return kept ? load(from) : V{}; };
  const auto exact = [=](const T* from) { return load_first(from, rest); };
  V row[w];
  int64_t c = 0;
  for (; c + w <= safe; c += w) {
    for (int64_t j = 0; j < w; ++j, p += p_stride, q += q_stride)
      row[j] = lane_sums<kDot>(p, q, length, overhanging);
    store<false>(out + c, sums(row));
  }
  while (c < count) {
    const int64_t rows = count - c < w ? count - c : w;
    for (int64_t j = 0; j < w; ++j) {
      row[j] = V{};
      if (j >= rows) continue;
      row[j] = lane_sums<kDot>(p, q, length, exact);
      p += p_stride, q += q_stride;
    }
    if (rows == w) store<false>(out + c, sums(row));
    else store_first(out + c, sums(row), rows);
    c += rows;
  }
}

// y[c][i] = scale[c] * x[c][i] + shift[c] for `count` rows; y is dense, and is not x
template <bool kShift, class T>
void affine_small_planes(T* y, const T* x, int64_t x_stride, const Acc<T>* scale,
                         const Acc<T>* shift, int64_t length, int64_t count) {
  using V = Vec<T>;
  constexpr int64_t w = kLanes<T>;
  const int64_t safe = overhanging_rows(length, length, count, w);  // x_stride >= length
  for (int64_t c = 0; c < safe; ++c) {
    const V a = broadcast<V>(scale[c]), b = broadcast<V>(kShift ? shift[c] : 0);
    for (int64_t i = 0; i < length; i += w) {
      const V v = load(x + c * x_stride + i);
      store<false>(y + c * length + i, kShift ? a * v + b : a * v);
    }
  }
  for (int64_t c = safe; c < count; ++c)
    affine_row_as<kShift, false>(y + c * length, x + c * x_stride, scale[c], kShift ? shift[c] : 0,
                                 length);
}

template <class T>
void stream_copy(T* y, const T* x, int64_t length) {
  each_vector<true>(y, length, [=](int64_t i, int64_t n) {
    if (n == kLanes<T>) store_bits<true>(y + i, load_bits(x + i));
    else __builtin_memcpy(y + i, x + i, n * sizeof(T));
  });
}

// ---- pixels ----

// Whether rows are so far apart that they may be read side by side. Two streams in one page stop the
// hardware's prefetching: with rows of 1 KB, passes took 1.6 to 2.4 times as long.
template <class T>
bool in_other_pages(int64_t row_stride) {
  return row_stride * (int64_t)sizeof(T) >= 4096;
}

// total[i] += sum over rows of p[row][i], or of p[row][i] * q[row][i]; lane is scratch, of whole
// vectors.
template <bool kDot, class T>
void reduce_rows(double* total, Acc<T>* lane, const T* p, int64_t p_stride, const T* q,
                 int64_t q_stride, int64_t rows, int64_t length) {
  using V = Vec<T>;
  constexpr int64_t w = kLanes<T>;
  constexpr int64_t kRows = 64;  // added in float before the double total gets them
  for (int64_t block = 0; block < rows; block += kRows) {
    const int64_t end = block + kRows < rows ? block + kRows : rows;
    for (int64_t i = 0; i < length; i += w) store<false>(lane + i, V{});
    for (int64_t row = block; row < end;) {
      // Four rows at a time take a quarter of the additions into memory. Two maps would be eight
      // streams, more than a processor prefetches: beyond the caches that took 1.2 times as long.
      const int64_t step = !kDot && in_other_pages<T>(p_stride) && row + 4 <= end ? 4 : 1;
      const T *a = p + row * p_stride, *b = kDot ? q + row * q_stride : nullptr;
      int64_t i = 0;
      const auto term = [&](int64_t j) -> V {
        if constexpr (kDot) return load(a + j * p_stride + i) * load(b + j * q_stride + i);
        return load(a + j * p_stride + i);
      };
      const auto rest = [&](int64_t j, int64_t n) -> V {
        const V v = load_first(a + j * p_stride + i, n);
        if constexpr (kDot) return v * load_first(b + j * q_stride + i, n);
        return v;
      };
      if (step == 4)
        for (; i + w <= length; i += w)
          store<false>(lane + i, load(lane + i) + ((term(0) + term(1)) + (term(2) + term(3))));
      else
        for (; i + w <= length; i += w) store<false>(lane + i, load(lane + i) + term(0));
      if (const int64_t n = length - i; n > 0) {
        // Store whole vectors: a load after a masked store waits until that reaches the cache.
        V v = load(lane + i) + rest(0, n);
        for (int64_t j = 1; j < step; ++j) v += rest(j, n);
        store<false>(lane + i, v);
      }
      row += step;
    }
    for (int64_t i = 0; i < length; ++i) total[i] += lane[i];
  }
}

// y[i] = scale[i] * x[i] + shift[i]; without kShift, scale[i] * x[i]
template <bool kShift, bool kStream, class T>
void affine_vector_as(T* y, const T* x, const Acc<T>* scale, const Acc<T>* shift, int64_t length) {
  using V = Vec<T>;
  each_vector<kStream>(y, length, [=](int64_t i, int64_t n) {
    if (n == kLanes<T>) {
      V v = load(scale + i) * load(x + i);
      if constexpr (kShift) v += load(shift + i);
      store<kStream>(y + i, v);
    } else {
      V v = load_first(scale + i, n) * load_first(x + i, n);
      if constexpr (kShift) v += load_first(shift + i, n);
      store_first(y + i, v, n);
    }
  });
}

template <bool kShift, class T>
void affine_vector(T* y, const T* x, const Acc<T>* scale, const Acc<T>* shift, int64_t length,
                   bool stream) {
  if (stream) affine_vector_as<kShift, true>(y, x, scale, shift, length);
  else affine_vector_as<kShift, false>(y, x, scale, shift, length);
}
