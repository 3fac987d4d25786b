// Sums of a residual block's tail for small planes, and for those that are no whole vectors: a block
// copies some planes to shared memory as one run of whole vectors, and a team of threads adds up
// each plane there.
#pragma once

#include "tail_sums.h"

namespace eca::cuda {

template <class T>
__device__ inline Shared<T> fetch_run(const Map& map, int64_t first, int count, int at) {
  constexpr int V = kVector<T>;
  if (!map.data) return shared_array<T>(0, 0);
  const auto run = shared_array<T>(at, count);
#pragma unroll 4
  for (int i = thread_index() * V; i < count; i += kTailThreads * V)
    run.template fetch<V>(i, static_cast<const T*>(map.data) + first + i);
  return run;
}

// A block's planes of what is summed.
template <class T>
struct SmallMaps {
  using A = Accumulator<T>;
  SummedMaps from;
  Shared<T> x, dy, identity;
  Shared<uint8_t> mask;

  __device__ SmallMaps(const SummedMaps& maps, const TailSmallGrid& at, int64_t first, int count,
                       int64_t first_byte, int bytes)
      : from(maps), x(fetch_run<T>(maps.x, first, count, 0)),
        dy(fetch_run<T>(maps.dy, first, count, at.dy)),
        identity(fetch_run<T>(maps.identity, first, count, at.identity)),
        mask(shared_array<uint8_t>(maps.mask ? at.mask : 0, maps.mask ? bytes : 0)) {
    if (maps.mask)
      for (int i = thread_index(); i < bytes; i += kTailThreads)
        mask.set(i, value_at(maps.mask + first_byte + i));
  }

  // Element i of the run, element e of its plane, whose bits begin with byte `first`.
  template <class Sum, class Terms>
  __device__ void compute(const Sum& sum, const Terms& terms, int i, int e, int first,
                          A (&more)[Sum::kSums]) const {
    const uint32_t bits = from.mask ? mask.get(first + e / 8) >> e % 8 : 0;
    sum.add(terms, 0, widen(x.get(i)), from.dy.data ? widen(dy.get(i)) : A(0),
            from.identity.data ? widen(identity.get(i)) : A(0), bits, more);
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
  const SmallMaps<T> maps(sum.summed(), small, first * S, planes * S, first * grid.shape.row_bytes,
                          planes * grid.shape.row_bytes);
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
      for (int e = lane; e < end; e += small.lanes) pivot += widen(maps.x.get(begin + e));
      pivot = team_sum(pivot, small.lanes) / A(S);
      terms.pivot.element[0] = pivot;
    }
#pragma unroll 4
    for (int e = lane; e < end; e += small.lanes) {
      A more[Sum::kSums];
      maps.compute(sum, terms, begin + e, e, plane * grid.shape.row_bytes, more);
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
