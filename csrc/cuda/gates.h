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

}  // namespace eca::cuda
