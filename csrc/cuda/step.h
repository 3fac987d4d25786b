// What becomes of an element besides its sum and its gate. The kernels are templates over a step:
// an operation that is fused with the rescaling is another type like Rescale, not another kernel. A
// step may hold maps and numbers of its own, such as the identity of a residual block. It is asked
// for three things, each with the part of the maps that a thread has:
//
//   forward(y, part)     an object whose put(i, x, gate) stores what becomes of vector i of x
//   gradient(part)       a function (i, dy) that turns vector i of the gradient of the result into
//                        that of gate * x
//   backward(dx, part)   an object whose put(i, g, gate, shift) stores what becomes of such a
//                        gradient
//
// The gradient is made once before each use, and only of vectors that the part has. A part is a
// Row, a Column, a Run, TileElements of stream_runs.h, or a part of two_pass.h. Its cursor(map)
// says where a thread's vectors lie in any map of x's shape, which may have strides of its own. Of
// maps that a step stores, each must lie within its lines of 16 bytes as the result does.
//
// A step with kWholeTiles instead stores all vectors of a thread, and makes gates and their
// gradients of other numbers than sums of x and of dy * x: BlockTailStep of block_tail.h, and
// BlockTailGradientStep of block_tail_gradients.h, which also takes its own sums.
#pragma once

#include "../eca.h"
#include "device.h"

namespace eca::cuda {

// A thread's vectors in a map: from `first` on, so many elements from one to the next.
template <class T, class Distance>
struct Cursor {
  T* first;
  Distance distance;

  __device__ T* at(int i) const { return first + i * distance; }
};

// use(i, load(i)) for i = first, first + step, ... below end. kAtOnce of them are asked for before
// the first is used.
template <int kAtOnce, class Load, class Use>
__device__ inline void in_batches(int first, int end, int step, Load load, Use use) {
#pragma unroll 1
  for (int i = first; i < end; i += kAtOnce * step) {
    decltype(load(i)) some[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      some[u] = {};
      if (i + u * step < end) some[u] = load(i + u * step);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (i + u * step < end) use(i + u * step, some[u]);
  }
}

// Consecutive elements that several threads share: vectors that begin at whole lines of one map,
// and single elements before and after them. Other maps may lie differently within their lines.
template <class T>
struct Stretch {
  static constexpr int V = kVector<T>;
  int head, vectors, count;

  __device__ Stretch(int count, const T* address)
      : head(min(count, (V - place_in_line(address)) % V)), vectors((count - head) / V),
        count(count) {}

  // use(i, width, load(i, width)) for each single element and each vector of thread `thread` of
  // `threads`.
  template <int kAtOnce, class Load, class Use>
  __device__ void for_each(int thread, int threads, Load load, Use use) const {
    constexpr std::integral_constant<int, 1> single{};
    constexpr std::integral_constant<int, V> vector{};
    const auto element = [&](int e) { return e < head ? e : e + vectors * V; };
    in_batches<1>(
        thread, count - vectors * V, threads, [&](int e) { return load(element(e), single); },
        [&](int e, const auto& some) { use(element(e), single, some); });
    in_batches<kAtOnce>(
        thread, vectors, threads, [&](int v) { return load(head + v * V, vector); },
        [&](int v, const auto& some) { use(head + v * V, vector, some); });
  }

  // Whether the vectors begin at whole lines of another map too.
  __device__ bool fits(const T* address) const { return place_in_line(address + head) == 0; }
};

// V elements from any address, or from a multiple of the vector's size.
template <bool kAligned, int V, class T>
__device__ inline Vector<T, V> load_from(const T* from) {
  if constexpr (kAligned || V == 1) return load<V>(from);
  else return load_across<V>(from);
}

// body(std::true_type()) or body(std::false_type()): what a warp decides once is no branch between
// its loads.
template <class Body>
__device__ inline void with_choice(bool choice, Body body) {
  if (choice) body(std::true_type{});
  else body(std::false_type{});
}

template <class T, int V>
__device__ inline Vector<T, V> rescaled(const Vector<T, V>& x,
                                        const Vector<Accumulator<T>, V>& gate) {
  Vector<Accumulator<T>, V> y = widen(x);
#pragma unroll
  for (int i = 0; i < V; ++i) y.element[i] *= gate.element[i];
  return narrow<T>(y);
}

template <class T, int V>
__device__ inline Vector<T, V> rescaled(const Vector<T, V>& x,
                                        const Vector<Accumulator<T>, V>& gate,
                                        const Vector<Accumulator<T>, V>& shift) {
  Vector<Accumulator<T>, V> y = widen(x);
#pragma unroll
  for (int i = 0; i < V; ++i) y.element[i] = gate.element[i] * y.element[i] + shift.element[i];
  return narrow<T>(y);
}

// Of steps that take vectors one by one, and make gates of the means of x.
struct StepByVectors {
  static constexpr bool kWholeTiles = false;

  // What the taps take for a channel.
  template <class A>
  __device__ A pooled(int64_t, int, bool, A mean) const {
    return mean;
  }
};

// y = gate * x
struct Rescale : StepByVectors {
  template <class Where>
  struct Result {
    Where y;

    template <class T, int V, class A>
    __device__ void put(int i, const Vector<T, V>& x, const Vector<A, V>& gate) const {
      store(y.at(i), rescaled(x, gate));
    }
  };

  struct Unchanged {
    template <class T, int V>
    __device__ void operator()(int, Vector<T, V>&) const {}
  };

  template <class Where>
  struct Gradients {
    Where dx;

    template <class T, int V, class A>
    __device__ void put(int i, const Vector<T, V>& g, const Vector<A, V>& gate,
                        const Vector<A, V>& shift) const {
      store(dx.at(i), rescaled(g, gate, shift));
    }
  };

  template <class Part>
  __device__ auto forward(const Map& y, const Part& part) const {
    return Result<decltype(part.cursor(y))>{part.cursor(y)};
  }

  template <class Part>
  __device__ Unchanged gradient(const Part&) const {
    return {};
  }

  template <class Part>
  __device__ auto backward(const Map& dx, const Part& part) const {
    return Gradients<decltype(part.cursor(dx))>{part.cursor(dx)};
  }
};

// ---- what is summed ----

// Terms of the sums of a channel, from x and from the gradient of gate * x. kSums numbers are
// summed at a time; a sum may do without the gradient.
struct SumOfX {
  static constexpr int kSums = 1;
  static constexpr bool kTakesGradient = false;

  template <class A, int V>
  __device__ static void terms(const Vector<A, V>& x, const Vector<A, V>&,
                               Vector<A, V> (&terms)[kSums]) {
    terms[0] = x;
  }
};

struct SumOfProducts {
  static constexpr int kSums = 1;
  static constexpr bool kTakesGradient = true;

  template <class A, int V>
  __device__ static void terms(const Vector<A, V>& x, const Vector<A, V>& g,
                               Vector<A, V> (&terms)[kSums]) {
#pragma unroll
    for (int e = 0; e < V; ++e) terms[0].element[e] = g.element[e] * x.element[e];
  }
};

}  // namespace eca::cuda
