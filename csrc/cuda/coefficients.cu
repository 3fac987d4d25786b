// The arithmetic between the passes over a tail's maps, see ../coefficients.h: some thousand
// numbers, in float64, with a thread for each or for each channel. Sums are in a fixed order.
#include <algorithm>
#include <type_traits>

#include "cuda.h"
#include "gates.h"

namespace eca::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// ---- small tensors of any dtype ----

__device__ inline double number(const Values& values, int64_t i, double absent) {
  if (!values.data) return absent;
  switch (values.dtype) {
    case Dtype::kFloat64: return value_at(static_cast<const double*>(values.data) + i);
    case Dtype::kFloat16: return widen(value_at(static_cast<const half*>(values.data) + i));
    case Dtype::kBFloat16: return widen(value_at(static_cast<const bfloat16*>(values.data) + i));
    default: return value_at(static_cast<const float*>(values.data) + i);
  }
}

__device__ inline void put_number(void* to, Dtype dtype, int64_t i, double value) {
  if (!to) return;
  switch (dtype) {
    case Dtype::kFloat64: return put(static_cast<double*>(to) + i, value);
    case Dtype::kFloat16: return put(static_cast<half*>(to) + i, narrow<half>(float(value)));
    case Dtype::kBFloat16:
      return put(static_cast<bfloat16*>(to) + i, narrow<bfloat16>(float(value)));
    default: return put(static_cast<float*>(to) + i, float(value));
  }
}

template <class A>
__device__ inline void put_row(void* to, int64_t i, double value) {
  put(static_cast<A*>(to) + i, A(value));
}

// ---- a channel of a norm ----

// u = alpha * (x - centre) + beta. What rounding takes from the centre goes into beta.
struct NormChannel {
  bool present;
  double alpha, beta, centre, shift, spread;

  __device__ double normed(double distance) const { return alpha * distance + beta; }
};

template <class A>
__device__ inline NormChannel norm_of(const NormValues& norm, int64_t c) {
  NormChannel found{norm.mean.data != nullptr, number(norm.gamma, c, 1), 0, 0, 0, 0};
  if (!found.present) return found;
  const double mean = number(norm.mean, c, 0);
  found.centre = double(A(mean));
  found.shift = mean - found.centre;
  found.spread = one_over_root(number(norm.variance, c, 0) + norm.eps);
  found.alpha *= found.spread;
  found.beta = number(norm.beta, c, 0) - found.alpha * found.shift;
  return found;
}

// ---- sums over samples: a block has 32 channels, and its warps share the samples ----

template <class F>
__device__ inline double over_samples(int64_t samples, Shared<double> parts, F value_of) {
  double sum = 0;
  for (int64_t n = thread_index() / 32; n < samples; n += kWarps) sum += value_of(n);
  parts.set(thread_index(), sum);
  block_barrier();
  sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += parts.get(w * 32 + thread_index() % 32);
  block_barrier();
  return sum;
}

__global__ void __launch_bounds__(kThreads, 2)
    batch_statistics_of(BatchStatistics t, double of_samples, double of_values, double unbiased) {
  const auto parts = shared_array<double>(0, kThreads);
  const int64_t c = block_index() * 32 + thread_index() % 32, N = t.samples, C = t.channels;
  const bool own = c < C;
  const auto plane = [&](int64_t n) { return own ? value_at(t.planes + n * C + c) : 0.0; };
  const double mean = over_samples(N, parts, plane) * of_samples;
  const double squares = over_samples(N, parts, [&](int64_t n) {
    const double between = plane(n) - mean;
    return plane(N + n) + between * between * double(t.pixels);
  });
  if (!own || thread_index() >= 32) return;
  const double variance = squares * of_values;
  put(t.mean + c, mean);
  put(t.variance + c, variance);
  const Running& r = t.running;
  const auto updated = [&](const Values& old, double batch) {
    return r.factor * batch + (1 - r.factor) * number(old, c, 0);
  };
  put_number(r.new_mean, r.mean.dtype, c, updated(r.mean, mean));
  put_number(r.new_variance, r.variance.dtype, c, updated(r.variance, variance * unbiased));
}

// ---- before the first pass ----

template <class A>
__device__ inline A distance_of(const Coefficients& t, const NormChannel& norm, int64_t i) {
  return A(number(t.means, i, 0) - norm.centre);
}

