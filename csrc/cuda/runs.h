// Strategy runs: a run of planes in registers, for planes that do not begin at multiples of 16
// bytes, such as 14x14 and 7x7 with elements of 2 bytes. The held planes are one run of elements,
// which the block reads in vectors. A vector may hold the end of one plane and the beginning of the
// next. So the terms of the sums go through shared memory, where a plane can begin anywhere; a
// rescaled element takes the gate of its own plane.
#pragma once

#include "registers.h"

namespace eca::cuda {

// Whose elements a vector holds: the channel in the tile of its first one, and how many elements of
// that channel follow.
struct PlaneAt {
  int channel, left;

  __device__ PlaneAt(int element, int pixels, const Divisor& by_pixels)
      : channel(quotient(element, by_pixels)), left((channel + 1) * pixels - element) {}
};

// Each element's value: those of the vector's first channel, then those of the next one. From a
// multiple of kSame in the vector on, so many elements belong to the same channel.
template <int V, int kSame, class A>
__device__ inline Vector<A, V> by_element(Shared<A> values, const PlaneAt& place) {
  const Shared<A> at = values.from(place.channel);
  const A here = at.get(0), next = at.get(1);
  Vector<A, V> v;
#pragma unroll
  for (int e = 0; e < V; ++e)
    v.element[e] = e < kSame || e / kSame * kSame < place.left ? here : next;
  return v;
}

// The first `count` of V elements, and zeros.
template <int V, class T>
__device__ inline Vector<T, V> load_first(const T* from, int count) {
  Vector<T, V> v{};
#pragma unroll
  for (int e = 0; e < V; ++e)
    if (e < count) v.element[e] = load<1>(from + e).element[0];
  return v;
}

// A run of held planes, in vectors. kGranule consecutive elements, from a multiple of so many on,
// belong to the same plane.
template <class T, int kDepth, int kGranule>
struct Run {
  static constexpr int V = kVector<T>;
  using A = Accumulator<T>;
  using Held = Vector<T, V>[kDepth];

  int pixels, vectors;
  int lead;                     // elements of the first vector that belong to no held plane
  int first;                    // the held number of the first plane inside the map
  int end;                      // and behind the last one
  int begin;                    // element of a sample in which the first vector begins
  int own_begin, own_elements;  // of the tile itself, which is whole vectors, in the run
  int64_t sample;

  __device__ Run(const Problem& problem, const HeldTile& tile)
      : pixels(int(problem.pixels)), sample(tile.sample) {
    const int from = max(0, tile.begin - tile.halo);
    const int to = min(tile.channels, tile.begin + tile.own + tile.halo);
    first = from - (tile.begin - tile.halo);
    end = first + to - from;
    lead = from * pixels & (V - 1);
    begin = from * pixels - lead;
    vectors = int(uint32_t(lead + (to - from) * pixels + V - 1) / V);
    own_begin = lead + (tile.halo - first) * pixels;
    own_elements = tile.own * pixels;
  }

  __device__ bool has(int i) const { return i * kRunThreads < vectors - thread_index(); }

  // gradient(i, dy[i]) for each vector of dy; for a tile without a halo that ends within a vector,
  // `single` for each element of the last one.
  template <class Gradient, class Single>
  __device__ void make_gradients(const Gradient& gradient, const Single& single, Held& dy) const {
    const int left = own_elements - thread_index() * V;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int count = left - i * kRunThreads * V;
      if (count >= V) gradient(i, dy[i]);
      else
#pragma unroll
        for (int e = 0; e < V; ++e) {
          if (e >= count) continue;
          Vector<T, 1> one{dy[i].element[e]};
          single(own_elements - count + e, one);
          dy[i].element[e] = one.element[0];
        }
    }
  }

  // From a map whose samples begin at multiples of 16 bytes. Behind the run's end a vector is not
  // defined, and nothing uses it.
  __device__ void load_from(const Map& map, Held& to) const {
    const auto from = cursor(map);
    const int left = vectors - thread_index();
#pragma unroll
    for (int i = 0; i < kDepth; ++i) to[i] = load_if_below<V>(from.at(i), i * kRunThreads, left);
  }

