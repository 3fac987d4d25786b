// Strategy columns: pixels in registers. A block holds all pixels of a few columns, each one vector
// of channels wide. A thread keeps to one column and takes every rows-th pixel. One more column on
// either side, the halo, is summed like the others but not stored.
#pragma once

#include "registers.h"

namespace eca::cuda {

// By vectors of up to 16 bytes, from a multiple of V on.
template <class A, int V>
__device__ inline void store_all(int at, const Vector<A, V>& values, Shared<A> to) {
  constexpr int W = V * int(sizeof(A)) < 16 ? V : 16 / int(sizeof(A));
#pragma unroll
  for (int e = 0; e < V; e += W) {
    Vector<A, W> some;
#pragma unroll
    for (int u = 0; u < W; ++u) some.element[u] = values.element[e + u];
    to.template store<W>(at + e, some);
  }
}

// A thread's part of the held columns.
template <class T, int kDepth>
struct Column {
  static constexpr int V = kVector<T>;
  using A = Accumulator<T>;
  using Held = Vector<T, V>[kDepth];

  int rows;       // pixels that the block takes at a time
  int held, row;  // the held number of the column's first channel, and which of these pixels
  int first;      // pixel
  int channel;    // -1 where there is none, and for threads that are left over
  int left;       // pixels from this thread's first on; these have none
  int64_t sample;

  // For the pixels [begin, end).
  __device__ Column(const Problem& problem, const Tiling& tiling, const HeldTile& tile, int begin,
                    int end)
      : sample(tile.sample) {
    const int columns = tiling.held / V;
    rows = tiling.threads / columns;
    row = quotient(thread_index(), tiling.by_columns);
    held = (thread_index() - row * columns) * V;
    channel = row < rows && held < tile.held ? tile.channel(held) : -1;
    first = begin + row;
    left = channel < 0 ? 0 : end - first;
  }

  __device__ bool has(int i) const { return i * rows < left; }

  __device__ bool any() const { return left > 0; }

  // This column, of which the compiler makes the vectors' positions again: kept, each takes a
  // register.
  __device__ Column again() const {
    Column column = *this;
    column.rows = hidden(rows);
    return column;
  }

  __device__ int64_t offset(const Map& map) const {
    return sample * map.sample_stride + first * map.row_stride + channel;
  }

  __device__ Cursor<T, int64_t> cursor(const Map& map) const {
    return {pinned(static_cast<T*>(map.data) + (any() ? offset(map) : 0)), rows * map.row_stride};
  }

  __device__ void load_from(const Map& map, Held& to) const { load_from(cursor(map), to); }

  __device__ void load_from(const Cursor<T, int64_t>& from, Held& to) const {
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      to[i] = {};
      if (has(i)) to[i] = cuda::load<V>(from.at(i));
    }
  }

  // body(i) for each vector that this thread has.
  template <class Body>
  __device__ void for_each(Body body) const {
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
      if (has(i)) body(i);
  }

  // Each thread's sums of its channels, for total(). `parts` is (rows, held).
  __device__ void put_parts(const Vector<A, V>& sums, int all_held, Shared<A> parts) const {
    if (row < rows) store_all(row * all_held + held, sums, parts);
  }

  __device__ A total(int h, int all_held, Shared<A> parts) const {
    A sum = 0;
#pragma unroll 4
    for (int r = 0; r < rows; ++r) sum += parts.get(r * all_held + h);
    return sum;
  }
};

// The values of the channels of a vector, from a multiple of V on.
template <int V, class A>
__device__ inline Vector<A, V> values_from(Shared<A> values, int at) {
  constexpr int W = 16 / int(sizeof(A));
  static_assert(V % W == 0);
  Vector<A, V> v;
#pragma unroll
  for (int e = 0; e < V; e += W) {
    const Vector<A, W> some = values.template load<W>(at + e);
#pragma unroll
    for (int u = 0; u < W; ++u) v.element[e + u] = some.element[u];
  }
  return v;
}

template <class A, int V>
__device__ inline void add_all(Vector<A, V>& sums, const Vector<A, V>& more) {
#pragma unroll
  for (int e = 0; e < V; ++e) sums.element[e] += more.element[e];
}

// Makes gradients of dy, and adds them times x. It reads kAtOnce vectors of x at a time and keeps
// none: dy may fill the registers.
template <int kAtOnce, class T, int kDepth, class Gradient>
__device__ inline void add_products(const Column<T, kDepth>& column,
                                    typename Column<T, kDepth>::Held& dy,
                                    const Cursor<T, int64_t>& x, const Gradient& gradient,
                                    Vector<Accumulator<T>, kVector<T>>& sums) {
  constexpr int V = kVector<T>;
#pragma unroll
  for (int first = 0; first < kDepth; first += kAtOnce) {
    Vector<T, V> some[kAtOnce] = {};
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (first + u < kDepth && column.has(first + u)) some[u] = load<V>(x.at(first + u));
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (first + u >= kDepth) continue;
      if (column.has(first + u)) gradient(first + u, dy[first + u]);
      add_all(sums, products_of(dy[first + u], some[u]));
    }
  }
}

// A column's vectors in registers, by the names of Spare in kept.h.
template <class T, int kDepth>
struct HeldVectors {
  typename Column<T, kDepth>::Held& held;

  __device__ Vector<T, kVector<T>> get(int i) const { return held[i]; }
  __device__ void set(int i, const Vector<T, kVector<T>>& v) const { held[i] = v; }
};

