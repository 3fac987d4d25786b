// The gradients of a residual block's tail with ECA's gate, as a step of the kernels that keep x and
// dy on chip: see BlockTailBackward in ../eca.h. They read dy, x and the mask once and write dx and
// d_identity once, with g = dy where the mask has a bit:
//
//   dx = gate * scale * alpha * g + alpha * dmean / S,  d_identity = identity_scale * g
//
// The gates' gradients are made of two sums over a plane, of g and of g * (x - centre). They are
// rounded as sums of float32, and given on as float64.
#pragma once

#include "kept.h"
#include "rows.h"
#include "runs.h"
#include "tail_element.h"

namespace eca::cuda {

// g from dy: 0 where a bit is not set, whatever dy is.
template <class T, int V>
__device__ inline void keep_bits(uint32_t bits, Vector<T, V>& dy) {
  Packed<T, V> g;
  std::memcpy(&g, &dy, sizeof g);
  g.keep(bits);
  dy = g.vector();
}

struct BlockTailGradientStep {
  static constexpr bool kWholeTiles = true;
  BlockTailBackward of;
  TailShape shape;
  int64_t last_byte;  // of the mask

  template <class A>
  __device__ static A number(const void* from, int64_t i) {
    return value_at(static_cast<const A*>(from) + i);
  }
  __device__ int64_t plane(int64_t sample, int channel) const {
    return sample * of.forward.problem.channels + channel;
  }
  __device__ const uint8_t* mask() const {
    return of.forward.activation == Activation::kRelu ? of.forward.mask : nullptr;
  }

  // ---- of planes and channels ----

  // What the taps took, from the mean's distance to the centre.
  template <class A>
  __device__ A mean_of(int channel, A distance) const {
    return number<A>(of.forward.alpha, channel) * distance + number<A>(of.forward.beta, channel);
  }

  // From the two sums, which the block keeps of its own channels.
  template <class A>
  __device__ A dz_of(int64_t sample, int channel, bool own, A gate, A sum, A by_x) const {
    if (own) {
      put(of.sums + plane(sample, channel), double(sum));
      put(of.sums + of.forward.problem.samples * of.forward.problem.channels +
              plane(sample, channel),
          double(by_x));
    }
    // Without a norm, beta is zero, and an infinite sum of g must not become NaN.
    const A beta = number<A>(of.forward.beta, channel), by_beta = beta == 0 ? A(0) : beta * sum;
    return scale_of<A>(of.forward, sample) *
           (number<A>(of.forward.alpha, channel) * by_x + by_beta) * gate * (A(1) - gate);
  }

  // Of g in dx, what is added, and of g in d_identity.
  template <class A>
  struct Factors {
    A gate, shift, identity;
  };
  template <class A>
  __device__ Factors<A> factors(int64_t sample, int channel, A gate, A dm,
                                A one_over_pixels) const {
    const A alpha = number<A>(of.forward.alpha, channel);
    return {gate * scale_of<A>(of.forward, sample) * alpha, alpha * dm * one_over_pixels,
            number<A>(of.forward.rest.identity_scale, channel)};
  }

  template <class A>
  __device__ void put_dmean(int64_t sample, int channel, A dm) const {
    put(static_cast<A*>(of.dmean) + plane(sample, channel), dm);
  }

  // Of what put_dmean() wrote, by another block too: after the barrier that follows the wait.
  template <class A>
  __device__ A dmean(int64_t sample, int channel) const {
    return number<A>(of.dmean, plane(sample, channel));
  }

  // ---- what is written ----

  template <class Where>
  struct Gradients {
    Where dx, d_identity;
    bool wants_dx, wants_d_identity;

    template <class T, int V, class A>
    __device__ void put(int i, const Vector<T, V>& g, const Vector<A, V>& gate,
                        const Vector<A, V>& shift, const Vector<A, V>& identity) const {
      if (wants_dx) store(dx.at(i), rescaled(g, gate, shift));
      if (wants_d_identity) store(d_identity.at(i), rescaled(g, identity));
    }
  };

  // A map that is not wanted has the place of another one.
  template <class Part>
  __device__ auto backward(const Map&, const Part& part) const {
    const Map &x = of.forward.x, &first = of.dx.data ? of.dx : x,
              &second = of.d_identity.data ? of.d_identity : x;
    return Gradients<decltype(part.cursor(x))>{part.cursor(first), part.cursor(second),
                                               of.dx.data != nullptr,
                                               of.d_identity.data != nullptr};
  }

  // ---- planes: a team of threads has one ----