template <class A>
__device__ inline double gate_of(const Coefficients& t, int64_t n, int64_t c) {
  const Problem& p = t.problem;
  const int64_t k = p.kernel_size, row = p.taps_per_channel ? c * k : 0;
  const Values taps{t.weight, p.taps_dtype};
  double z = 0;
  for (int64_t j = 0; j < k; ++j) {
    const int64_t from = channel_at(c + j - k / 2, p.channels, p.circular);
    double mean = 0;
    if (from >= 0) {
      const NormChannel norm = norm_of<A>(t.norm, from);
      mean = norm.normed(distance_of<A>(t, norm, n * p.channels + from));
    }
    z += number(taps, row + j, 0) * mean;
  }
  return double(sigmoid(A(z)));
}

// A thread has a number of a plane; those of the first sample also write the channels.
template <class A>
__global__ void __launch_bounds__(kThreads, 2) coefficients_of(Coefficients t) {
  const int64_t N = t.problem.samples, C = t.problem.channels,
                i = block_index() * kThreads + thread_index(), n = i / C, c = i % C;
  if (n >= max(N, int64_t(1))) return;
  const NormChannel own = norm_of<A>(t.norm, c), other = norm_of<A>(t.identity_norm, c);
  if (n == 0) {
    const double rows[] = {other.beta, own.alpha, own.beta, own.centre, other.alpha, other.centre};
#pragma unroll
    for (int r = 0; r < 6; ++r) put_row<A>(t.channels, r * C + c, rows[r]);
  }
  if (n >= N) return;
  if (t.distance) put(static_cast<A*>(t.distance) + i, distance_of<A>(t, own, i));
  if (!t.planes) return;
  double gate;
  if (t.weight) {
    gate = gate_of<A>(t, n, c);
    put_row<A>(t.made_gate, i, gate);
  } else {
    gate = number(t.gate, i, 1);
  }
  const double factor = gate * number(t.scale, n, 1);
  put_row<A>(t.planes, i, factor * own.alpha);
  put_row<A>(t.planes, N * C + i, factor * own.beta + other.beta);
}

// ---- after the sums ----

// dz and the means under the taps, (samples, channels), and parts of dweight, (samples, k).
struct TotalsWork {
  double *dz, *mean, *dweight;
};

// A block has a sample.
template <class A>
__global__ void __launch_bounds__(kThreads, 2) sample_gradients(Totals t, TotalsWork work) {
  const Problem& p = t.problem;
  const int64_t n = block_index(), C = p.channels, NC = p.samples * C, k = p.kernel_size;
  const double scale = number(t.scale, n, 1);
  const auto of_warps = shared_array<double>(0, kWarps);
  double dscale = 0;
  for (int64_t c = thread_index(); c < C; c += kThreads) {
    const int64_t i = n * C + c;
    const NormChannel norm = norm_of<A>(t.norm, c);
    // Without a norm, beta is zero, and an infinite sum of g must not become NaN.
    const double gate = number(t.gate, i, 1),
                 by_beta = norm.beta == 0 ? 0 : norm.beta * value_at(t.sums + i),
                 dfactor = norm.alpha * value_at(t.sums + NC + i) + by_beta;
    dscale += dfactor * gate;
    put_number(t.dgate, t.gate.dtype, i, dfactor * scale);
    if (!t.weight) continue;
    put(work.dz + i, dfactor * scale * gate * (1 - gate));
    put(work.mean + i, norm.normed(double(value_at(static_cast<const A*>(t.distance) + i))));
  }
  const auto in_block = [&](double value) {  // in thread 0
    value = warp_sum(value);
    if (thread_index() % 32 == 0) of_warps.set(thread_index() / 32, value);
    block_barrier();
    value = 0;
    for (int w = 0; w < kWarps; ++w) value += of_warps.get(w);
    block_barrier();
    return value;
  };
  dscale = in_block(dscale);
  if (thread_index() == 0) put_number(t.dscale, t.scale.dtype, n, dscale);
  if (!t.weight) return;
  const Values taps{t.weight, p.taps_dtype};
  for (int64_t c = thread_index(); c < C; c += kThreads) {
    double dmean = 0;
    for (int64_t j = 0; j < k; ++j) {  // no terms for the padding: a tap may be infinite
      const int64_t from = channel_at(c - j + k / 2, C, p.circular);
      if (from < 0) continue;
      dmean += number(taps, (p.taps_per_channel ? from * k : 0) + j, 0) *
               value_at(work.dz + n * C + from);
    }
    put_row<A>(t.dmean, n * C + c, dmean);
  }
  if (!t.dweight || p.taps_per_channel) return;
  for (int64_t j = 0; j < k; ++j) {
    double sum = 0;
    for (int64_t c = thread_index(); c < C; c += kThreads)
      sum += value_at(work.dz + n * C + c) * mean_under_tap(p, work.mean + n * C, c, j);
    sum = in_block(sum);
    if (thread_index() == 0) put(work.dweight + n * k + j, sum);
  }
}