// As Spare of kept.h, where registers hold everything.
struct NoSpares {
  template <class Body>
  __device__ void for_each(Body) const {}
};

template <class T, int kDepth, class Step>
__global__ void __launch_bounds__(kColumnThreads, resident_blocks(column_blocks(kDepth)))
    forward_columns(Forward f, Tiling tiling, SharedLayout shared, Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& problem = f.problem;
  const HeldTile tile(problem, tiling);
  const Column<T, kDepth> column(problem, tiling, tile, 0, int(problem.pixels));
  typename Column<T, kDepth>::Held x;
  column.load_from(f.x, x);
  const NearTaps<T> taps(problem, f.weight, shared);
  taps.put();
  const Neighbours<A> means(problem, tiling, shared.padded);
  const auto parts = shared_array<A>(shared.scratch, column.rows * tiling.held);
  Vector<A, V> sums{};
#pragma unroll
  for (int i = 0; i < kDepth; ++i) add_all(sums, widen(x[i]));
  column.put_parts(sums, tiling.held, parts);
  block_barrier();
  for (int h = thread_index(); h < tile.held; h += thread_count()) {
    const int channel = tile.channel(h);  // -1 beyond the ends, where the sum is zero
    A mean = column.total(h, tiling.held, parts) * tiling.factor;
    if (channel >= 0) mean = step.pooled(tile.sample, channel, tile.is_own(h), mean);
    means.set(h, mean);
  }
  means.clear_ends();
  block_barrier();

  const auto gates = shared_array<A>(shared.gate, tiling.tile);
  const MeansAndGates<A, Step> small(f, tile);
  for (int c = thread_index(); c < tile.own; c += thread_count()) {
    const int h = c + tile.halo, channel = tile.begin + c;
    const A gate = gate_of(means, taps, channel, h);
    if constexpr (Step::kWholeTiles) step.put_terms(shared, tile, c, gate);
    else gates.set(c, gate);
    small.put(c, means.get(h), gate);
  }
  block_barrier();
  if (!column.any() || !tile.is_own(column.held)) return;
  if constexpr (Step::kWholeTiles) {
    step.write(f.y, column, x, shared, tile, NoSpares{});
  } else {
    const Vector<A, V> gate = values_from<V>(gates, column.held - tile.halo);
    const auto result = step.forward(f.y, column);
    column.for_each([&](int i) { result.put(i, x[i], gate); });
  }
}

// dx, and what dweight is made from.
template <class T, int kDepth, class Step>
__global__ void __launch_bounds__(kColumnThreads, resident_blocks(column_blocks(kDepth)))
    backward_columns(Backward b, Tiling tiling, SharedLayout shared, Workspace work, Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& problem = b.problem;
  const HeldTile tile(problem, tiling);
  const Column<T, kDepth> column(problem, tiling, tile, 0, int(problem.pixels));
  typename Column<T, kDepth>::Held dy;
  column.load_from(b.dy, dy);
  const NearTaps<T> taps(problem, b.weight, shared);
  const Neighbours<A> dz(problem, tiling, shared.padded);
  const auto parts = shared_array<A>(shared.scratch, column.rows * tiling.held);
  const DweightMeans<T> means(b, tiling, shared, tile);
  const auto gates = shared_array<A>(shared.gate, tiling.held),
             shifts = shared_array<A>(shared.shift, tiling.tile);
  fetch_gates_and_means(b, tile, gates, means, step);
  if constexpr (Step::kWholeTiles) {
    taps.put();
    step.make_dz(column, dy, tile, tiling, parts, gates, dz);
  } else {
    Vector<A, V> sums{};
    add_products<4>(column, dy, column.cursor(b.x), step.gradient(column), sums);
    column.put_parts(sums, tiling.held, parts);
    taps.put();
    finish_fetches();
    block_barrier();
    for (int h = thread_index(); h < tile.held; h += thread_count()) {
      const A gate = gates.get(h);
      dz.set(h, column.total(h, tiling.held, parts) * gate * (A(1) - gate));
    }
  }
  dz.clear_ends();
  means.clear_ends();
  block_barrier();
  means.leave_dweight(b, work, tile, dz);
  if (!(b.dx.data || Step::kWholeTiles)) return;

  const Shared<A> own_gates = gates.from(tile.halo);
  for (int c = thread_index(); c < tile.own; c += thread_count()) {
    const A dm = dm_of(tile, dz, taps, c + tile.halo);
    if constexpr (Step::kWholeTiles) {
      step.put_dmean(tile.sample, tile.begin + c, dm);
      step.put_factors(shared, tile, c, own_gates.get(c), dm, A(tiling.factor), own_gates, shifts);
    } else {
      shifts.set(c, dm * tiling.factor);
    }
  }
  block_barrier();
  if (!column.any() || !tile.is_own(column.held)) return;
  if constexpr (Step::kWholeTiles) {
    step.write(column.again(), dy, shared, tile, own_gates, shifts, NoSpares{});
  } else {
    const Vector<A, V> gate = values_from<V>(gates, column.held);
    const Vector<A, V> shift = values_from<V>(shifts, column.held - tile.halo);
    const auto result = step.backward(b.dx, column);
    column.for_each([&](int i) { result.put(i, dy[i], gate, shift); });
  }
}

}  // namespace eca::cuda
