// The tail of a residual block with ECA's gate, as a step of the kernels that keep x on chip: see
// BlockTail in ../eca.h. Forward reads x and the identity once and writes y and the mask once.
//
//   y = act(p * (x - centre) + q + identity_scale * (identity - identity_centre))
//
// p and q are made from the gate, which is made from the means of alpha * (x - centre) + beta. The
// activation is ReLU or none: SiLU and GELU have the passes of tail_apply.h.
#pragma once

#include "kept.h"
#include "rows.h"
#include "runs.h"
#include "tail_apply.h"

namespace eca::cuda {

// The factor of a sample.
template <class A>
__device__ inline A scale_of(const BlockTail& tail, int64_t sample) {
  return tail.scale ? value_at(static_cast<const A*>(tail.scale) + sample) : A(1);
}

struct BlockTailStep {
  static constexpr bool kWholeTiles = true;
  BlockTail tail;
  int row_bytes;  // of the mask

  // ---- of planes and channels ----

  template <class A>
  __device__ static A number(const void* from, int64_t i) {
    return value_at(static_cast<const A*>(from) + i);
  }

  // What the taps take for a channel, from its mean. Of all that hold it, the tile's own block
  // keeps the distance.
  template <class A>
  __device__ A pooled(int64_t sample, int channel, bool own, A mean) const {
    const A distance = mean - number<A>(tail.rest.centre, channel);
    if (own)
      put(static_cast<A*>(tail.distance) + sample * tail.problem.channels + channel, distance);
    return number<A>(tail.alpha, channel) * distance + number<A>(tail.beta, channel);
  }

  // Of W channels from this one on, with these gates.
  template <int W, class A>
  __device__ TailTerms<A, W> terms(int64_t sample, int channel, const Vector<A, W>& gate) const {
    TailTerms<A, W> k;
    k.load_centres(tail.rest, channel, true, tail.identity.data);
    k.identity_scale = coefficients_if<A, W>(tail.identity.data, tail.rest.identity_scale, channel);
    k.p = coefficients<A, W>(tail.alpha, channel);
    k.q = coefficients<A, W>(tail.beta, channel);
    const auto shift = coefficients<A, W>(tail.shift, channel);
    const A scale = scale_of<A>(tail, sample);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const A factor = gate.element[w] * scale;
      k.p.element[w] *= factor;
      k.q.element[w] = factor * k.q.element[w] + shift.element[w];
    }
    return k;
  }

  // ---- of elements ----

  // Where the identity lies; anywhere if there is none.
  template <class Part>
  __device__ auto identity_of(const Part& part) const {
    return part.cursor(tail.identity.data ? tail.identity : tail.x);
  }

  template <class T, int V, class Where>
  __device__ Packed<T, V> identity_at(bool there, const Where& from, int i) const {
    return load_if<V>(there && tail.identity.data, static_cast<const T*>(from.at(i)));
  }

  template <class T, int V>
  __device__ static Packed<T, V> packed(const Vector<T, V>& v) {
    Packed<T, V> found;
    std::memcpy(&found, &v, sizeof v);
    return found;
  }

  // y of kCount elements from `begin` on; terms_of(e) has those of element e, and its place in them.
  // Returns their bits of the mask.
  template <int kCount, class T, int V, class TermsOf>
  __device__ uint32_t activate(int begin, const Packed<T, V>& x, const Packed<T, V>& identity,
                               Packed<T, V> (&y)[1], TermsOf argument) const {
    using A = Accumulator<T>;
    const bool relu = tail.activation == Activation::kRelu;
    return compute_some<kCount>(begin, y, [&](int e, A(&result)[1]) {
      const A v = argument(e, x.wide(e), identity.wide(e));
      const bool kept = !(v <= A(0));  // NaN is kept
      result[0] = kept || !relu ? v : A(0);
      return kept;
    });
  }

  // ---- planes: a team of threads has one, its own or one of the halo ----