// dweight (1, k): a warp has a tap. (channels, k): a thread has a channel and a tap.
__global__ void __launch_bounds__(kThreads, 2) add_dweight(Totals t, TotalsWork work) {
  const Problem& p = t.problem;
  const int64_t i = block_index() * kThreads + thread_index(), k = p.kernel_size, C = p.channels;
  if (p.taps_per_channel) {
    if (i >= C * k) return;
    double sum = 0;
    for (int64_t n = 0; n < p.samples; ++n)
      sum += value_at(work.dz + n * C + i / k) * mean_under_tap(p, work.mean + n * C, i / k, i % k);
    return put_number(t.dweight, p.taps_dtype, i, sum);
  }
  const int64_t j = i / 32;
  if (j >= k) return;
  double sum = 0;
  for (int64_t n = thread_index() % 32; n < p.samples; n += 32)
    sum += value_at(work.dweight + n * k + j);
  sum = warp_sum(sum);
  if (thread_index() % 32 == 0) put_number(t.dweight, p.taps_dtype, j, sum);
}

template <class A>
__global__ void __launch_bounds__(kThreads, 2) channel_totals(Totals t) {
  const auto parts = shared_array<double>(0, kThreads);
  const Problem& p = t.problem;
  const int64_t c = block_index() * 32 + thread_index() % 32, N = p.samples, C = p.channels,
                NC = N * C;
  const bool own = c < C;
  const Values dmean = t.weight
                           ? Values{t.dmean, sizeof(A) == 8 ? Dtype::kFloat64 : Dtype::kFloat32}
                           : t.given_dmean;
  const A* const distance = static_cast<const A*>(t.distance);
  const auto total = [&](int row, auto value_of) {
    const double sum =
        over_samples(N, parts, [&](int64_t n) { return own ? value_of(n, n * C + c) : 0.0; });
    if (own && thread_index() < 32) put(t.totals + row * C + c, sum);
  };
  const auto factor = [&](int64_t n, int64_t i) {
    return number(t.gate, i, 1) * number(t.scale, n, 1);
  };
  total(0, [&](int64_t n, int64_t i) {
    return factor(n, i) * value_at(t.sums + i) + number(dmean, i, 0);
  });
  total(1, [&](int64_t n, int64_t i) {
    const double by_x = factor(n, i) * value_at(t.sums + NC + i);
    return dmean.data ? by_x + number(dmean, i, 0) * double(value_at(distance + i)) : by_x;
  });
  total(2, [&](int64_t, int64_t i) { return value_at(t.sums + i); });
  total(3,
        [&](int64_t, int64_t i) { return t.identity_sum ? value_at(t.sums + 2 * NC + i) : 0.0; });
}

// ---- before the last pass ----

// Divided once, on the host: a division in float64 is a call, for which a kernel spills registers.
struct OneOver {
  double values, identity_values, pixels;
};

// As NormGradientRows of ../cpu/coefficients.h, for one channel.
struct NormGradient {
  double dgamma, slope, offset;
};

__device__ inline NormGradient norm_gradient(const NormChannel& norm, const double* totals,
                                             const double* shares, double each, int64_t channels,
                                             int64_t c) {
  if (!norm.present || !totals) return {0, 0, 0};
  const double all = value_at(totals + c), all_by_x = value_at(totals + channels + c);
  const bool shared = shares && each > 0;
  const double du = shared ? value_at(shares + c) : all * each,
               by_x = shared ? value_at(shares + channels + c) : all_by_x * each;
  NormGradient found;
  found.dgamma = norm.spread * (all_by_x - norm.shift * all);
  found.slope = -norm.alpha * norm.spread * (norm.spread * (by_x - norm.shift * du));
  found.offset = -norm.alpha * du - found.slope * norm.shift;
  return found;
}

