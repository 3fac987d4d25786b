// Strategy runs: a run of planes in registers, for planes that do not begin at multiples of 16
// bytes, such as 14x14 and 7x7 with elements of 2 bytes. The held planes are one run of elements,
// which the block reads in vectors. A vector may hold the end of one plane and the beginning of the
// next: then its sum is kept in two parts, and each element takes the gate of its own plane.
#pragma once

#include "registers.h"
#include "tile.h"

namespace eca::cuda {

// Of each vector's sum: the part before the border between two planes, and the part behind it.
template <class A>
struct BorderSums {
  Shared<A> before, behind;

  __device__ BorderSums(const SharedLayout& s, int vectors)
      : before(shared_array<A>(s.scratch, vectors)),
        behind(shared_array<A>(s.scratch + vectors * int(sizeof(A)), vectors)) {}
};

// A run of held planes, in vectors.
template <class T, int kDepth>
struct Run {
  static constexpr int V = kVector<T>;
  using A = Accumulator<T>;
  using Held = Vector<T, V>[kDepth];

  int pixels, vectors, lead;  // lead: elements of the first vector that belong to no held plane
  int first;                  // the held number of the first plane inside the map
  int planes;                 // inside the map
  int64_t begin;              // of the first vector, in a sample
  int64_t sample;
  uint32_t reciprocal;  // 2^32 / pixels, rounded up

  __device__ Run(const Problem& p, const HeldTile& tile)
      : pixels(int(p.pixels)), sample(tile.sample),
        reciprocal(uint32_t(0xffffffffu / uint32_t(p.pixels)) + 1) {
    const int from = max(0, tile.begin - tile.halo);
    const int to = min(tile.channels, tile.begin + tile.own + tile.halo);
    first = from - (tile.begin - tile.halo);
    planes = to - from;
    const int64_t element = int64_t(from) * pixels;
    begin = element / V * V;
    lead = int(element - begin);
    vectors = (lead + planes * pixels + V - 1) / V;
  }

  // Where a vector lies: the plane of its first element, -1 before the first plane, and how many
  // elements of that plane follow.
  struct Position {
    int plane, count;
  };

  __device__ Position position(int v) const {
    const int e = v * V - lead;
    if (e < 0) return {-1, lead};
    const int plane = int(multiply_high(uint32_t(e), reciprocal));
    return {plane, (plane + 1) * pixels - e};
  }

  __device__ int64_t offset(const Map& map) const { return sample * map.sample_stride + begin; }

  __device__ void load_from(const Map& map, Held& to) const {
    const T* const from = static_cast<const T*>(map.data) + offset(map);
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int v = thread_index() + i * thread_count();
      to[i] = {};
      if (v < vectors) to[i] = cuda::load<V>(from + int64_t(v) * V);
    }
  }

  __device__ void put_parts(int v, const Vector<A, V>& terms, const BorderSums<A>& sums) const {
    const int count = position(v).count;
    A first_part = 0, second_part = 0;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      if (e < count) first_part += terms.element[e];
      else second_part += terms.element[e];
    }
    sums.before.set(v, first_part);
    sums.behind.set(v, second_part);
  }

  // The sum of a plane by `lanes` threads, in all of them.
  __device__ A total(int plane, int lane, int lanes, const BorderSums<A>& sums) const {
    A sum = 0;
    if (plane >= 0 && plane < planes) {
      const int from = lead + plane * pixels, last = (from + pixels - 1) / V;
      for (int v = from / V + lane; v <= last; v += lanes)
        sum += v == from / V && from % V != 0 ? sums.behind.get(v) : sums.before.get(v);
    }
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    return sum;
  }

  // body(i, position, offset) for each vector of the tile itself, which is whole vectors.
  template <class Body>
  __device__ void for_each_own(const Map& map, const HeldTile& tile, Body body) const {
    const int from = (lead + (tile.halo - first) * pixels) / V;
    const int to = (lead + (tile.halo - first + tile.own) * pixels) / V;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      const int v = thread_index() + i * thread_count();
      if (v >= from && v < to) body(i, position(v), offset(map) + int64_t(v) * V);
    }
  }
};

// Each element gets the value of its plane, of the two that a vector may have.
template <int V, class A, class Position>
__device__ inline Vector<A, V> by_position(const Position& at, A first, A second) {
  Vector<A, V> values;
#pragma unroll
  for (int e = 0; e < V; ++e) values.element[e] = e < at.count ? first : second;
  return values;
}

