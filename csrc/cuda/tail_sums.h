// The passes of a residual block's tail that sum: the moments of planes, or the sums of gradients.
// They read every map once. Threads add up some hundred terms in float at most, and meet in double.
// gated_element.h has other sums for the same kernels.
#pragma once

#include "columns.h"
#include "tail_apply.h"

namespace eca::cuda {

constexpr int kMostTailSums = 5;

// Where the sums of a launch go: (parts, samples, channels) from each pointer on.
struct TailTotals {
  double* to[kMostTailSums];
  int kinds;

  __device__ void put(int kind, int64_t part, int64_t planes, int64_t plane, double value) const {
    if (kind < kinds) cuda::put(to[kind] + part * planes + plane, value);
  }
};

// ---- what is summed ----

// The maps that a sum reads; the other pointers are null.
struct SummedMaps {
  Map x, dy, identity;
  const uint8_t* mask;
};

// The mean and the squared distances from it, by the distances d from a pivot near the mean: sums of
// d and of d * d. Where the pivot is the mean of m of n elements, no more than a factor of n / m is
// lost to cancellation.
template <class T>
struct TailMoments {
  using A = Accumulator<T>;
  static constexpr int kSums = 2;
  static constexpr int kChannels = 4;
  static constexpr bool kZerosAddNothing = false;
  static constexpr bool kHasPivot = true;
  Map x;

  template <int V>
  struct Read {
    Packed<T, V> x;

    __device__ void pack() { forget(x); }
  };
  template <int W>
  struct Terms {
    Vector<A, W> pivot;
  };

  template <int V>
  __device__ Read<V> read(bool there, const TailShape&, const TailPlace& at) const {
    return {load_if<V>(there, at.in<const T>(x))};
  }

  template <int V>
  __device__ uint32_t bits(const Read<V>&, const TailShape&, const TailPlace&) const {
    return 0;
  }

  template <int W>
  __device__ Terms<W> terms(int64_t, int) const {
    return {};
  }

  template <int V, int W>
  __device__ void compute(const Terms<W>& k, int w, const Read<V>& from, int e, uint32_t,
                          A (&terms)[kSums]) const {
    add(k, w, from.x.wide(e), 0, 0, 0, terms);
  }

  __device__ SummedMaps summed() const { return {x, {}, {}, nullptr}; }

  // Of an element of these maps.
  template <int W>
  __device__ void add(const Terms<W>& k, int w, A x, A, A, uint32_t, A (&terms)[kSums]) const {
    const A d = x - k.pivot.element[w];
    terms[0] = d;
    terms[1] = d * d;
  }

  __device__ static void finish(double pivot, double count, double (&sums)[kSums]) {
    const double shift = sums[0] / count;
    sums[1] -= sums[0] * shift;
    sums[0] = pivot + shift;
  }
};

// The sums of g, g * (x - centre) and g * (identity - identity_centre).
template <class T, bool kSmooth, bool kIdentity>
struct TailGradientSums {
  using A = Accumulator<T>;
  using Maps = TailGradientMaps<T, kSmooth, kIdentity>;
  static constexpr int kSums = kIdentity ? 3 : 2;
  static constexpr int kChannels = kSmooth ? 2 : 4;  // whose coefficients a thread has at a time
  // A vector that is not there need not be told from others. For v, zeros may be out of range.
  static constexpr bool kZerosAddNothing = !kSmooth;
  static constexpr bool kHasPivot = false;
  Maps maps;

  template <int V>
  using Read = typename Maps::template Read<V, false>;
  template <int W>
  using Terms = TailTerms<A, W>;

  template <int V>
  __device__ Read<V> read(bool there, const TailShape& shape, const TailPlace& at) const {
    return maps.template read<V, false>(there, shape, at);
  }

  template <int V>
  __device__ uint32_t bits(const Read<V>& from, const TailShape& shape, const TailPlace& at) const {
    return maps.bits(from, shape, at, V);
  }

  template <int W>
  __device__ Terms<W> terms(int64_t plane, int channel) const {
    return maps.template terms<W>(plane, channel);
  }

  template <int V, int W>
  __device__ void compute(const Terms<W>& k, int w, const Read<V>& from, int e, uint32_t bits,
                          A (&terms)[kSums]) const {
    make(k, w, maps.element(k, w, from, e, bits), terms);
  }

  __device__ SummedMaps summed() const {
    return {maps.x, maps.dy, maps.needs_identity() ? maps.identity : Map{}, maps.mask};
  }

