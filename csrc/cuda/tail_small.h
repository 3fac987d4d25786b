// Sums of a residual block's tail for small planes, and for those that are no whole vectors: a block
// copies some planes to shared memory as one run of whole vectors, and a team of threads adds up
// each plane there.
#pragma once

#include "tail_sums.h"

namespace eca::cuda {

template <class T>
__device__ inline Shared<T> fetch_run(const Map& map, int64_t first, int count, int at) {
  constexpr int V = kVector<T>;
  const auto run = shared_array<T>(at, count);
#pragma unroll 4
  for (int i = thread_index() * V; i < count; i += kTailThreads * V)
    run.template fetch<V>(i, static_cast<const T*>(map.data) + first + i);
  return run;
}

// What the sums of gradients need besides x.
template <class T, class Sum>
struct SmallMaps {
  Shared<T> dy, identity;
  Shared<uint8_t> mask;

  __device__ SmallMaps(const Sum& sum, const TailSmallGrid& at, int64_t first, int count,
                       int64_t first_byte, int bytes)
      : dy(fetch_run<T>(sum.maps.dy, first, count, at.dy)),
        identity(fetch_run<T>(sum.maps.identity, first, sum.maps.needs_identity() ? count : 0,
                              at.identity)),
        mask(shared_array<uint8_t>(at.mask, sum.maps.mask ? bytes : 0)) {
    if (sum.maps.mask)
      for (int i = thread_index(); i < bytes; i += kTailThreads)
        mask.set(i, value_at(sum.maps.mask + first_byte + i));
  }

  // Element i of the run, element e of its plane, whose bits begin with byte `first`.
  template <class Terms>
  __device__ void compute(const Sum& sum, const Terms& terms, Shared<T> x, int i, int e, int first,
                          Accumulator<T> (&more)[Sum::kSums]) const {
    const bool reads = sum.maps.needs_identity();
    const uint32_t bits = sum.maps.mask ? mask.get(first + e / 8) >> e % 8 : ~0u;
    sum.add(terms, 0,
            sum.maps.element_of(terms, 0, widen(dy.get(i)), widen(x.get(i)),
                                reads ? widen(identity.get(i)) : Accumulator<T>(0), bits),
            more);
  }
};

// The sum over a team's lanes, in all of them. By all lanes of a warp.
template <class A>
__device__ inline A team_sum(A value, int lanes) {
#pragma unroll 1
  for (int mask = lanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <class T, class Sum>
__global__ void __launch_bounds__(kTailThreads, resident_blocks(4))
    sum_tail_small(TailSumGrid grid, TailSmallGrid small, Sum sum, TailTotals totals) {
  using A = Accumulator<T>;
  const int64_t first = block_index() * small.planes;
  const int planes = int(min(int64_t(small.planes), grid.all_planes - first)), S = grid.pixels,
            lane = thread_index() % small.lanes, team = thread_index() / small.lanes,
            teams = kTailThreads / small.lanes;
  const auto x = [&] {
    if constexpr (Sum::kHasPivot) return fetch_run<T>(sum.x, first * S, planes * S, 0);
    else return fetch_run<T>(sum.maps.x, first * S, planes * S, 0);
  }();
  const auto others = [&] {
    if constexpr (Sum::kHasPivot) return 0;
    else
      return SmallMaps<T, Sum>(sum, small, first * S, planes * S, first * grid.shape.row_bytes,
                               planes * grid.shape.row_bytes);
  }();
  finish_fetches();
  block_barrier();
#pragma unroll 1
  for (int base = 0; base < planes; base += teams) {  // as often for all lanes of a warp
    const int plane = base + team, begin = plane * S, end = plane < planes ? S : 0;
    const int64_t in_all = first + min(plane, planes - 1);
    auto terms =
        sum.template terms<1>(in_all, int(uint32_t(in_all) % uint32_t(grid.shape.channels)));
    A pivot = 0, sums[Sum::kSums] = {};
    if constexpr (Sum::kHasPivot) {
#pragma unroll 4
      for (int e = lane; e < end; e += small.lanes) pivot += widen(x.get(begin + e));
      pivot = team_sum(pivot, small.lanes) / A(S);
      terms.pivot.element[0] = pivot;
    }
#pragma unroll 4
    for (int e = lane; e < end; e += small.lanes) {
      A more[Sum::kSums];
      if constexpr (Sum::kHasPivot) sum.add(terms, 0, widen(x.get(begin + e)), more);
      else others.compute(sum, terms, x, begin + e, e, plane * grid.shape.row_bytes, more);
#pragma unroll
      for (int s = 0; s < Sum::kSums; ++s) sums[s] += more[s];
    }
    double found[Sum::kSums];
#pragma unroll
    for (int s = 0; s < Sum::kSums; ++s) found[s] = team_sum(double(sums[s]), small.lanes);
    sum.finish(pivot, S, found);
    if (lane != 0 || plane >= planes) continue;
#pragma unroll
    for (int s = 0; s < Sum::kSums; ++s) totals.put(s, 0, grid.all_planes, in_all, found[s]);
  }
}

}  // namespace eca::cuda
