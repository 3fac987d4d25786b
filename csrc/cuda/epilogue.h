// What is done to an element besides its sum and its gate. The kernels are templates over this: an
// operation fused with the rescaling is another type here, not another kernel.
#pragma once

#include "device.h"

namespace eca::cuda {

// y = gate * x
struct Rescale {
  // V elements of y from those of x and their gates.
  template <class T, int V>
  __device__ Vector<T, V> forward(const Vector<T, V>& x,
                                  const Vector<Accumulator<T>, V>& gate) const {
    Vector<Accumulator<T>, V> y = widen(x);
#pragma unroll
    for (int i = 0; i < V; ++i) y.element[i] *= gate.element[i];
    return narrow<T>(y);
  }

  // The gradient of gate * x, from that of y.
  template <class T, int V>
  __device__ Vector<Accumulator<T>, V> gradient(const Vector<T, V>& dy) const {
    return widen(dy);
  }

  // The same for one element.
  template <class T>
  __device__ Accumulator<T> gradient(T dy) const {
    return widen(dy);
  }
};

}  // namespace eca::cuda
