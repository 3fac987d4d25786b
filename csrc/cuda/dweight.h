// dweight from dz and mean of all samples, (samples, channels) each: a few megabytes where the maps
// have hundreds. It is a separate kernel. A block that added sums up after its last store would
// still occupy its multiprocessor, and one last block would take longer to add thousands of sums.
#pragma once

#include "gates.h"

namespace eca::cuda {

constexpr int kTapsAtOnce = 8;

// Sums kTapsAtOnce numbers over the lanes of a warp: the sum of number j is in lane 4 * j. Each
// step halves the numbers of a lane: 9 shuffles, where one number after the other takes 40.
template <class A>
__device__ inline A warp_sums(A (&numbers)[kTapsAtOnce]) {
  static_assert(kTapsAtOnce == 8);
  const int lane = thread_index() % 32;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane & (4 * half);
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A kept = upper ? numbers[i + half] : numbers[i];
      const A given = upper ? numbers[i] : numbers[i + half];
      numbers[i] = kept + shuffle_xor(given, 4 * half);
    }
  }
  numbers[0] += shuffle_xor(numbers[0], 2);
  return numbers[0] + shuffle_xor(numbers[0], 1);
}

// One set of taps. A run is 256 channels of a sample, one for each thread. A block asks for
// kDweightRuns runs at once, and the last block to arrive adds the blocks in the order of their
// numbers. The code is short: a kernel of a few microseconds fetches each instruction for the first
// time, and 770 of them took longer than the loads.
template <class T>
__global__ void __launch_bounds__(kDweightThreads) sum_shared_dweight(Backward b, Workspace work) {
  using A = Accumulator<T>;
  const Problem& p = b.problem;
  constexpr int R = kDweightRuns, kWarps = kDweightThreads / 32;
  constexpr int kWindow = kDweightThreads + kTapsAtOnce;  // means that a run's taps reach
  const int channels = int(p.channels), radius = int(p.kernel_size / 2), k = int(p.kernel_size);
  const int runs = (channels + kDweightThreads - 1) / kDweightThreads;  // of a sample
  const int all = int(p.samples) * runs, blocks = int(block_count());
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const auto flag = shared_array<uint32_t>(0, 1);
  const auto sums = shared_array<A>(16, kWarps * kTapsAtOnce);
  const auto means = shared_array<A>(16 + kWarps * kTapsAtOnce * int(sizeof(A)), R * kWindow);
  A* const partials = static_cast<A*>(work.dweight);  // (k, blocks)
  for (int first = 0; first < k; first += kTapsAtOnce) {
    const int taps = min(kTapsAtOnce, k - first);
    A sum[kTapsAtOnce] = {};
    for (int base = int(block_index()) * R; base < all; base += blocks * R) {
      A dz[R], near[R], far[R];
      int sample = base / runs, start = (base - sample * runs) * kDweightThreads;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const A* const row = static_cast<const A*>(b.mean) + int64_t(sample) * channels;
        const bool there = base + r < all;
        const auto mean_at = [&](int c) {
          if (p.circular) c += c < 0 ? channels : c >= channels ? -channels : 0;
          return there && c >= 0 && c < channels ? value_at(row + c) : A(0);
        };
        const int c = start + thread_index();
        dz[r] = there && c < channels
                    ? value_at(static_cast<const A*>(work.dz) + int64_t(sample) * channels + c)
                    : A(0);
        near[r] = mean_at(c + first - radius);
        far[r] =
            thread_index() < kTapsAtOnce ? mean_at(c + first - radius + kDweightThreads) : A(0);
        start += kDweightThreads;
        if (start >= channels) start = 0, ++sample;
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int i = r * kWindow + thread_index();
        means.set(i, near[r]);
        if (thread_index() < kTapsAtOnce) means.set(i + kDweightThreads, far[r]);
      }
      block_barrier();
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int u = 0; u < kTapsAtOnce; ++u)
          sum[u] += dz[r] * means.get(r * kWindow + thread_index() + u);
      block_barrier();
    }
    const A of_warp = warp_sums(sum);
    if (lane % 4 == 0) sums.set(warp * kTapsAtOnce + lane / 4, of_warp);
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
#pragma unroll 1
    for (int i = lane; i < blocks; i += 32)
      sum += load_from_other_block(partials + int64_t(j) * blocks + i);
    sum = warp_sum(sum);
    if (lane == 0) store_dweight<T>(p, b.dweight, j, sum);
  }
}

// Separate taps per channel. A block has 32 channels and one tap, and its warps share the samples.
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
