// What the passes of attention after an activation do with an element, see eca.h: passes of the
// kernels of tail_apply.h and sums of those of tail_sums.h and tail_small.h.
#pragma once

#include "tail_sums.h"

namespace eca::cuda {

template <class A>
__device__ inline ValueAndSlope<A> hard_swish(A v) {
  const A from = v + A(3), above = from < A(0) ? A(0) : from;  // NaN is kept
  const A between = v * A(1.0 / 3) + A(0.5), upper = v < A(3) ? between : A(1);
  return {v * (above > A(6) ? A(6) : above) * A(1.0 / 6), v <= A(-3) ? A(0) : upper};
}

// Of v = p * (x - centre) + q, for W channels.
template <class A, int W>
struct ActivatedTerms {
  Vector<A, W> p, q, centre;
};

// What a pass reads, with kGradient also dy. With kSmooth the activation may be any, else not SiLU or
// GELU, which take more registers than the others.
template <class T, bool kSmooth, bool kGradient>
struct ActivatedMaps {
  using A = Accumulator<T>;
  Map x, dy;
  const void *p, *q, *centre;
  Activation activation;

  template <int V, bool = false>
  struct Read {
    Packed<T, V> x, dy;

    __device__ void pack() {
      forget(x);
      if constexpr (kGradient) forget(dy);
    }
    __device__ A gradient(int e) const {
      if constexpr (kGradient) return dy.wide(e);
      else return 0;
    }
  };

  template <int V, bool kAcross = false>
  __device__ Read<V, kAcross> read(bool there, const TailShape&, const TailPlace& at) const {
    Read<V, kAcross> found;
    found.x = load_if<V>(there, at.in<const T>(x));
    if constexpr (kGradient) found.dy = load_if<V>(there, at.in<const T>(dy));
    return found;
  }

  // There is no mask.
  template <class Read>
  __device__ uint32_t bits(const Read&, const TailShape&, const TailPlace&, int = 0) const {
    return 0;
  }

  template <int W>
  __device__ ActivatedTerms<A, W> terms_of(int channel) const {
    return {coefficients<A, W>(p, channel), coefficients<A, W>(q, channel),
            coefficients<A, W>(centre, channel)};
  }

  // act(v) and act'(v) for an x that counts from its centre.
  template <int W>
  __device__ ValueAndSlope<A> activated(const ActivatedTerms<A, W>& k, int w, A from_centre) const {
    const A v = k.p.element[w] * from_centre + k.q.element[w];
    if constexpr (kSmooth)
      if (activation == Activation::kSilu || activation == Activation::kGelu)
        return smooth(activation, v);
    if (activation == Activation::kHardSwish) return hard_swish(v);
    const bool flat = activation == Activation::kRelu && v <= A(0);  // NaN is kept
    return {flat ? A(0) : v, flat ? A(0) : A(1)};
  }

  // dz * act'(v). Where an activation is flat, an infinite dz must not become NaN.
  __device__ A sloped(A dz, A slope) const {
    const bool may_be_flat =
        activation == Activation::kRelu || activation == Activation::kHardSwish;
    return may_be_flat && slope == A(0) ? A(0) : dz * slope;
  }
};

// ---- passes that write ----

// y = gate * act(v)
template <class T, bool kSmooth>
struct GatedForward : ActivatedMaps<T, kSmooth, false> {
  using A = Accumulator<T>;
  static constexpr int kResults = 1;
  static constexpr int kFlatBlocks = 4, kColumnsAtOnce = 4;
  static constexpr uint8_t* mask = nullptr;
  const void* gate;
  Map y;

  template <int W>
  struct Terms {
    ActivatedTerms<A, W> v;
    Vector<A, W> gate;
  };

  template <int W>
  __device__ Terms<W> terms(int64_t plane, int channel) const {
    return {this->template terms_of<W>(channel), coefficients<A, W>(gate, plane)};
  }

