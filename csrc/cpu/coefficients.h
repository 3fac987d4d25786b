// The arithmetic between the passes over a tail's maps, see ../coefficients.h.
// Included once per instruction set by kernels.h, inside its namespace.

// out[i] = values[first + i], or `absent`
inline void read(double* out, const Values& values, int64_t first, int64_t n, double absent) {
  if (!values.data) {
    for (int64_t i = 0; i < n; ++i) out[i] = absent;
    return;
  }
  visit(values.dtype, [&](auto* type) {
    const auto* from = (decltype(type))values.data + first;
    for (int64_t i = 0; i < n; ++i) out[i] = to_acc(from[i]);
  });
}

inline void write(void* out, Dtype dtype, int64_t first, const double* values, int64_t n) {
  visit(dtype, [&](auto* type) {
    auto* to = (decltype(type))out + first;
    for (int64_t i = 0; i < n; ++i) to[i] = from_double(values[i], type);
  });
}

// A norm as u = alpha * (x - centre) + beta, for n channels from `first` on. What rounding takes from
// the centre goes into beta.
struct NormRows {
  bool present;
  Array<double> alpha, beta, centre, shift, spread;

  template <class A>
  NormRows(const NormValues& norm, int64_t first, int64_t n, A)
      : present(norm.mean.data), alpha(n), beta(n), centre(n), shift(n), spread(n) {
    read(alpha, norm.gamma, first, n, 1);
    if (!present) return;
    read(shift, norm.mean, first, n, 0);
    read(spread, norm.variance, first, n, 0);
    read(beta, norm.beta, first, n, 0);
    for (int64_t c = 0; c < n; ++c) {
      centre[c] = A(shift[c]);
      shift[c] -= centre[c];
      spread[c] = 1 / __builtin_sqrt(spread[c] + norm.eps);
      alpha[c] *= spread[c];
      beta[c] -= alpha[c] * shift[c];
    }
  }
};

inline int64_t samples_of_grain(int64_t channels) {
  return max_of(kGrain / 8 / max_of(channels, 1), 1);
}

inline void batch_statistics(const BatchStatistics& t, const ThreadPool&) {
  const int64_t N = t.samples, C = t.channels;
  double *mean = t.mean, *variance = t.variance;
  for (int64_t c = 0; c < C; ++c) mean[c] = variance[c] = 0;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t c = 0; c < C; ++c) mean[c] += t.planes[n * C + c];
  for (int64_t c = 0; c < C; ++c) mean[c] /= N;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t c = 0; c < C; ++c) {
      const double between = t.planes[n * C + c] - mean[c];
      variance[c] += t.planes[(N + n) * C + c] + between * between * t.pixels;
    }
  for (int64_t c = 0; c < C; ++c) variance[c] /= double(N) * t.pixels;
  const Running& r = t.running;
  if (!r.new_mean && !r.new_variance) return;
  const double values = double(N) * t.pixels;
  Array<double> row(C);
  const auto update = [&](const Values& old, void* to, const double* batch, double by) {
    if (!to) return;
    read(row, old, 0, C, 0);
    for (int64_t c = 0; c < C; ++c) row[c] = r.factor * (batch[c] * by) + (1 - r.factor) * row[c];
    write(to, old.dtype, 0, row, C);
  };
  update(r.mean, r.new_mean, mean, 1);
  update(r.variance, r.new_variance, variance, values / (values - 1));
}

// Taps in float64; without taps, one that nothing reads.
struct GateTaps : Taps<double> {
  static constexpr float kOne = 1;
  GateTaps(const Problem& p, const void* weight, bool transposed)
      : Taps<double>(p, weight ? weight : &kOne, transposed) {}
};

// Writes the coefficients of the n channels of both norms, from the channel `first` on.
template <class A>
void write_channels(const Coefficients& t, const NormRows& own, const NormRows& other,
                    int64_t first, int64_t n) {
  const int64_t C = t.problem.channels;
  A* const to = (A*)t.channels + first;
  for (int64_t c = 0; c < n; ++c) {
    to[c] = other.beta[c], to[C + c] = own.alpha[c];
    to[2 * C + c] = own.beta[c], to[3 * C + c] = own.centre[c];
    to[4 * C + c] = other.alpha[c], to[5 * C + c] = other.centre[c];
  }
}

// Channels whose norms stay in the first-level cache: fresh memory for all takes longer than the
// arithmetic.
constexpr int64_t kNormsAtOnce = 256;

