// The tail of a residual block, y = relu(gate * x + identity), as a step of the kernels: a second
// instance beside Rescale, which reads maps of its own, stores two, and needs two sums.
#pragma once

#include "../../../csrc/cuda/step.h"

namespace eca::cuda {

struct Tail : StepByVectors {
  Map identity, result, d_identity;  // the first forward, the others backward

  template <class Where>
  struct Result {
    Where y, identity;

    template <class T, int V, class A>
    void put(int i, const Vector<T, V>& x, const Vector<A, V>& gate) const {
      const Vector<A, V> other = widen(load_anywhere<V, T>(identity.at(i)));
      Vector<A, V> sum = widen(x);
      for (int e = 0; e < V; ++e) {
        sum.element[e] = gate.element[e] * sum.element[e] + other.element[e];
        if (sum.element[e] < 0) sum.element[e] = 0;
      }
      store(y.at(i), narrow<T>(sum));
    }
  };

  template <class Where>
  struct Masked {
    Where result;

    template <class T, int V>
    void operator()(int i, Vector<T, V>& dy) const {
      const auto y = widen(load_anywhere<V, T>(result.at(i)));
      for (int e = 0; e < V; ++e)
        if (!(y.element[e] > 0)) dy.element[e] = narrow<T>(0);
    }
  };

  template <class Where>
  struct Gradients {
    Where dx, d_identity;

    template <class T, int V, class A>
    void put(int i, const Vector<T, V>& g, const Vector<A, V>& gate,
             const Vector<A, V>& shift) const {
      store(dx.at(i), rescaled(g, gate, shift));
      store(d_identity.at(i), g);
    }
  };

  template <class Part>
  auto forward(const Map& y, const Part& part) const {
    return Result<decltype(part.cursor(y))>{part.cursor(y), part.cursor(identity)};
  }

  template <class Part>
  auto gradient(const Part& part) const {
    return Masked<decltype(part.cursor(result))>{part.cursor(result)};
  }

  template <class Part>
  auto backward(const Map& dx, const Part& part) const {
    return Gradients<decltype(part.cursor(dx))>{part.cursor(dx), part.cursor(d_identity)};
  }
};

// Of the gradient, and of its products with x: what a batch norm before the tail needs.
struct SumsOfGradient {
  static constexpr int kSums = 2;
  static constexpr bool kTakesGradient = true;

  template <class A, int V>
  static void terms(const Vector<A, V>& x, const Vector<A, V>& g, Vector<A, V> (&terms)[kSums]) {
    terms[0] = g;
    for (int e = 0; e < V; ++e) terms[1].element[e] = g.element[e] * x.element[e];
  }
};

}  // namespace eca::cuda