  template <class Read, int W>
  __device__ bool compute(const Terms<W>& k, int w, const Read& from, int e, uint32_t,
                          A (&results)[kResults]) const {
    const A x = from.x.wide(e) - k.v.centre.element[w];
    results[0] = k.gate.element[w] * this->activated(k.v, w, x).value;
    return false;
  }

  template <int V>
  __device__ void store(const TailPlace& at, const Packed<T, V> (&results)[kResults]) const {
    cuda::store(at.in<T>(y), results[0].vector());
  }
};

// dx = p * (gate * dy + shift) * act'(v) + slope * (x - centre) + offset
template <class T, bool kSmooth>
struct GatedBackward : ActivatedMaps<T, kSmooth, true> {
  using A = Accumulator<T>;
  static constexpr int kResults = 1;
  static constexpr int kFlatBlocks = 3, kColumnsAtOnce = kSmooth ? 2 : 4;
  static constexpr uint8_t* mask = nullptr;
  const void *gate, *shift, *slope, *offset;  // see GatedGradients
  Map dx;

  template <int W>
  struct Terms {
    ActivatedTerms<A, W> v;
    Vector<A, W> gate, shift, slope, offset;
  };

  template <int W>
  __device__ Terms<W> terms(int64_t plane, int channel) const {
    return {this->template terms_of<W>(channel), coefficients<A, W>(gate, plane),
            coefficients<A, W>(shift, plane), coefficients_if<A, W>(slope, slope, channel),
            coefficients_if<A, W>(slope, offset, channel)};
  }

  template <class Read, int W>
  __device__ bool compute(const Terms<W>& k, int w, const Read& from, int e, uint32_t,
                          A (&results)[kResults]) const {
    const A x = from.x.wide(e) - k.v.centre.element[w],
            dz = k.gate.element[w] * from.dy.wide(e) + k.shift.element[w];
    results[0] = k.v.p.element[w] * this->sloped(dz, this->activated(k.v, w, x).slope);
    if (slope) results[0] += k.slope.element[w] * x + k.offset.element[w];
    return false;
  }

  template <int V>
  __device__ void store(const TailPlace& at, const Packed<T, V> (&results)[kResults]) const {
    cuda::store(at.in<T>(dx), results[0].vector());
  }
};

// ---- sums ----

// Those of z, or with dy those of ActivatedSums: all five, as they cost no access to memory.
template <class T, bool kSmooth, bool kGradient>
struct ActivatedSum : ActivatedMaps<T, kSmooth, kGradient> {
  using A = Accumulator<T>;
  using Maps = ActivatedMaps<T, kSmooth, kGradient>;
  static constexpr int kSums = kGradient ? 5 : 1;
  static constexpr int kChannels = kGradient ? 2 : 4;
  static constexpr bool kZerosAddNothing = false;  // act(q) need not be zero
  static constexpr bool kHasPivot = false;

  template <int V>
  using Read = typename Maps::template Read<V>;
  template <int W>
  using Terms = ActivatedTerms<A, W>;

  template <int W>
  __device__ Terms<W> terms(int64_t, int channel) const {
    return this->template terms_of<W>(channel);
  }

  template <int V, int W>
  __device__ void compute(const Terms<W>& k, int w, const Read<V>& from, int e, uint32_t,
                          A (&terms)[kSums]) const {
    add(k, w, from.x.wide(e), from.gradient(e), 0, 0, terms);
  }

  __device__ SummedMaps summed() const { return {this->x, this->dy, {}, nullptr}; }

  template <int W>
  __device__ void add(const Terms<W>& k, int w, A x, A dy, A, uint32_t, A (&terms)[kSums]) const {
    const A from_centre = x - k.centre.element[w];
    const ValueAndSlope<A> at = this->activated(k, w, from_centre);
    if constexpr (kGradient) {
      const A g = this->sloped(dy, at.slope);
      terms[0] = dy * at.value;
      terms[1] = g;
      terms[2] = g * from_centre;
      terms[3] = at.slope;
      terms[4] = at.slope * from_centre;
    } else {
      terms[0] = at.value;
    }
  }

  __device__ static void finish(double, double, double (&)[kSums]) {}
};

}  // namespace eca::cuda
