// What the passes of a residual block's tail do with an element, see eca.h: the kernels are in
// tail_apply.h and tail_sums.h.
#pragma once

#include "arguments.h"
#include "gates.h"
#include "registers.h"
#include "tail_plan.h"

namespace eca::cuda {

// Elements of a row that a thread has, side by side.
struct TailPlace {
  int sample, row, offset;  // the row of the sample, and the element within it

  template <class T>
  __device__ T* in(const Map& map) const {
    return static_cast<T*>(map.data) + sample * map.sample_stride + row * map.row_stride + offset;
  }

  __device__ int channel(const TailShape& of) const { return of.planes ? row : offset; }

  // Its place in (samples, channels).
  __device__ int64_t plane(const TailShape& of) const {
    return int64_t(sample) * of.channels + channel(of);
  }

  // Of the row's first bits.
  __device__ int64_t mask_row(const TailShape& of) const {
    return (int64_t(sample) * of.rows_of_sample + row) * of.row_bytes;
  }
};

// Coefficients of W channels side by side. W is 1 for the elements of a plane, which share them.
template <class A, int W>
__device__ inline Vector<A, W> coefficients(const void* from, int64_t i) {
  return load<W>(static_cast<const A*>(from) + i);
}

// The same, or zeros for what is absent.
template <class A, int W>
__device__ inline Vector<A, W> coefficients_if(bool there, const void* from, int64_t i) {
  Vector<A, W> found{};
  if (there) found = coefficients<A, W>(from, i);
  return found;
}

// ---- activations: silu(v) = v * s(v) with the logistic function s, gelu(v) = v * Phi(v) ----

// The cumulative normal distribution Phi.
template <class A>
__device__ inline A normal_below(A v) {
  return A(0.5) + A(0.5) * error_function(v * A(0.70710678118654752));
}

// act(v) and act'(v)
template <class A>
struct ValueAndSlope {
  A value, slope;
};

template <class A>
__device__ inline ValueAndSlope<A> smooth(Activation activation, A v) {
  if (activation == Activation::kSilu) {
    const A s = sigmoid(v);
    return {v * s, s * (A(1) + v * (A(1) - s))};
  }
  const A below = normal_below(v), density = exponential(A(-0.5) * v * v) * A(0.39894228040143268);
  return {v * below, below + v * density};
}

// ---- v ----

// Of what v is made, for W channels. Where x alone counts from its centre, p and q are not loaded.
template <class A, int W>
struct TailTerms {
  Vector<A, W> p, q, centre, identity_scale, identity_centre;

  __device__ void load_centres(const TailCoefficients& from, int channel, bool x, bool identity) {
    centre = coefficients_if<A, W>(x, from.centre, channel);
    identity_centre = coefficients_if<A, W>(identity, from.identity_centre, channel);
  }

  __device__ void load_all(const TailCoefficients& from, int64_t plane, int channel,
                           bool identity) {
    load_centres(from, channel, true, identity);
    p = coefficients<A, W>(from.p, plane);
    q = coefficients<A, W>(from.q, plane);
    identity_scale = coefficients_if<A, W>(identity, from.identity_scale, channel);
  }

  __device__ A argument(int w, A x, A identity) const {
    return p.element[w] * (x - centre.element[w]) + q.element[w] +
           identity_scale.element[w] * (identity - identity_centre.element[w]);
  }
};

// ---- the gradient g = dy * act'(v) ----

// The bits of V elements, out of the bytes in which they lie. With kAcross, vectors may begin anywhere
// in a row and reach into the next one; else a byte has all bits of a vector.
template <int V, bool kAcross>
struct TailBits {
  uint32_t bytes;

  __device__ void load(bool there, const uint8_t* mask, const TailShape& shape, const TailPlace& at,
                       int64_t last) {
    const int64_t first = at.mask_row(shape) + at.offset / 8;
    bytes = load_byte_if(there, mask + first);
    if constexpr (kAcross) {
      const bool more = there && shape.length % 8 != 0;
      // At most seven elements come before a row's end: three bytes hold those on either side.
      bytes |= load_byte_if(more, mask + min(first + 1, last)) << 8 |
               load_byte_if(more, mask + min(first + 2, last)) << 16;
    }
  }

  // `left` elements of the row follow, the others are the next row's first.
  __device__ uint32_t get(const TailShape& shape, const TailPlace& at, int left) const {
    const uint32_t bits = bytes >> at.offset % 8;
    if (!kAcross || left >= V) return bits;
    return (bits & ((1u << left) - 1)) | bytes >> 8 * (shape.row_bytes - at.offset / 8) << left;
  }
};

// What a pass over gradients reads. Without kIdentity the identity is not read.
template <class T, bool kSmooth, bool kIdentity>
struct TailGradientMaps {
  using A = Accumulator<T>;
  Map dy, x, identity;
  const uint8_t* mask;  // null where all elements pass
  TailCoefficients coefficients;
  Activation activation;
  bool reads_x, reads_identity;  // for more than v
  int64_t last_byte;             // of the mask

  template <int V, bool kAcross>
  struct Read {
    Packed<T, V> dy, x, identity;
    TailBits<V, kAcross> bits;

    __device__ void pack() {
      forget(dy);
      forget(x);
      if constexpr (kIdentity) forget(identity);
    }
  };

  __device__ bool needs_x() const { return kSmooth || reads_x; }
  __device__ bool needs_identity() const {
    return kIdentity && (reads_identity || (kSmooth && identity.data));
  }

  template <int V, bool kAcross>
  __device__ Read<V, kAcross> read(bool there, const TailShape& shape, const TailPlace& at) const {
    Read<V, kAcross> found;
    found.dy = load_if<V>(there, at.in<const T>(dy));
    found.x = load_if<V>(there && needs_x(), at.in<const T>(x));
    if constexpr (kIdentity)
      found.identity = load_if<V>(there && needs_identity(), at.in<const T>(identity));
    if constexpr (!kSmooth) found.bits.load(there && mask, mask, shape, at, last_byte);
    return found;
  }

  // Of a vector.
  template <int V, bool kAcross>
  __device__ uint32_t bits(const Read<V, kAcross>& from, const TailShape& shape,
                           const TailPlace& at, int left) const {
    if constexpr (kSmooth) return ~0u;
    else return mask ? from.bits.get(shape, at, left) : ~0u;
  }

  template <int W>
  __device__ TailTerms<A, W> terms(int64_t plane, int channel) const {
    TailTerms<A, W> found;
    if constexpr (kSmooth) found.load_all(coefficients, plane, channel, needs_identity());
    else found.load_centres(coefficients, channel, needs_x(), needs_identity());
    return found;
  }

  struct Element {
    A g, x, identity;
  };

  // Element e of a vector, whose bits these are; channel w of the terms.
  template <class Read, int W>
  __device__ Element element(const TailTerms<A, W>& k, int w, const Read& from, int e,
                             uint32_t bits) const {
    A identity = 0;
    if constexpr (kIdentity) identity = from.identity.wide(e);
    return element_of(k, w, from.dy.wide(e), from.x.wide(e), identity, bits >> e);
  }

  // Its bit is the first one.
  template <int W>
  __device__ Element element_of(const TailTerms<A, W>& k, int w, A dy, A x, A identity,
                                uint32_t bit) const {
    if constexpr (kSmooth)
      return {dy * smooth(activation, k.argument(w, x, identity)).slope, x, identity};
    else return {bit & 1 ? dy : A(0), x, identity};
  }
};

}  // namespace eca::cuda
