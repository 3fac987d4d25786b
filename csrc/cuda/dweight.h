// dweight: the sum over samples and channels of dz times the mean under each tap.
//
//   one set of taps       whoever makes dz of a tile also adds up the tile's part of dweight; one
//                         more kernel adds the parts, in the order of their numbers and not of
//                         their arrival: every run gives the same bits
//   taps of each channel  the kernels leave dz, and one more kernel sums it over the samples
//
// It is one more kernel because a last block that adds thousands of parts would start when all
// others have ended, and all of them would first have to count themselves (TUNING.md).
#pragma once

#include "gates.h"

namespace eca::cuda {

// Of the `own` channels from `begin` on of a sample: dz, or their part of dweight. dz_of(c) is that
// of channel begin + c, mean_under(c, j) the mean under its tap j. By `warps` warps; a warp has
// eight taps at a time, of four channels.
template <class T, class DzOf, class MeanUnder>
__device__ inline void leave_dweight(const Backward& b, const Workspace& work, int64_t sample,
                                     int64_t begin, int own, int64_t part, int warp, int warps,
                                     DzOf dz_of, MeanUnder mean_under) {
  using A = Accumulator<T>;
  constexpr int kTaps = 8, kChannels = 32 / kTaps;
  const Problem& problem = b.problem;
  const int lane = thread_index() % 32, k = int(problem.kernel_size);
  if (!b.dweight) return;
  if (problem.taps_per_channel) {
    A* const dz = static_cast<A*>(work.dz) + sample * problem.channels + begin;
    for (int c = warp * 32 + lane; c < own; c += warps * 32) put(dz + c, dz_of(c));
    return;
  }
#pragma unroll 1
  for (int first = warp * kTaps; first < k; first += warps * kTaps) {
    const int j = first + lane / kChannels, tap = min(j, k - 1);
    A sum = 0;
#pragma unroll 4
    for (int c = lane % kChannels; c < own; c += kChannels) sum += dz_of(c) * mean_under(c, tap);
    for (int mask = kChannels / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane % kChannels == 0 && j < k)
      put(static_cast<A*>(work.dweight) + j * work.parts + part, sum);
  }
}

// The parts of dweight from dz (samples, channels). A warp has the part of a few channels.
template <class T>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    sum_dweight_parts(Backward b, Workspace work) {
  using A = Accumulator<T>;
  const Problem& problem = b.problem;
  const int64_t part = block_index() * (thread_count() / 32) + thread_index() / 32;
  const int64_t tiles = (problem.channels + kDweightTile - 1) / kDweightTile;
  const int64_t sample = part / tiles, begin = part % tiles * kDweightTile;
  if (sample >= problem.samples) return;
  const int own = int(min(int64_t(kDweightTile), problem.channels - begin));
  const A* const dz = static_cast<const A*>(work.dz) + sample * problem.channels + begin;
  const A* const means = static_cast<const A*>(b.mean) + sample * problem.channels;
  leave_dweight<T>(
      b, work, sample, begin, own, part, 0, 1, [&](int c) { return value_at(dz + c); },
      [&](int c, int j) { return mean_under_tap(problem, means, begin + c, j); });
}

// dweight (1, k) from its parts (k, parts). A block has a tap.
template <class T>
__global__ void __launch_bounds__(kDweightThreads) add_dweight_parts(Backward b, Workspace work) {
  using A = Accumulator<T>;
  constexpr int kWarps = kDweightThreads / 32, kAtOnce = 4;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const A* const parts = static_cast<const A*>(work.dweight) + block_index() * work.parts;
  A sum = 0;
#pragma unroll 1
  for (int64_t first = thread_index(); first < work.parts; first += kAtOnce * kDweightThreads) {
    A some[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t i = first + u * kDweightThreads;
      some[u] = i < work.parts ? value_at(parts + i) : A(0);
    }
    sum += (some[0] + some[1]) + (some[2] + some[3]);
  }
  const auto of_warps = shared_array<A>(0, kWarps);
  sum = warp_sum(sum);
  if (lane == 0) of_warps.set(warp, sum);
  block_barrier();
  if (warp > 0) return;
  sum = warp_sum(lane < kWarps ? of_warps.get(lane) : A(0));
  if (lane == 0) store_dweight<T>(b.problem, b.dweight, block_index(), sum);
}

// dweight (channels, k) from dz. A block has 32 channels and one tap, and its warps share the
// samples.
template <class T>
__global__ void __launch_bounds__(kOwnDweightThreads) sum_own_dweight(Backward b, Workspace work) {
  using A = Accumulator<T>;
  const Problem& problem = b.problem;
  constexpr int kWarps = kOwnDweightThreads / 32;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int64_t j = block_index() % problem.kernel_size,
                c = block_index() / problem.kernel_size * 32 + lane;
  const auto sums = shared_array<A>(0, kOwnDweightThreads);
  A sum = 0;
  if (c < problem.channels) {
    const A* const dz = static_cast<const A*>(work.dz) + c;
    const A* const mean = static_cast<const A*>(b.mean);
#pragma unroll 4
    for (int64_t n = warp; n < problem.samples; n += kWarps)
      sum += value_at(dz + n * problem.channels) *
             mean_under_tap(problem, mean + n * problem.channels, c, j);
  }
  sums.set(thread_index(), sum);
  block_barrier();
  if (warp > 0 || c >= problem.channels) return;
  for (int w = 1; w < kWarps; ++w) sum += sums.get(w * 32 + lane);
  store_dweight<T>(problem, b.dweight, c * problem.kernel_size + j, sum);
}

}  // namespace eca::cuda
