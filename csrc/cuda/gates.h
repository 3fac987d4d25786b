// From sums to gates, and from the gradients of gates to those of means and taps: a few thousand
// numbers, where the maps have millions.
#pragma once

#include "call.h"

namespace eca::cuda {

template <class A>
__device__ inline A sigmoid(A z) {
  // The exponential of a negative number does not overflow, and small gates keep their digits.
  const A e = exponential(z < 0 ? z : -z);
  return (z < 0 ? e : A(1)) / (A(1) + e);
}

// The channel at position c, which may lie beyond the first or last; -1 where the padding is zero.
__device__ inline int64_t channel_at(int64_t c, int64_t channels, bool circular) {
  if (c >= 0 && c < channels) return c;
  if (!circular) return -1;
  return c < 0 ? c + channels : c - channels;
}

// A window on the channels of a map: the `own` channels from `begin` on, and `pad` on either side.
// Number i of it is channel begin - pad + i.
struct Window {
  int64_t channels, begin;
  int own, pad;
  bool circular;

  __device__ int count() const { return own + 2 * pad; }

  // The channel of number i, or -1 where there is none.
  __device__ int64_t channel(int i) const {
    return channel_at(begin - pad + i, channels, circular);
  }
};

// z of the tile's channel c: its taps times a window of the means.
template <class T, class A>
__device__ inline A convolve(const Window& w, const Taps<T>& taps, Shared<A> means, int c) {
  const int64_t radius = taps.size() / 2, shift = c + w.pad - radius;  // window number of tap 0
  const int64_t first = max(int64_t(0), -shift);
  const int64_t last = min(taps.size(), int64_t(w.count()) - shift);
  A z = 0;
#pragma unroll 1
  for (int64_t j = first; j < last; ++j) z += taps.get(w.begin + c, j) * means.get(int(shift + j));
  return z;
}

// The gradient of the mean of the tile's channel c, from a window of dz: convolve() transposed.
template <class T, class A>
__device__ inline A convolve_transposed(const Window& w, const Taps<T>& taps, Shared<A> dz, int c) {
  const int64_t radius = taps.size() / 2, shift = c + w.pad + radius;  // window number of tap 0
  const int64_t first = max(int64_t(0), shift - w.count() + 1);
  const int64_t last = min(taps.size(), shift + 1);
  A dm = 0;
#pragma unroll 1
  for (int64_t j = first; j < last; ++j) {
    const int64_t channel = w.channel(int(shift - j));
    if (channel >= 0) dm += taps.get(channel, j) * dz.get(int(shift - j));
  }
  return dm;
}

// The mean that tap j of channel c is multiplied with, 0 beyond the ends.
template <class A>
__device__ inline A mean_under_tap(const Problem& p, const A* means, int64_t c, int64_t j) {
  const int64_t from = channel_at(c + j - p.kernel_size / 2, p.channels, p.circular);
  return from < 0 ? A(0) : value_at(means + from);
}

template <class A>
__device__ inline A warp_sum(A value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// True in all threads of the last of `count` blocks to call this, which sees what the others wrote.
inline __device__ bool last_to_arrive(uint32_t* counter, int64_t count, Shared<uint32_t> flag) {
  block_barrier();
  if (thread_index() == 0) {
    const bool last = fetch_add(counter, 1) == uint32_t(count - 1);
    if (last) put(counter, 0u);
    flag.set(0, last);
  }
  block_barrier();
  return flag.get(0) != 0;
}

// The last block that contributes to dweight adds it up, in the order of the blocks' numbers and
// not of their arrival: every run gives the same bits.
//   shared taps   each block sums over its channels, into work.dweight (k, blocks); the last of all
//                 adds the blocks
//   own taps      each block writes dz, into work.dz (samples, channels); the last block of a tile
//                 of channels sums over the samples
struct DweightTile {
  int64_t sample, tile, tiles;
  int64_t begin;  // the tile's first channel
  int own;        // its channels
};

// A block's contribution from dz of the tile's channels, dz_of(c). True for the last block, which
// then calls finish_dweight(). By all threads.
template <class T, class A, class DzOf>
__device__ bool contribute_to_dweight(const Problem& p, const Workspace& work, const A* mean,
                                      const DweightTile& t, Shared<uint32_t> flag, DzOf dz_of) {
  if (p.taps_per_channel) {
    A* const dz = static_cast<A*>(work.dz) + t.sample * p.channels + t.begin;
    for (int c = thread_index(); c < t.own; c += thread_count()) put(dz + c, dz_of(c));
    return last_to_arrive(work.counters.dweight(t.tile), p.samples, flag);
  }
  const int lane = thread_index() % 32, warp = thread_index() / 32, warps = thread_count() / 32;
  const int64_t blocks = p.samples * t.tiles;
  A* const partials = static_cast<A*>(work.dweight) + t.sample * t.tiles + t.tile;
#pragma unroll 1
  for (int64_t j = warp; j < p.kernel_size; j += warps) {
    A sum = 0;
    for (int c = lane; c < t.own; c += 32)
      sum += dz_of(c) * mean_under_tap(p, mean + t.sample * p.channels, t.begin + c, j);
    sum = warp_sum(sum);
    if (lane == 0) put(partials + j * blocks, sum);
  }
  return last_to_arrive(work.counters.dweight(0), blocks, flag);
}

template <class T, class A>
__device__ void finish_dweight(const Problem& p, const Workspace& work, const A* mean,
                               void* dweight, const DweightTile& t) {
  const int64_t k = p.kernel_size;
  if (p.taps_per_channel) {
    const A* const dz = static_cast<const A*>(work.dz);
    for (int64_t i = thread_index(); i < t.own * k; i += thread_count()) {
      const int64_t c = t.begin + i / k, j = i % k;
      A sum = 0;
#pragma unroll 4
      for (int64_t n = 0; n < p.samples; ++n)
        sum += load_from_other_block(dz + n * p.channels + c) *
               mean_under_tap(p, mean + n * p.channels, c, j);
      store_dweight<T>(p, dweight, t.begin * k + i, sum);
    }
    return;
  }
  const int lane = thread_index() % 32, warp = thread_index() / 32, warps = thread_count() / 32;
  const int64_t blocks = p.samples * t.tiles;
  for (int64_t j = warp; j < k; j += warps) {
    const A* const partials = static_cast<const A*>(work.dweight) + j * blocks;
    A sum = 0;
#pragma unroll 8
    for (int64_t b = lane; b < blocks; b += 32) sum += load_from_other_block(partials + b);
    sum = warp_sum(sum);
    if (lane == 0) store_dweight<T>(p, dweight, j, sum);
  }
}

}  // namespace eca::cuda
