// The taps as a band matrix over channels, with all rules for its boundary, and their gradient.
// Included once per instruction set by kernels.h, inside its namespace.

template <class A>
struct Taps {
  const int64_t k, r, channels;
  const bool per_channel, circular;
  Array<A> weight;  // (1 or channels, k)

  Taps(const Problem& p, const void* source, bool transposed)
      : k(p.kernel_size), r(k / 2), channels(p.channels),
        // The transpose has no terms for the padding. An infinite tap times its zeros would be NaN,
        // so each channel gets a row of taps, with zeros there.
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
  const int64_t r = taps.r, C = taps.channels;
  const auto at = [&](int64_t u) {
    const int64_t from = taps.channel(u);
    return from < 0 ? A(0) : in[from];
  };
  for (int64_t i = 0; i < r; ++i) out[i] = at(i - r), out[r + C + i] = at(C + i);
  __builtin_memcpy(out + r, in, C * sizeof(A));
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
// for any number of threads. Padding takes part, so that NaN spreads as in a plain convolution.
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