  // From a map whose samples begin and end anywhere, for a tile without a halo. Nothing behind the
  // tile's last element is read: it may be the last of its memory.
  __device__ void load_from_anywhere(const Map& map, Held& to) const {
    const auto from = cursor(map);
    if (place_in_line(from.first) == 0 && own_elements % V == 0) return load_from(map, to);
    const int whole = own_elements / V, left = whole - thread_index();
    Vector<T, V> last{};
    if (left % kRunThreads == 0)
      last = load_first<V>(from.first + left * V, own_elements - whole * V);
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      to[i] = last;
      if (i * kRunThreads < left) to[i] = load_anywhere<V>(from.at(i));
    }
  }

  // `terms` has an element for each granule of the run.
  __device__ void put(int i, const Vector<A, V>& some, Shared<A> terms) const {
    constexpr int kTerms = V / kGranule, W = kTerms < 4 ? kTerms : 4;
    const int v = thread_index() + i * kRunThreads;
#pragma unroll
    for (int first = 0; first < kTerms; first += W) {
      Vector<A, W> part;
#pragma unroll
      for (int u = 0; u < W; ++u) {
        const A* const granule = some.element + (first + u) * kGranule;
        if constexpr (kGranule == 4)
          part.element[u] = (granule[0] + granule[1]) + (granule[2] + granule[3]);
        else part.element[u] = granule[0];
      }
      terms.template store<W>(v * kTerms + first, part);
    }
  }

  // The sum of a held plane by `lanes` threads, `share` terms each, in all of them; 0 outside the
  // map. `share` is odd, so that neighbouring threads read from different banks.
  __device__ A total(int held, int lanes, int share, Shared<A> terms) const {
    constexpr int kChains = 4, kAtOnce = 16;
    const int skip = lanes > 1 ? (thread_index() & (lanes - 1)) * share : 0;
    const int in_plane = int(uint32_t(pixels) / kGranule);
    Shared<A> at = terms.from(int(uint32_t(lead) / kGranule) + (held - first) * in_plane + skip);
    int left = held >= first && held < end ? min(in_plane - skip, share) : 0;
    A chains[kChains] = {};
#pragma unroll 1
    for (; left >= kAtOnce; left -= kAtOnce) {
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) chains[u % kChains] += at.get(u);
      at = at.from(kAtOnce);
    }
#pragma unroll 1
    for (; left > 0; --left) {
      chains[0] += at.get(0);
      at = at.from(1);
    }
#pragma unroll
    for (int width = kChains / 2; width > 0; width /= 2)
#pragma unroll
      for (int u = 0; u < width; ++u) chains[u] += chains[u + width];
#pragma unroll 1
    for (int mask = lanes / 2; mask > 0; mask /= 2) chains[0] += shuffle_xor(chains[0], mask);
    return chains[0];
  }

  // body(held, sum) for each held plane, once its terms are there. By all threads.
  template <class Body>
  __device__ void for_each_total(const HeldTile& tile, const Tiling& tiling, Shared<A> terms,
                                 Body body) const {
    const int shift = log2_of(tiling.lanes);
#pragma unroll 1
    for (int h = thread_index() >> shift; h < tile.held_up(kRunThreads >> shift);
         h += kRunThreads >> shift) {
      const A sum = total(h, tiling.lanes, tiling.share, terms);
      if ((thread_index() & (tiling.lanes - 1)) == 0 && h < tile.held) body(h, sum);
    }
  }

  // body(i, place) for each vector of the tile itself.
  template <class Body>
  __device__ void for_each_own(const Divisor& by_pixels, Body body) const {
    const int begin = thread_index() * V - own_begin;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int element = begin + i * kRunThreads * V;
      if (uint32_t(element) >= uint32_t(own_elements)) continue;
      body(i, PlaneAt(element, pixels, by_pixels));
    }
  }

  __device__ Cursor<T, std::integral_constant<int, kRunThreads * V>> cursor(const Map& map) const {
    return {
        pinned(static_cast<T*>(map.data) + sample * map.sample_stride + begin + thread_index() * V),
        {}};
  }
};

