// dweight from dz and mean of all samples, (samples, channels) each: a few megabytes where the maps
// have hundreds. A kernel of its own: what a block adds up behind its last store keeps its place on
// the multiprocessor, and the sums of thousands of blocks by a last one take longer than this.
#pragma once

#include "gates.h"

namespace eca::cuda {

constexpr int kTapsAtOnce = 8;

// One set of taps. A run is 256 channels of a sample, one for each thread. A block asks for
// kDweightRuns of them at once, and the last block to arrive adds the blocks, in the order of their
// numbers.
template <class T>
__global__ void __launch_bounds__(kDweightThreads) sum_shared_dweight(Backward b, Workspace work) {
  using A = Accumulator<T>;
  const Problem& p = b.problem;
  constexpr int R = kDweightRuns, kWarps = kDweightThreads / 32;
  const int channels = int(p.channels), radius = int(p.kernel_size / 2), k = int(p.kernel_size);
  const int runs = (channels + kDweightThreads - 1) / kDweightThreads;  // of a sample
  const int all = int(p.samples) * runs, blocks = int(block_count());
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const auto flag = shared_array<uint32_t>(0, 1);
  const auto sums = shared_array<A>(16, kWarps * kTapsAtOnce);
  A* const partials = static_cast<A*>(work.dweight);  // (k, blocks)
  for (int first = 0; first < k; first += kTapsAtOnce) {
    const int taps = min(kTapsAtOnce, k - first);
    A sum[kTapsAtOnce] = {};
    for (int base = int(block_index()) * R; base < all; base += blocks * R) {
      A dz[R], means[R][kTapsAtOnce];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int run = base + r, sample = run / runs;
        const int c = (run - sample * runs) * kDweightThreads + thread_index();
        const bool there = run < all && c < channels;
        const int64_t row = int64_t(sample) * channels;
        dz[r] = there ? value_at(static_cast<const A*>(work.dz) + row + c) : A(0);
#pragma unroll
        for (int u = 0; u < kTapsAtOnce; ++u) {
          int from = c + first + u - radius;
          if (p.circular) from += from < 0 ? channels : from >= channels ? -channels : 0;
          means[r][u] = there && u < taps && from >= 0 && from < channels
                            ? value_at(static_cast<const A*>(b.mean) + row + from)
                            : A(0);
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int u = 0; u < kTapsAtOnce; ++u) sum[u] += dz[r] * means[r][u];
    }
#pragma unroll
    for (int u = 0; u < kTapsAtOnce; ++u) {
      if (u >= taps) continue;
      sum[u] = warp_sum(sum[u]);
      if (lane == 0) sums.set(warp * kTapsAtOnce + u, sum[u]);
    }
    block_barrier();
    if (thread_index() < taps) {
      A total = 0;
      for (int w = 0; w < kWarps; ++w) total += sums.get(w * kTapsAtOnce + thread_index());
      if (blocks == 1) store_dweight<T>(p, b.dweight, first + thread_index(), total);
      else put(partials + int64_t(first + thread_index()) * blocks + block_index(), total);
    }
    block_barrier();
  }
  if (blocks == 1 || !last_to_arrive(work.counters.dweight(0), blocks, flag)) return;
  for (int j = warp; j < k; j += kWarps) {
    A sum = 0;
#pragma unroll 8
    for (int i = lane; i < blocks; i += 32)
      sum += load_from_other_block(partials + int64_t(j) * blocks + i);
    sum = warp_sum(sum);
    if (lane == 0) store_dweight<T>(p, b.dweight, j, sum);
  }
}

// Taps of each channel's own: a block for 32 channels and one tap, whose warps share the samples.
template <class T>
__global__ void __launch_bounds__(kDweightThreads) sum_own_dweight(Backward b, Workspace work) {
  using A = Accumulator<T>;
  const Problem& p = b.problem;
  constexpr int kWarps = kDweightThreads / 32;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int64_t j = block_index() % p.kernel_size, c = block_index() / p.kernel_size * 32 + lane;
  const auto sums = shared_array<A>(0, kDweightThreads);
  A sum = 0;
  if (c < p.channels) {
    const A* const dz = static_cast<const A*>(work.dz) + c;
    const A* const mean = static_cast<const A*>(b.mean);
#pragma unroll 4
    for (int64_t n = warp; n < p.samples; n += kWarps)
      sum += value_at(dz + n * p.channels) * mean_under_tap(p, mean + n * p.channels, c, j);
  }
  sums.set(thread_index(), sum);
  block_barrier();
  if (warp > 0 || c >= p.channels) return;
  for (int w = 1; w < kWarps; ++w) sum += sums.get(w * 32 + lane);
  store_dweight<T>(p, b.dweight, c * p.kernel_size + j, sum);
}

}  // namespace eca::cuda
