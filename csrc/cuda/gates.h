// From sums to gates, and from the gradients of gates to those of means and taps: a few thousand
// numbers, where the maps have millions.
#pragma once

#include "arguments.h"

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

// The mean that tap j of channel c is multiplied with, 0 beyond the ends.
template <class A>
__device__ inline A mean_under_tap(const Problem& problem, const A* means, int64_t c, int64_t j) {
  const int64_t from =
      channel_at(c + j - problem.kernel_size / 2, problem.channels, problem.circular);
  return from < 0 ? A(0) : value_at(means + from);
}

template <class A>
__device__ inline A warp_sum(A value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

}  // namespace eca::cuda