template <class T, int kDepth, int kGranule, class Step>
__global__ void __launch_bounds__(kRunThreads, run_blocks(kDepth))
    forward_runs(Forward f, Tiling tiling, SharedLayout shared, Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& problem = f.problem;
  const HeldTile tile(problem, tiling);
  const Run<T, kDepth, kGranule> run(problem, tile);
  typename Run<T, kDepth, kGranule>::Held x;
  run.load_from(f.x, x);
  const NearTaps<T> taps(problem, f.weight, shared);
  taps.put();
  const Neighbours<A> means(problem, tiling, shared.padded);
  const auto terms = shared_array<A>(shared.terms, kDepth * kRunThreads * V / kGranule);
#pragma unroll
  for (int i = 0; i < kDepth; ++i) run.put(i, widen(x[i]), terms);
  block_barrier();

  run.for_each_total(tile, tiling, terms, [&](int h, A sum) {
    const int channel = tile.channel(h);  // -1 beyond the ends, where the sum is zero
    A mean = sum * tiling.factor;
    if (channel >= 0) mean = step.pooled(tile.sample, channel, tile.is_own(h), mean);
    means.set(h, mean);
  });
  means.clear_ends();
  block_barrier();

  // One gate beyond the last, which the last vector reads too.
  const auto gates = shared_array<A>(shared.gate, tiling.tile + 1);
  if (thread_index() == 0) gates.set(tile.own, A(0));
  const MeansAndGates<A, Step> small(f, tile);
#pragma unroll 1
  for (int c = thread_index(); c < tile.own; c += kRunThreads) {
    const int h = c + tile.halo, channel = tile.begin + c;
    const A gate = gate_of(means, taps, channel, h);
    gates.set(c, gate);
    small.put(c, means.get(h), gate);
  }
  block_barrier();

  if constexpr (Step::kWholeTiles) {
    step.write(f.y, run, x, gates, tile, tiling.by_pixels, shared.terms);
  } else {
    const auto result = step.forward(f.y, run);
    run.for_each_own(tiling.by_pixels, [&](int i, auto at) {
      result.put(i, x[i], by_element<V, kGranule>(gates, at));
    });
  }
}

// dx, and what dweight is made from.
template <class T, int kDepth, int kGranule, class Step>
__global__ void __launch_bounds__(kRunThreads, run_blocks(kDepth))
    backward_runs(Backward b, Tiling tiling, SharedLayout shared, Workspace work, Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& problem = b.problem;
  const HeldTile tile(problem, tiling);
  const Run<T, kDepth, kGranule> run(problem, tile);
  typename Run<T, kDepth, kGranule>::Held dy, x;
  run.load_from(b.dy, dy);
  run.load_from(b.x, x);
  const NearTaps<T> taps(problem, b.weight, shared);
  const Neighbours<A> dz(problem, tiling, shared.padded);
  const DweightMeans<T> means(b, tiling, shared, tile);
  const auto gates = shared_array<A>(shared.gate, tiling.held + 1),
             shifts = shared_array<A>(shared.shift, tiling.tile + 1);
  if (thread_index() == 0) gates.set(tile.held, A(0)), shifts.set(tile.own, A(0));
  fetch_gates_and_means(b, tile, gates, means, step);
  const auto terms = shared_array<A>(shared.terms, kDepth * kRunThreads * V / kGranule);
  if constexpr (Step::kWholeTiles) {
    taps.put();
    step.make_dz(run, dy, x, tile, tiling, shared, terms, gates, dz);
  } else {
    const auto gradient = step.gradient(run);
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      if (run.has(i)) gradient(i, dy[i]);
      run.put(i, products_of(dy[i], x[i]), terms);
    }
    taps.put();
    finish_fetches();
    block_barrier();

    run.for_each_total(tile, tiling, terms, [&](int h, A sum) {
      const A gate = gates.get(h);
      dz.set(h, sum * gate * (A(1) - gate));
    });
  }
  dz.clear_ends();
  means.clear_ends();
  block_barrier();
  means.leave_dweight(b, work, tile, dz);
  if (!(b.dx.data || Step::kWholeTiles)) return;

  const Shared<A> own_gates = gates.from(tile.halo);
#pragma unroll 1
  for (int c = thread_index(); c < tile.own; c += kRunThreads) {
    const A dm = dm_of(tile, dz, taps, c + tile.halo);
    if constexpr (Step::kWholeTiles) {
      const int channel = tile.begin + c;
      const auto by = step.factors(tile.sample, channel, own_gates.get(c), dm, A(tiling.factor));
      own_gates.set(c, by.gate);
      shifts.set(c, by.shift);
      step.put_dmean(tile.sample, channel, dm);
    } else {
      shifts.set(c, dm * tiling.factor);
    }
  }
  block_barrier();
  const auto result = step.backward(b.dx, run);
  run.for_each_own(tiling.by_pixels, [&](int i, auto at) {
    const auto gate = by_element<V, kGranule>(own_gates, at),
               shift = by_element<V, kGranule>(shifts, at);
    if constexpr (Step::kWholeTiles)
      result.put(i, dy[i], gate, shift, step.template identity_scales<V, kGranule, A>(tile, at));
    else result.put(i, dy[i], gate, shift);
  });
}

}  // namespace eca::cuda