  template <class T, int kDepth>
  __device__ void write(const Map& y, const Row<T, kDepth>& row,
                        const typename Row<T, kDepth>::Held& x, Accumulator<T> gate,
                        bool own) const {
    using A = Accumulator<T>;
    constexpr int V = kVector<T>, kAtOnce = kDepth <= 7 ? 4 : kShortOfRegisters ? 1 : 2;
    const int channel = max(row.channel, 0);
    const TailTerms<A, 1> k = terms<1>(row.sample, channel, Vector<A, 1>{gate});
    const auto to = row.cursor(y), from = identity_of(row);
    const int64_t plane = row.sample * tail.problem.channels + channel;
    const auto has = [&](int i) { return own && row.has(i); };
#pragma unroll
    for (int first = 0; first < kDepth; first += kAtOnce) {
      Packed<T, V> identity[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (first + u < kDepth) identity[u] = identity_at<T, V>(has(first + u), from, first + u);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = first + u;
        if (i >= kDepth) continue;
        Packed<T, V> result[1];
        uint32_t bits =
            activate<V>(0, packed(x[i]), identity[u], result,
                        [&](int, A from_x, A other) { return k.argument(0, from_x, other); });
        if (has(i)) store(to.at(i), result[0].vector());
        if (!tail.mask) continue;
        // Lanes are a power of two, so a plane's vectors of an even number are on even lanes.
        if constexpr (V == 4) bits |= shuffle_xor(has(i) ? bits : 0u, 1) << 4;
        const int vector = row.begin + i * row.lanes;
        if (has(i) && (V == 8 || vector % 2 == 0))
          put(tail.mask + plane * row_bytes + vector * V / 8, uint8_t(bits));
      }
    }
  }

  // ---- planes as one run: a vector may have the end of one and the beginning of the next ----

  // One by one: to choose between the two as a whole, they would be in memory.
  template <class A>
  __device__ static TailTerms<A, 1> chosen(bool first, const TailTerms<A, 1>& a,
                                           const TailTerms<A, 1>& b) {
    const auto one = [&](const Vector<A, 1>& of_a, const Vector<A, 1>& of_b) {
      return Vector<A, 1>{first ? of_a.element[0] : of_b.element[0]};
    };
    return {one(a.p, b.p), one(a.q, b.q), one(a.centre, b.centre),
            one(a.identity_scale, b.identity_scale), one(a.identity_centre, b.identity_centre)};
  }

  // The mask's bits go through shared memory from `scratch` on, where no thread reads any more.
  template <class T, int kDepth, int kGranule>
  __device__ void write(const Map& y, const Run<T, kDepth, kGranule>& run,
                        const typename Run<T, kDepth, kGranule>::Held& x,
                        Shared<Accumulator<T>> gates, const HeldTile& tile,
                        const Divisor& by_pixels, int scratch) const {
    using A = Accumulator<T>;
    constexpr int V = kVector<T>;
    static_assert(kDepth * kRunThreads <= kMaskRing<1>);
    const auto to = run.cursor(y), from = identity_of(run);
    const int64_t first_byte = (tile.sample * tile.channels + tile.begin) * row_bytes;
    const bool staged = tail.mask && (V < 8 || run.pixels % 8 != 0);
    const MaskBits<V, 1> bits(staged, scratch);
    run.for_each_own(by_pixels, [&](int i, const PlaneAt& at) {
      const Packed<T, V> identity = identity_at<T, V>(true, from, i);
      const int channel = tile.begin + at.channel, beyond = min(channel + 1, tile.channels - 1);
      const auto here = terms<1>(tile.sample, channel, Vector<A, 1>{gates.get(at.channel)}),
                 next = terms<1>(tile.sample, beyond, Vector<A, 1>{gates.get(at.channel + 1)});
      Packed<T, V> result[1];
      const uint32_t found =
          activate<V>(0, packed(x[i]), identity, result, [&](int e, A own, A other) {
            const bool is_here = e < kGranule || e / kGranule * kGranule < at.left;
            return chosen(is_here, here, next).argument(0, own, other);
          });
      store(to.at(i), result[0].vector());
      if (!tail.mask) return;
      const int element = (at.channel + 1) * run.pixels - at.left;
      if (staged) bits.put(element, found);
      else put(tail.mask + first_byte + element / 8, uint8_t(found));
    });
    if (!staged) return;
    block_barrier();
    bits.write(tail.mask + first_byte, row_bytes, 0, run.own_elements, run.own_elements,
               run.pixels);
  }

