// What a kernel gets: the contract's structs, the plan's tiling, and memory to work in.
#pragma once

#include "../plan.h"
#include "device.h"

namespace eca::cuda {

// Words through which the blocks of one launch of K and S meet: zeros before the launch, and again
// after it.
struct Counters {
  uint32_t* words;

  // How many parts of a sample have been summed. After these words of all
  // samples come as many that say whether the gates are ready.
  __device__ uint32_t* arrived(int64_t sample) const { return words + sample; }
};

// Device memory for one call, of Plan::workspace bytes in all. A is float or double.
struct Workspace {
  Counters counters;
  void* sums;     // (parts, samples, channels) for C, (samples, parts, channels) for K and S, and
                  // twice that for K of a tail, backward
  void* dz;       // C, and with taps of each channel: (samples, channels)
  void* shift;    // C, K and S, backward but for tails: dm / S, (samples, channels)
  void* dweight;  // with one set of taps: (k, parts)
  void* mean;     // C, K and S, inference: (samples, channels)
  void* gate;     // C, K and S, inference: (samples, channels)
  int64_t parts;  // of dweight
};

template <class A>
__device__ inline A value_at(const A* from) {
  return load<1>(from).element[0];
}

template <class A>
__device__ inline void put(A* to, A value) {
  store(to, Vector<A, 1>{value});
}

// The taps, in whichever dtype they came.
template <class T>
class Taps {
 public:
  using A = Accumulator<T>;

  __device__ Taps(const Problem& problem, const void* weight)
      : weight_(weight), dtype_(problem.taps_dtype), size_(problem.kernel_size),
        row_stride_(problem.taps_per_channel ? problem.kernel_size : 0) {}

  __device__ int64_t size() const { return size_; }

  // Tap j of the row of taps that belongs to a channel.
  __device__ A get(int64_t channel, int64_t j) const { return value_of(load(channel, j)); }

  // The same in two steps: a thread waits for memory in the second.
  struct Loaded {
    float single;
    T own;  // of the maps' dtype
  };
  __device__ Loaded load(int64_t channel, int64_t j) const {
    const int64_t i = channel * row_stride_ + j;
    Loaded tap;  // to set what is not used would wait for what is
    if (dtype_ == Dtype::kFloat32) tap.single = value_at(static_cast<const float*>(weight_) + i);
    else tap.own = value_at(static_cast<const T*>(weight_) + i);
    return tap;
  }
  __device__ A value_of(const Loaded& tap) const {
    return dtype_ == Dtype::kFloat32 ? A(tap.single) : widen(tap.own);
  }

 private:
  const void* weight_;  // (1 or channels, k)
  Dtype dtype_;
  int64_t size_, row_stride_;
};

// Stores an element of dweight, which has the dtype of the taps.
template <class T>
__device__ void store_dweight(const Problem& problem, void* dweight, int64_t i, Accumulator<T> v) {
  if (problem.taps_dtype == Dtype::kFloat32) put(static_cast<float*>(dweight) + i, float(v));
  else put(static_cast<T*>(dweight) + i, narrow<T>(v));
}

}  // namespace eca::cuda