  // dz of the team's plane, in all of its threads; dy becomes g. x and the mask are read kAtOnce
  // vectors at a time and not kept: dy fills the registers. By all threads of the block.
  template <class T, int kDepth>
  __device__ Accumulator<T> dz(const Row<T, kDepth>& row, typename Row<T, kDepth>::Held& dy,
                               Accumulator<T> gate, bool own,
                               Shared<Accumulator<T>> scratch) const {
    using A = Accumulator<T>;
    constexpr int V = kVector<T>, kAtOnce = kDepth > 7 ? 4 : 2;
    const int channel = max(row.channel, 0);
    const A centre = number<A>(of.forward.rest.centre, channel);
    const auto xs = row.cursor(of.forward.x);
    const bool masked = mask() != nullptr;
    const auto* const bits =
        pinned((masked ? mask() : static_cast<const uint8_t*>(of.forward.x.data)) +
               plane(row.sample, channel) * (masked ? shape.row_bytes : 0) + row.begin * V / 8);
    ChainedSum<A> sum, by_x;
#pragma unroll
    for (int first = 0; first < kDepth; first += kAtOnce) {
      Packed<T, V> x[kAtOnce];
      uint32_t bytes[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = first + u;
        if (i >= kDepth) continue;
        x[u] = load_if<V>(row.has(i), static_cast<const T*>(xs.at(i)));
        bytes[u] = load_byte_if(masked && row.has(i), bits + i * row.lanes * V / 8);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = first + u;
        if (i >= kDepth) continue;
        // A team has an even number of lanes, so halves of bytes are always the same ones.
        if (masked) keep_bits(V == 8 ? bytes[u] : bytes[u] >> row.begin % 2 * 4, dy[i]);
        Packed<T, V> g;
        std::memcpy(&g, &dy[i], sizeof g);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          sum.chains[e % 4] += g.wide(e);
          by_x.chains[e % 4] += g.wide(e) * (x[u].wide(e) - centre);
        }
        forget(g);
        dy[i] = g.vector();
      }
    }
    const A all = row.total(sum.total(), scratch);
    if (row.lanes > 32) block_barrier();  // all have read the other warps' sums
    const A all_by_x = row.total(by_x.total(), scratch);
    if (row.channel < 0) return A(0);
    return dz_of(row.sample, channel, own && row.lane == 0, gate, all, all_by_x);
  }

  // One result after the other, in as many registers as one of them needs.
  template <class T, int kDepth>
  __device__ void write(const Row<T, kDepth>& row, const typename Row<T, kDepth>::Held& g,
                        const Factors<Accumulator<T>>& by) const {
    constexpr int V = kVector<T>;
    if (of.dx.data) {
      const auto to = row.cursor(of.dx);
      row.for_each(
          [&](int i) { store(to.at(i), rescaled(g[i], all_of<V>(by.gate), all_of<V>(by.shift))); });
    }
    if (of.d_identity.data) {
      const auto to = row.cursor(of.d_identity);
      row.for_each([&](int i) { store(to.at(i), rescaled(g[i], all_of<V>(by.identity))); });
    }
  }

  // ---- planes as one run: a vector may have the end of one and the beginning of the next ----