  // ---- pixels: a thread keeps to a column of eight channels, whose bits are a byte ----

  // The terms of the tile's own channels, by columns and in shared memory: from global memory, the
  // address of each array would be in two registers of a thread that has most of them full. The
  // columns are so far apart that threads side by side read from different banks.
  template <class A>
  __device__ static Shared<A> column_terms(const SharedLayout& shared, int channels) {
    return shared_array<A>(shared.tail, channels / 8 * kTailColumnTerms);
  }

  // One thread calls this for each channel of the tile, before a barrier.
  template <class A>
  __device__ void put_terms(const SharedLayout& shared, const HeldTile& tile, int c, A gate) const {
    const TailTerms<A, 1> k = terms<1>(tile.sample, tile.begin + c, Vector<A, 1>{gate});
    const Shared<A> to = column_terms<A>(shared, tile.own).from(c / 8 * kTailColumnTerms + c % 8);
    to.set(0, k.p.element[0]);
    to.set(8, k.q.element[0]);
    to.set(16, k.centre.element[0]);
    to.set(24, k.identity_scale.element[0]);
    to.set(32, k.identity_centre.element[0]);
  }

  // Some vectors of a column from `first` on: x_at(u) is the u-th. Terms are of four channels at a
  // time, and used for all of the vectors.
  template <int kAtOnce, class T, int kDepth, class XAt>
  __device__ void write_some(const Column<T, kDepth>& column, const Cursor<T, int64_t>& to,
                             const Cursor<T, int64_t>& from, const Cursor<uint8_t, int64_t>& mask,
                             Shared<Accumulator<T>> k, int first, int end, XAt x_at) const {
    using A = Accumulator<T>;
    constexpr int V = kVector<T>, W = 4;
    static_assert(V == 8);
    Packed<T, V> identity[kAtOnce], results[kAtOnce][1];
    uint32_t bits[kAtOnce] = {};
    const auto has = [&](int u) { return first + u < end && column.has(first + u); };
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) identity[u] = identity_at<T, V>(has(u), from, first + u);
#pragma unroll
    for (int e = 0; e < V; e += W) {
      const int at = hidden(e);  // without which all terms would be in registers
      const TailTerms<A, W> some{k.template load<W>(at), k.template load<W>(at + 8),
                                 k.template load<W>(at + 16), k.template load<W>(at + 24),
                                 k.template load<W>(at + 32)};
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        bits[u] |=
            activate<W>(e, packed(x_at(u)), identity[u], results[u],
                        [&](int i, A own, A other) { return some.argument(i - e, own, other); });
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (!has(u)) continue;
      store(to.at(first + u), results[u][0].vector());
      if (tail.mask) put(mask.at(first + u), uint8_t(bits[u]));
    }
  }

  // The vectors in registers, and those that `spare` gives one by one. After put_terms() and a
  // barrier.
  template <class T, int kDepth, class Spares>
  __device__ void write(const Map& y, const Column<T, kDepth>& column,
                        const typename Column<T, kDepth>::Held& x, const SharedLayout& shared,
                        const HeldTile& tile, const Spares& spares) const {
    using A = Accumulator<T>;
    constexpr int kAtOnce = 1;
    const auto to = column.cursor(y), from = identity_of(column);
    const Map bits{tail.mask, tail.problem.pixels * row_bytes, row_bytes};
    const int64_t first_byte =
        column.sample * bits.sample_stride + column.first * bits.row_stride + column.channel / 8;
    const Cursor<uint8_t, int64_t> mask{tail.mask ? tail.mask + first_byte : nullptr,
                                        column.rows * bits.row_stride};
    const Shared<A> k = column_terms<A>(shared, tile.own)
                            .from((column.channel - tile.begin) / 8 * kTailColumnTerms);
#pragma unroll
    for (int first = 0; first < kDepth; first += kAtOnce)
      write_some<kAtOnce>(column, to, from, mask, k, first, kDepth,
                          [&](int u) { return x[first + u < kDepth ? first + u : kDepth - 1]; });
    spares.for_each([&](int i, const Vector<T, kVector<T>>& some) {
      write_some<1>(column, to, from, mask, k, i, i + 1, [&](int) { return some; });
    });
  }
};

}  // namespace eca::cuda