  template <int W>
  __device__ void add(const Terms<W>& k, int w, A x, A dy, A identity, uint32_t bits,
                      A (&terms)[kSums]) const {
    make(k, w, maps.element_of(k, w, dy, x, identity, maps.mask ? bits : ~0u), terms);
  }

  template <int W>
  __device__ void make(const Terms<W>& k, int w, const typename Maps::Element& of,
                       A (&terms)[kSums]) const {
    terms[0] = of.g;
    terms[1] = of.g * (of.x - k.centre.element[w]);
    if constexpr (kIdentity) terms[2] = of.g * (of.identity - k.identity_centre.element[w]);
  }

  __device__ static void finish(double, double, double (&)[kSums]) {}
};

constexpr int kTailSumsAtOnce = 4;

// ---- planes: a warp for each part of each ----

template <class T, int V, class Sum>
__global__ void __launch_bounds__(kTailThreads, Sum::kSums > 2 ? 2 : resident_blocks(3))
    sum_tail_rows(TailSumGrid grid, Sum sum, TailTotals totals) {
  using A = Accumulator<T>;
  constexpr int kAtOnce = kTailSumsAtOnce;
  const auto warp = uint32_t(block_index() * (kTailThreads / 32) + thread_index() / 32);
  const uint32_t plane = warp / uint32_t(grid.parts), part = warp - plane * uint32_t(grid.parts);
  if (plane >= grid.all_planes) return;
  TailPlace at;
  at.sample = int(plane / uint32_t(grid.shape.channels));
  at.row = int(plane) - at.sample * grid.shape.channels;
  const int begin = int(part) * grid.part, lane = thread_index() % 32,
            count = min(grid.part, grid.pixels - begin);
  auto terms = sum.template terms<1>(plane, at.row);
  A sums[Sum::kSums] = {};
  A pivot = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += kAtOnce * 32 * V) {
    typename Sum::template Read<V> read[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = first + (u * 32 + lane) * V;
      at.offset = begin + i;
      read[u] = sum.template read<V>(i < count, grid.shape, at);
    }
    if constexpr (Sum::kHasPivot)
      if (first == 0) {
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
#pragma unroll
          for (int e = 0; e < V; ++e) pivot += read[u].x.wide(e);
        pivot = warp_sum(pivot) / A(min(count, kAtOnce * 32 * V));
        terms.pivot.element[0] = pivot;
      }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = first + (u * 32 + lane) * V;
      if (i >= count) continue;
      at.offset = begin + i;
      const uint32_t bits = sum.bits(read[u], grid.shape, at);
      A some[Sum::kSums] = {};
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (e % 2 == 0) read[u].pack();
        A more[Sum::kSums];
        sum.compute(terms, 0, read[u], e, bits, more);
#pragma unroll
        for (int s = 0; s < Sum::kSums; ++s) some[s] += more[s];
      }
#pragma unroll
      for (int s = 0; s < Sum::kSums; ++s) sums[s] += some[s];
    }
  }
  double found[Sum::kSums];
#pragma unroll
  for (int s = 0; s < Sum::kSums; ++s) found[s] = warp_sum(double(sums[s]));
  sum.finish(pivot, count, found);
  if (lane != 0) return;
#pragma unroll
  for (int s = 0; s < Sum::kSums; ++s) totals.put(s, part, grid.all_planes, plane, found[s]);
}

// ---- pixels: a block for some columns of a part of a sample ----

template <class T, int V, class Sum>
__global__ void __launch_bounds__(kTailThreads, 2)
    sum_tail_columns(TailSumGrid grid, Sum sum, TailTotals totals) {
  using A = Accumulator<T>;
  constexpr int kAtOnce = kTailSumsAtOnce, W = V % 4 == 0 ? Sum::kChannels : 1, kSums = Sum::kSums;
  const auto block = uint32_t(block_index()), in_group = block / uint32_t(grid.groups),
             sample = in_group / uint32_t(grid.parts), part = in_group - sample * grid.parts;
  const int first_channel = int(block - in_group * grid.groups) * kTailSumColumns * V,
            channels = min(kTailSumColumns * V, grid.shape.channels - first_channel),
            columns = channels / V, row_count = kTailThreads / columns,
            row = int(uint32_t(thread_index()) / uint32_t(columns)),
            channel = (thread_index() - row * columns) * V, begin = int(part) * grid.part,
            count = min(grid.part, grid.pixels - begin);
  TailPlace at;
  at.sample = int(sample);
  at.offset = first_channel + channel;
  const int64_t plane = at.plane(grid.shape);
  const auto go_to = [&](int pixel) {
    at.row = begin + pixel;
    return row < row_count && pixel < count;
  };
  Vector<A, V> pivot{};
  if constexpr (Sum::kHasPivot) {  // of pixels far apart: neighbours are alike
    if (row < row_count) {
      const int some = min(count, kAtOnce), step = count / some;
      typename Sum::template Read<V> read[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const bool there = go_to(u * step) && u < some;
        read[u] = sum.template read<V>(there, grid.shape, at);
      }
#pragma unroll
      for (int e = 0; e < V; ++e) {
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) pivot.element[e] += read[u].x.wide(e);
        pivot.element[e] /= A(some);
      }
    }
  }
  Vector<A, V> sums[kSums] = {};