  // dz of the held channels, in two rounds of sums, as the terms of both have no room at once. dy
  // becomes g. By all threads, after fetch_gates_and_means(); before a barrier.
  template <class T, int kDepth, int kGranule>
  __device__ void make_dz(const Run<T, kDepth, kGranule>& run,
                          typename Run<T, kDepth, kGranule>::Held& dy,
                          const typename Run<T, kDepth, kGranule>::Held& x, const HeldTile& tile,
                          const Tiling& tiling, const SharedLayout& shared,
                          Shared<Accumulator<T>> terms, Shared<Accumulator<T>> gates,
                          const Neighbours<Accumulator<T>>& dz) const {
    using A = Accumulator<T>;
    constexpr int V = kVector<T>;
    // From the channel before the first held one, in whose plane the first vector may begin, to the
    // one behind the last.
    const auto centres = shared_array<A>(shared.tail, tiling.held + 2);
    for (int h = thread_index(); h < tiling.held + 2; h += kRunThreads) {
      const int channel = tile.channel(h - 1);
      if (h == 0 || channel < 0) centres.set(h, A(0));
      else centres.template fetch<1>(h, static_cast<const A*>(of.forward.rest.centre) + channel);
    }
    // Which channel of the sample, and how many of its elements follow.
    const auto place = [&](int i) {
      return PlaneAt(run.begin + (thread_index() + i * kRunThreads) * V, run.pixels,
                     tiling.by_pixels);
    };
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      if (!run.has(i)) continue;
      if (mask()) {
        const PlaneAt at = place(i);
        const TailPlace where{int(tile.sample), at.channel, run.pixels - at.left};
        TailBits<V, (kGranule < V)> bits;
        bits.load(true, mask(), shape, where, last_byte);
        keep_bits(bits.get(shape, where, at.left), dy[i]);
      }
      run.put(i, widen(dy[i]), terms);
    }
    finish_fetches();
    block_barrier();
    run.for_each_total(tile, tiling, terms, [&](int h, A sum) { dz.set(h, sum); });
    block_barrier();
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      if (!run.has(i)) continue;
      PlaneAt at = place(i);
      at.channel += 1 + tile.halo - tile.begin;  // its place in `centres`
      const Vector<A, V> centre = by_element<V, kGranule>(centres, at), g = widen(dy[i]);
      Vector<A, V> products = widen(x[i]);
#pragma unroll
      for (int e = 0; e < V; ++e)
        products.element[e] = g.element[e] * (products.element[e] - centre.element[e]);
      run.put(i, products, terms);
    }
    block_barrier();
    run.for_each_total(tile, tiling, terms, [&](int h, A by_x) {
      const int channel = tile.channel(h);
      dz.set(h, channel < 0
                    ? A(0)
                    : dz_of(tile.sample, channel, tile.is_own(h), gates.get(h), dz.get(h), by_x));
    });
  }

  // Each element's factor in d_identity.
  template <int V, int kGranule, class A>
  __device__ Vector<A, V> identity_scales(const HeldTile& tile, const PlaneAt& at) const {
    const int channel = tile.begin + at.channel, beyond = min(channel + 1, tile.channels - 1);
    const A here = number<A>(of.forward.rest.identity_scale, channel),
            next = number<A>(of.forward.rest.identity_scale, beyond);
    Vector<A, V> v;
#pragma unroll
    for (int e = 0; e < V; ++e)
      v.element[e] = e < kGranule || e / kGranule * kGranule < at.left ? here : next;
    return v;
  }

  // ---- pixels: a thread keeps to a column, whose channels' bits are a byte or half of one ----

  // Of g, and of g * (x - centre).
  template <class T>
  struct ColumnSums {
    Vector<Accumulator<T>, kVector<T>> of_g, by_x;
  };

  template <class T, int kDepth>
  __device__ Cursor<const uint8_t, int64_t> bits_of(const Column<T, kDepth>& column) const {
    const int64_t row = column.sample * of.forward.problem.pixels + column.first;
    const auto* first = static_cast<const uint8_t*>(of.forward.x.data);  // not read
    if (mask() && column.any()) first = mask() + row * shape.row_bytes + column.channel / 8;
    return {pinned(first), int64_t(column.rows) * shape.row_bytes};
  }

  // Adds the sums of some vectors from `first` on, whose dy become g. The centres are read again for
  // all of them: kept, they would be in eight registers.
  template <int kAtOnce, class T, int kDepth, class Vectors>
  __device__ void add_some(const Column<T, kDepth>& column, const Cursor<T, int64_t>& xs,
                           const Cursor<const uint8_t, int64_t>& bits, int first, int end,
                           const Vectors& dy, ColumnSums<T>& sums) const {
    using A = Accumulator<T>;
    constexpr int V = kVector<T>, W = 4;
    const bool masked = mask() != nullptr;
    const int channel = max(column.channel, 0);
    Packed<T, V> x[kAtOnce], g[kAtOnce];
    uint32_t bytes[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = first + u;
      const bool there = i < end && column.has(i);
      x[u] = load_if<V>(there, static_cast<const T*>(xs.at(i)));
      bytes[u] = load_byte_if(masked && there, bits.at(i));
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      g[u] = {};
      if (first + u >= end) continue;
      const Vector<T, V> here = dy.get(first + u);
      std::memcpy(&g[u], &here, sizeof here);
      if (masked) g[u].keep(V == 8 ? bytes[u] : bytes[u] >> channel % 8);
      forget(g[u]);
      dy.set(first + u, g[u].vector());
    }
#pragma unroll
    for (int e = 0; e < V; e += W) {
      const auto centre = coefficients<A, W>(of.forward.rest.centre, hidden(channel + e));
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {  // zeros add nothing; to ask would take registers
#pragma unroll
        for (int w = e; w < e + W; ++w) {
          sums.of_g.element[w] += g[u].wide(w);
          sums.by_x.element[w] += g[u].wide(w) * (x[u].wide(w) - centre.element[w - e]);
        }
      }
    }
  }

  // The same of the vectors in registers.
  template <class T, int kDepth>
  __device__ void add_held(const Column<T, kDepth>& column, typename Column<T, kDepth>::Held& dy,
                           ColumnSums<T>& sums) const {
    constexpr int kAtOnce = 4;
    const auto xs = column.cursor(of.forward.x);
    const auto bits = bits_of(column);
#pragma unroll
    for (int first = 0; first < kDepth; first += kAtOnce)
      add_some<kAtOnce>(column, xs, bits, first, kDepth, HeldVectors<T, kDepth>{dy}, sums);
  }

  // And of those in shared memory.
  template <class T, int kDepth>
  __device__ void add_spares(const Column<T, kDepth>& column, const Spare<T, kDepth>& dy,
                             ColumnSums<T>& sums) const {
    constexpr int kAtOnce = 2;
    const auto xs = column.cursor(of.forward.x);
    const auto bits = bits_of(column);
#pragma unroll 1
    for (int first = kDepth; first < dy.end(); first += kAtOnce)
      add_some<kAtOnce>(column, xs, bits, first, dy.end(), dy, sums);
  }

  // dz of the held channels, in two rounds through `parts`. dy becomes g. By all threads, after
  // fetch_gates_and_means(); before a barrier.
  template <class T, int kDepth>
  __device__ void make_dz(const Column<T, kDepth>& column, typename Column<T, kDepth>::Held& dy,
                          const HeldTile& tile, const Tiling& tiling, Shared<Accumulator<T>> parts,
                          Shared<Accumulator<T>> gates,
                          const Neighbours<Accumulator<T>>& dz) const {
    using A = Accumulator<T>;
    ColumnSums<T> sums{};
    add_held(column.again(), dy, sums);
    column.put_parts(sums.of_g, tiling.held, parts);
    finish_fetches();
    block_barrier();
    for (int h = thread_index(); h < tile.held; h += thread_count())
      dz.set(h, column.total(h, tiling.held, parts));
    block_barrier();
    column.put_parts(sums.by_x, tiling.held, parts);
    block_barrier();
    for (int h = thread_index(); h < tile.held; h += thread_count()) {
      const int channel = tile.channel(h);
      const A by_x = column.total(h, tiling.held, parts);
      dz.set(h, channel < 0
                    ? A(0)
                    : dz_of(tile.sample, channel, tile.is_own(h), gates.get(h), dz.get(h), by_x));
    }
  }

  // The factors of the tile's own channels, for write(). `of_g` and `shifts` begin with the tile's
  // first one. The gates may lie in `of_g`.
  template <class A>
  __device__ void put_factors(const SharedLayout& shared, const HeldTile& tile, int c, A gate, A dm,
                              A one_over_pixels, Shared<A> of_g, Shared<A> shifts) const {
    const auto by = factors(tile.sample, tile.begin + c, gate, dm, one_over_pixels);
    of_g.set(c, by.gate);
    shifts.set(c, by.shift);
    identities<A>(shared, tile).set(c, by.identity);
  }

  template <class A>
  __device__ static Shared<A> identities(const SharedLayout& shared, const HeldTile& tile) {
    return shared_array<A>(shared.tail, tile.own);
  }

  // One result after the other, in as many registers as one of them needs. After put_factors() and
  // a barrier.
  template <class T, int kDepth, class Spares>
  __device__ void write(const Column<T, kDepth>& column, const typename Column<T, kDepth>::Held& g,
                        const SharedLayout& shared, const HeldTile& tile,
                        Shared<Accumulator<T>> of_g, Shared<Accumulator<T>> shifts,
                        const Spares& spares) const {
    using A = Accumulator<T>;
    constexpr int V = kVector<T>;
    const int c = column.channel - tile.begin;
    if (of.dx.data) {
      const auto to = column.cursor(of.dx);
      const auto factor = values_from<V>(of_g, c), shift = values_from<V>(shifts, c);
      const auto put = [&](int i, const Vector<T, V>& some) {
        store(to.at(i), rescaled(some, factor, shift));
      };
      column.for_each([&](int i) { put(i, g[i]); });
      spares.for_each(put);
    }
    if (of.d_identity.data) {
      const auto to = column.cursor(of.d_identity);
      const auto scale = values_from<V>(identities<A>(shared, tile), c);
      const auto put = [&](int i, const Vector<T, V>& some) {
        store(to.at(i), rescaled(some, scale));
      };
      column.for_each([&](int i) { put(i, g[i]); });
      spares.for_each(put);
    }
  }
};

}  // namespace eca::cuda