// A thread has a number of a plane; those of the first sample also write the channels.
template <class A>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_coefficients_of(GradientCoefficients t, OneOver one_over) {
  const Problem& p = t.problem;
  const int64_t N = p.samples, C = p.channels, i = block_index() * kThreads + thread_index(),
                n = i / C, c = i % C;
  if (n >= max(N, int64_t(1))) return;
  const NormChannel own = norm_of<A>(t.norm, c), other = norm_of<A>(t.identity_norm, c);
  const double* const identity_totals = t.totals ? t.totals + 2 * C : nullptr;
  const double* const identity_shares = t.shares ? t.shares + 2 * C : nullptr;
  const NormGradient mine = norm_gradient(own, t.totals, t.shares, one_over.values, C, c);
  if (n == 0) {
    const NormGradient its =
        norm_gradient(other, identity_totals, identity_shares, one_over.identity_values, C, c);
    put_number(t.dgamma, t.norm.gamma.dtype, c, mine.dgamma);
    put_number(t.identity_dgamma, t.identity_norm.gamma.dtype, c, its.dgamma);
    if (t.dbeta) put_number(t.dbeta, t.norm.beta.dtype, c, value_at(t.totals + c));
    if (t.identity_dbeta)
      put_number(t.identity_dbeta, t.identity_norm.beta.dtype, c, value_at(identity_totals + c));
    const double rows[] = {mine.slope, other.alpha, its.slope, its.offset};
    if (t.channels) {
#pragma unroll
      for (int r = 0; r < 4; ++r) put_row<A>(t.channels, r * C + c, rows[r]);
    }
  }
  if (n >= N || !t.planes) return;
  const double factor = number(t.gate, i, 1) * number(t.scale, n, 1);
  put_row<A>(t.planes, i, factor * own.alpha);
  put_row<A>(t.planes, N * C + i,
             own.alpha * number(t.dmean, i, 0) * one_over.pixels + mine.offset);
}

int64_t blocks_of(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

template <class Body>
void with_sums(const Problem& p, Body body) {
  if (p.dtype == Dtype::kFloat64) body(double());
  else body(float());
}

}  // namespace

int64_t workspace_of(const Totals& t) {
  const Problem& p = t.problem;
  return t.weight ? p.samples * (2 * p.channels + p.kernel_size) * int64_t(sizeof(double)) : 0;
}

void batch_statistics(const BatchStatistics& t, const Memory& memory) {
  const double values = double(t.samples) * double(t.pixels);
  launch({(t.channels + 31) / 32, kThreads, kThreads * int64_t(sizeof(double)),
          static_cast<Stream>(memory.stream)},
         batch_statistics_of, t, 1 / double(t.samples), 1 / values, values / (values - 1));
}

void coefficients(const Coefficients& t, const Memory& memory) {
  const bool planes = t.planes || t.distance;
  const int64_t rows = planes ? std::max<int64_t>(t.problem.samples, 1) : 1;
  with_sums(t.problem, [&](auto sum) {
    launch({blocks_of(rows * t.problem.channels), kThreads, 0, static_cast<Stream>(memory.stream)},
           coefficients_of<decltype(sum)>, t);
  });
}

void totals(const Totals& t, const Memory& memory) {
  const auto stream = static_cast<Stream>(memory.stream);
  const Problem& p = t.problem;
  double* const dz = static_cast<double*>(memory.workspace);
  const int64_t NC = p.samples * p.channels, bytes = sizeof(double);
  const TotalsWork work = t.weight ? TotalsWork{dz, dz + NC, dz + 2 * NC} : TotalsWork{};
  with_sums(p, [&](auto sum) {
    using A = decltype(sum);
    if (p.samples)
      launch({p.samples, kThreads, kWarps * bytes, stream}, sample_gradients<A>, t, work);
    launch({(p.channels + 31) / 32, kThreads, kThreads * bytes, stream}, channel_totals<A>, t);
  });
  if (!t.dweight) return;
  const int64_t threads = p.taps_per_channel ? p.channels * p.kernel_size : 32 * p.kernel_size;
  launch({blocks_of(threads), kThreads, 0, stream}, add_dweight, t, work);
}

void gradient_coefficients(const GradientCoefficients& t, const Memory& memory) {
  const int64_t rows = t.planes ? std::max<int64_t>(t.problem.samples, 1) : 1;
  const auto inverse = [](double value) { return value > 0 ? 1 / value : 0; };
  const OneOver one_over{inverse(t.values), inverse(t.identity_values),
                         inverse(double(t.problem.pixels))};
  with_sums(t.problem, [&](auto sum) {
    launch({blocks_of(rows * t.problem.channels), kThreads, 0, static_cast<Stream>(memory.stream)},
           gradient_coefficients_of<decltype(sum)>, t, one_over);
  });
}

}  // namespace eca::cuda