#pragma unroll 1
  for (int first = row; first < count; first += kAtOnce * row_count) {
    typename Sum::template Read<V> read[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const bool there = go_to(first + u * row_count);
      read[u] = sum.template read<V>(there, grid.shape, at);
    }
    if (row >= row_count) break;
    uint32_t bits[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) bits[u] = sum.bits(read[u], grid.shape, at);
#pragma unroll
    for (int e = 0; e < V; e += W) {
#pragma unroll
      for (auto& some : read) some.pack();
      const int c = hidden(e);  // without which all coefficients would be in registers
      auto terms = sum.template terms<W>(plane + c, at.offset + c);
#pragma unroll
      for (int w = 0; w < W; ++w) {
        if constexpr (Sum::kHasPivot) terms.pivot.element[w] = pivot.element[e + w];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          if (!Sum::kZerosAddNothing && first + u * row_count >= count) continue;
          A more[kSums];
          if (w % 2 == 0) read[u].pack();
          sum.compute(terms, w, read[u], e + w, bits[u], more);
#pragma unroll
          for (int s = 0; s < kSums; ++s) sums[s].element[e + w] += more[s];
        }
      }
    }
  }
  const auto scratch = shared_array<A>(0, kTailThreads * V);
  const int mine = thread_index();  // of the group's channels, of which there are no more
  double found[kSums] = {}, about = 0;
  const auto each = [&](const Vector<A, V>& values, int rows, double* to) {
    if (row < rows) store_all(row * channels + channel, values, scratch);
    block_barrier();
    if (mine < channels)
      for (int r = 0; r < rows; ++r) *to += double(scratch.get(r * channels + mine));
    block_barrier();
  };
#pragma unroll
  for (int s = 0; s < kSums; ++s) each(sums[s], row_count, &found[s]);
  if constexpr (Sum::kHasPivot) each(pivot, 1, &about);
  if (mine >= channels) return;
  sum.finish(about, count, found);
#pragma unroll
  for (int s = 0; s < kSums; ++s)
    totals.put(s, part, grid.all_planes,
               int64_t(sample) * grid.shape.channels + first_channel + mine, found[s]);
}

// ---- the parts of a plane's sums, in their order ----

// from and to are the means and squared distances, or sums.
inline __device__ double sum_of_parts(const double* from, const TailSumGrid& grid, int64_t plane) {
  double sum = 0;
#pragma unroll 4
  for (int part = 0; part < grid.parts; ++part)
    sum += value_at(from + part * grid.all_planes + plane);
  return sum;
}

static __global__ void __launch_bounds__(kTailThreads)
    add_tail_sums(TailSumGrid grid, TailTotals from, TailTotals to) {
  const int64_t plane = block_index() * kTailThreads + thread_index();
  if (plane >= grid.all_planes) return;
#pragma unroll
  for (int s = 0; s < kMostTailSums; ++s)
    if (s < from.kinds) to.put(s, 0, grid.all_planes, plane, sum_of_parts(from.to[s], grid, plane));
}

// By the formula of Chan, Golub and LeVeque (1979).
static __global__ void __launch_bounds__(kTailThreads)
    merge_tail_moments(TailSumGrid grid, TailTotals from, TailTotals to) {
  const int64_t plane = block_index() * kTailThreads + thread_index();
  if (plane >= grid.all_planes) return;
  double count = 0, mean = 0, squares = 0;
  for (int part = 0; part < grid.parts; ++part) {
    const int64_t i = part * grid.all_planes + plane;
    const double more = min(grid.part, grid.pixels - part * grid.part), all = count + more,
                 between = value_at(from.to[0] + i) - mean;
    squares += value_at(from.to[1] + i) + between * between * count * more / all;
    mean += between * more / all;
    count = all;
  }
  to.put(0, 0, grid.all_planes, plane, mean);
  to.put(1, 0, grid.all_planes, plane, squares);
}

}  // namespace eca::cuda