template <class T, int kDepth, class Epilogue>
__global__ void __launch_bounds__(kRunThreads, kRunBlocks)
    forward_runs(Forward f, Tiling t, SharedLayout s, Epilogue epilogue) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& p = f.problem;
  const HeldTile tile(p, t);
  const Run<T, kDepth> run(p, tile);
  typename Run<T, kDepth>::Held x;
  run.load_from(f.x, x);
  const NearTaps<T> taps(p, f.weight, s);
  const Neighbours<A> means(p, t, s);
  const BorderSums<A> sums(s, kDepth * t.threads);
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    const int v = thread_index() + i * thread_count();
    if (v < run.vectors) run.put_parts(v, widen(x[i]), sums);
  }
  block_barrier();

  const int teams = t.threads / t.lanes, lane = thread_index() % t.lanes;
  for (int base = 0; base < tile.held; base += teams) {
    const int h = base + thread_index() / t.lanes;
    const A sum = run.total(h - run.first, lane, t.lanes, sums);
    if (lane == 0 && h < tile.held) means.set(h, sum / A(int(p.pixels)));
  }
  means.clear_ends();
  block_barrier();

  // One gate beyond the last, which the last vector reads too.
  const auto gates = shared_array<A>(s.gate, t.tile + 1);
  for (int c = thread_index(); c <= tile.own; c += thread_count()) {
    if (c == tile.own) {
      gates.set(c, A(0));
      continue;
    }
    const int h = c + tile.halo, channel = tile.begin + c;
    const A gate = gate_of(means, taps, channel, h);
    gates.set(c, gate);
    put_mean_and_gate(f, tile.sample * p.channels + channel, means.get(h), gate);
  }
  block_barrier();

  run.for_each_own(f.y, tile, [&](int i, auto at, int64_t offset) {
    const int c = at.plane + run.first - tile.halo;
    store(static_cast<T*>(f.y.data) + offset,
          epilogue.forward(x[i], by_position<V>(at, gates.get(c), gates.get(c + 1)), offset));
  });
}

// dz (samples, channels), and dx.
template <class T, int kDepth, class Epilogue>
__global__ void __launch_bounds__(kRunThreads, kRunBlocks)
    backward_runs(Backward b, Tiling t, SharedLayout s, Workspace work, Epilogue epilogue) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& p = b.problem;
  const HeldTile tile(p, t);
  const Run<T, kDepth> run(p, tile);
  typename Run<T, kDepth>::Held dy, x;
  run.load_from(b.dy, dy);
  run.load_from(b.x, x);
  const NearTaps<T> taps(p, b.weight, s);
  const Neighbours<A> dz(p, t, s);
  const auto gates = shared_array<A>(s.gate, t.held + 1),
             shifts = shared_array<A>(s.shift, t.tile + 1);
  const A* const sample_gates = static_cast<const A*>(b.gate) + tile.sample * p.channels;
  for (int h = thread_index(); h <= tile.held; h += thread_count()) {
    const int channel = h < tile.held ? tile.channel(h) : -1;
    gates.set(h, channel < 0 ? A(0) : value_at(sample_gates + channel));
  }
  const BorderSums<A> sums(s, kDepth * t.threads);
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    const int v = thread_index() + i * thread_count();
    if (v < run.vectors) run.put_parts(v, products_of(dy[i], x[i], epilogue), sums);
  }
  block_barrier();

  const int teams = t.threads / t.lanes, lane = thread_index() % t.lanes;
  for (int base = 0; base < tile.held; base += teams) {
    const int h = base + thread_index() / t.lanes;
    const A sum = run.total(h - run.first, lane, t.lanes, sums);
    if (lane != 0 || h >= tile.held) continue;
    const A gate = gates.get(h), value = sum * gate * (A(1) - gate);
    dz.set(h, value);
    if (b.dweight && tile.is_own(h))
      put(static_cast<A*>(work.dz) + tile.sample * p.channels + tile.channel(h), value);
  }
  dz.clear_ends();
  block_barrier();
  if (!b.dx.data) return;

  for (int c = thread_index(); c <= tile.own; c += thread_count())
    shifts.set(c, c == tile.own ? A(0) : dm_of(tile, dz, taps, c + tile.halo) / A(int(p.pixels)));
  block_barrier();
  run.for_each_own(b.dx, tile, [&](int i, auto at, int64_t offset) {
    const int h = at.plane + run.first, c = h - tile.halo;
    store(static_cast<T*>(b.dx.data) + offset,
          dx_of(dy[i], by_position<V>(at, gates.get(h), gates.get(h + 1)),
                by_position<V>(at, shifts.get(c), shifts.get(c + 1)), epilogue));
  });
}

}  // namespace eca::cuda