template <class A>
void coefficients_as(const Coefficients& t, const ThreadPool& pool) {
  const Problem& p = t.problem;
  const int64_t N = p.samples, C = p.channels;
  if (!t.planes && !t.distance) {
    for (int64_t first = 0; first < C; first += kNormsAtOnce) {
      const int64_t n = min_of(kNormsAtOnce, C - first);
      const NormRows own(t.norm, first, n, A()), other(t.identity_norm, first, n, A());
      write_channels<A>(t, own, other, first, n);
    }
    return;
  }
  const NormRows own(t.norm, 0, C, A()), other(t.identity_norm, 0, C, A());
  write_channels<A>(t, own, other, 0, C);
  const GateTaps taps(p, t.weight, false);
  parallel(pool, N, samples_of_grain(C), [&](int64_t begin, int64_t end) {
    Array<double> factor(C), row(C);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t at = n * C;
      if (t.distance) {
        A* const distance = (A*)t.distance + at;
        read(row, t.means, at, C, 0);
        for (int64_t c = 0; c < C; ++c) distance[c] = row[c] - own.centre[c];
        for (int64_t c = 0; c < C; ++c) row[c] = own.alpha[c] * distance[c] + own.beta[c];
      }
      if (t.weight) {
        A* const gate = (A*)t.made_gate + at;
        filter_sample<double>(taps, factor, row);
        for (int64_t c = 0; c < C; ++c) gate[c] = factor[c];
        sigmoid_row(gate, gate, C);
        for (int64_t c = 0; c < C; ++c) factor[c] = gate[c];
      } else {
        read(factor, t.gate, at, C, 1);
      }
      if (!t.planes) continue;
      double scale;
      read(&scale, t.scale, n, 1, 1);
      A *p_row = (A*)t.planes + at, *q_row = p_row + N * C;
      for (int64_t c = 0; c < C; ++c) {
        const double f = factor[c] * scale;
        p_row[c] = f * own.alpha[c], q_row[c] = f * own.beta[c] + other.beta[c];
      }
    }
  });
}

template <class A>
void totals_as(const Totals& t, const ThreadPool& pool) {
  const Problem& p = t.problem;
  const int64_t N = p.samples, C = p.channels;
  const NormRows own(t.norm, 0, C, A());
  const double *g = t.sums, *by_x = g + N * C, *by_identity = by_x + N * C;
  const GateTaps taps(p, t.weight, true);
  const A* const distance = (const A*)t.distance;
  Array<double> dz(t.weight ? N * C : 0), mean(t.weight ? N * C : 0), dscale(N);
  const auto factors = [&](int64_t begin, int64_t end) {
    Array<double> gate(C), dfactor(C), row(C);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t at = n * C;
      double scale;
      read(&scale, t.scale, n, 1, 1);
      read(gate, t.gate, at, C, 1);
      for (int64_t c = 0; c < C; ++c)
        dfactor[c] = own.alpha[c] * by_x[at + c] + own.beta[c] * g[at + c];
      if (t.dscale) dscale[n] = reduce_row<true, double>(dfactor, gate, C);
      for (int64_t c = 0; c < C; ++c) dfactor[c] *= scale;
      if (t.dgate) write(t.dgate, t.gate.dtype, at, dfactor, C);
      if (!t.weight) continue;
      for (int64_t c = 0; c < C; ++c) dz[at + c] = dfactor[c] * gate[c] * (1 - gate[c]);
      for (int64_t c = 0; c < C; ++c) mean[at + c] = own.alpha[c] * distance[at + c] + own.beta[c];
      filter_sample<double>(taps, row, dz + at);
      A* const dmean = (A*)t.dmean + at;
      for (int64_t c = 0; c < C; ++c) dmean[c] = row[c];
    }
  };
  if (t.dscale || t.dgate || t.weight) parallel(pool, N, samples_of_grain(C), factors);
  if (t.dscale) write(t.dscale, t.scale.dtype, 0, dscale, N);
  if (t.dweight) taps_gradient<double>(p, taps, dz, mean, t.dweight, pool);
  const Values dmean = t.weight
                           ? Values{t.dmean, sizeof(A) == 8 ? Dtype::kFloat64 : Dtype::kFloat32}
                           : t.given_dmean;
  parallel(pool, C, samples_of_grain(N), [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    Array<double> gate(count), dm(count);
    double *du = t.totals + begin, *du_x = du + C, *total = du_x + C, *total_i = total + C;
    for (int64_t k = 0; k < 4; ++k)
      for (int64_t i = 0; i < count; ++i) du[k * C + i] = 0;
    for (int64_t n = 0; n < N; ++n) {
      const int64_t at = n * C + begin;
      double scale;
      read(&scale, t.scale, n, 1, 1);
      read(gate, t.gate, at, count, 1);
      read(dm, dmean, at, count, 0);
      // Vectors by hand: these are more pointers than the compiler checks for overlap.
      each_piece<double>(0, count, false, [&](int64_t i, auto piece) {
        const auto at_i = [&](const double* from) { return piece.load_from(from + i); };
        const auto add = [&](double* to, Vd v) { piece.store_to(to + i, at_i(to) + v, false); };
        const Vd factor = at_i(gate) * scale, sum = at_i(g + at);
        add(du, factor * sum + at_i(dm));
        add(du_x, factor * at_i(by_x + at));
        add(total, sum);
        if (t.identity_sum) add(total_i, at_i(by_identity + at));
      });
      if (dmean.data)
        for (int64_t i = 0; i < count; ++i) du_x[i] += dm[i] * distance[at + i];
    }
  });
}

