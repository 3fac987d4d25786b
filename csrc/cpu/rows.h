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

// For rows this short the work around a row costs as much as the row. So they are read and written in
// whole vectors, and the sums of kLanes rows meet in one vector.
constexpr int64_t kSmallPlane = 512;

// How many of `count` rows may be read in whole vectors that overhang into the next row, because
// enough rows follow them in memory.
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
  const int64_t whole = length / w * w, pairs = whole / (2 * w);
  const auto term = [=](int64_t i) -> V {
    if constexpr (kDot) return load_anywhere(p + i) * load_anywhere(q + i);
    return load_anywhere(p + i);
  };
  V even = V{}, odd = V{};
  int64_t i = 0;
  for (int64_t pair = 0; pair < pairs; ++pair, i += 2 * w) {
    even += term(i);
    odd += term(i + w);
  }
  if (i < whole) even += term(i);
  if (whole < length) {
    V v = last(p + whole);
    if constexpr (kDot) v *= last(q + whole);
    odd += v;
  }
  return even + odd;
}

// out[c] = sum over the row c of p, or of p * q, for `count` rows. With `room`, out has room for whole
// vectors and gets them: a load after a masked store waits until that reaches the cache.
template <bool kDot, class T>
void reduce_small_planes(Acc<T>* out, const T* p, int64_t p_stride, const T* q, int64_t q_stride,
                         int64_t length, int64_t count, bool room) {
  using V = Vec<T>;
  constexpr int64_t w = kLanes<T>;
  const int64_t rest = length % w;
  // The last vector of a row ends with the row, and the lanes that were added before are left out. A
  // row shorter than a vector has no such vector: its only one overhangs into the next row.
  const int64_t back = length < w ? 0 : w - rest;
  const Lanes<V> kept = length < w ? first_lanes<V>(rest) : ~first_lanes<V>(back);
  const int64_t stride = kDot && q_stride < p_stride ? q_stride : p_stride;
  const int64_t safe = length < w ? overhanging_rows(length, stride, count, w) : count;
  const auto whole = [=](const T* from) { return kept ? load_anywhere(from - back) : V{}; };
  const auto exact = [=](const T* from) { return load_first(from, rest); };
  V row[w];
  for (int64_t c = 0; c < count; c += w) {
    const int64_t rows = count - c < w ? count - c : w;
    const auto add_up = [&](const auto& last) {
      for (int64_t j = 0; j < rows; ++j, p += p_stride, q += q_stride)
        row[j] = lane_sums<kDot>(p, q, length, last);
    };
    if (c + rows <= safe) add_up(whole);
    else add_up(exact);
    for (int64_t j = rows; j < w; ++j) row[j] = V{};
    if (rows == w || room) store<false>(out + c, sums(row));
    else store_first(out + c, sums(row), rows);
  }
}

// y[c][i] = scale[c] * x[c][i] + shift[c] for `count` rows of a vector or more that lie end to end. The
// vectors begin where y is aligned, whatever row that is: one with the end of a row and the start of
// the next gets the factors of both. x and y may be the same rows.
template <bool kShift, bool kStream, class T>
void affine_dense_planes(T* y, const T* x, const Acc<T>* scale, const Acc<T>* shift, int64_t length,
                         int64_t count) {
  using V = Vec<T>;
  constexpr int64_t w = kLanes<T>;
  V a = broadcast<V>(scale[0]), b = broadcast<V>(kShift ? shift[0] : 0);
  const auto whole = [&](int64_t i) {
    const V v = load(x + i);
    store<kStream>(y + i, kShift ? a * v + b : a * v);
  };
  const auto part = [&](int64_t i, int64_t n) {
    const V v = load_first(x + i, n);
    store_first(y + i, kShift ? a * v + b : a * v, n);
  };
  int64_t i = (w - (int64_t)((uintptr_t)y / sizeof(T)) % w) % w;
  if (i > 0) part(0, i);
  for (int64_t c = 1, end = length;; ++c, end += length) {
    for (; i + w <= end; i += w) whole(i);
    if (c == count) {
      if (i < end) part(i, end - i);
      return;
    }
    const V next_a = broadcast<V>(scale[c]), next_b = broadcast<V>(kShift ? shift[c] : 0);
    if (i < end) {
      const Lanes<V> own = first_lanes<V>(end - i);
      a = own ? a : next_a, b = own ? b : next_b;
      whole(i);
      i += w;
    }
    a = next_a, b = next_b;
  }
}

// The same for rows shorter than a vector, or with gaps in x; y is dense, and is not x.
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