// The gradients of a norm's parameters, and what the statistics of a batch of M values add to dx
// (Ioffe and Szegedy, "Batch Normalization", 2015, section 3): dbeta = sum(du),
// dgamma = spread * sum(du * (x - mean)), and -alpha * (dbeta + spread * (x - mean) * dgamma) / M,
// which is slope * (x - centre) + offset.
struct NormGradientRows {
  Array<double> dgamma, slope, offset;

  // total: the sums of du, and C on, of du * (x - centre); share: the same per value, or null
  NormGradientRows(const NormRows& norm, int64_t C, const double* total, const double* share,
                   double values)
      : dgamma(C), slope(C), offset(C) {
    if (!norm.present || !total) return;
    const double each = values > 0 ? 1 / values : 0;
    for (int64_t c = 0; c < C; ++c) {
      const double du = share ? share[c] : total[c] * each;
      const double by_x = share ? share[C + c] : total[C + c] * each;
      dgamma[c] = norm.spread[c] * (total[C + c] - norm.shift[c] * total[c]);
      const double own = norm.spread[c] * (by_x - norm.shift[c] * du);
      slope[c] = -norm.alpha[c] * norm.spread[c] * own;
      offset[c] = -norm.alpha[c] * du - slope[c] * norm.shift[c];
    }
  }
};

template <class A>
void gradient_coefficients_as(const GradientCoefficients& t, const ThreadPool& pool) {
  const Problem& p = t.problem;
  const int64_t N = p.samples, C = p.channels;
  const NormRows own(t.norm, 0, C, A()), other(t.identity_norm, 0, C, A());
  const double *total = t.totals, *share = t.values > 0 ? t.shares : nullptr;
  const double *identity_total = total ? total + 2 * C : nullptr,
               *identity_share = t.identity_values > 0 && t.shares ? t.shares + 2 * C : nullptr;
  const NormGradientRows mine(own, C, total, share, t.values);
  const NormGradientRows its(other, C, identity_total, identity_share, t.identity_values);
  if (t.dgamma) write(t.dgamma, t.norm.gamma.dtype, 0, mine.dgamma, C);
  if (t.dbeta) write(t.dbeta, t.norm.beta.dtype, 0, total, C);
  if (t.identity_dgamma) write(t.identity_dgamma, t.identity_norm.gamma.dtype, 0, its.dgamma, C);
  if (t.identity_dbeta) write(t.identity_dbeta, t.identity_norm.beta.dtype, 0, identity_total, C);
  if (!t.planes) return;
  A* const channels = (A*)t.channels;
  for (int64_t c = 0; c < C; ++c) {
    channels[c] = mine.slope[c], channels[C + c] = other.alpha[c];
    channels[2 * C + c] = its.slope[c], channels[3 * C + c] = its.offset[c];
  }
  parallel(pool, N, samples_of_grain(C), [&](int64_t begin, int64_t end) {
    Array<double> gate(C), dmean(C);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t at = n * C;
      double scale;
      read(&scale, t.scale, n, 1, 1);
      read(gate, t.gate, at, C, 1);
      read(dmean, t.dmean, at, C, 0);
      A *p_row = (A*)t.planes + at, *r_row = p_row + N * C;
      for (int64_t c = 0; c < C; ++c) {
        p_row[c] = gate[c] * scale * own.alpha[c];
        r_row[c] = own.alpha[c] * dmean[c] / p.pixels + mine.offset[c];
      }
    }
  });
}

inline void coefficients(const Coefficients& t, const ThreadPool& pool) {
  if (t.problem.dtype == Dtype::kFloat64) coefficients_as<double>(t, pool);
  else coefficients_as<float>(t, pool);
}

inline void totals(const Totals& t, const ThreadPool& pool) {
  if (t.problem.dtype == Dtype::kFloat64) totals_as<double>(t, pool);
  else totals_as<float>(t, pool);
}

inline void gradient_coefficients(const GradientCoefficients& t, const ThreadPool& pool) {
  if (t.problem.dtype == Dtype::kFloat64) gradient_coefficients_as<double>(t, pool);
  else gradient_coefficients_as<float>(t, pool);
}
