// Strategy kept: pixels, where several blocks together hold a sample. A block keeps a part of the
// sample's pixels, with all their channels: in registers, and in shared memory what those cannot
// hold. It adds up its part, waits until the last block of the sample has made the gates, and
// rescales what it has kept.
//
// A block also waits for blocks of higher numbers. All blocks of a sample have room at the same
// time, beside those of other streams, and a GPU starts blocks in order. So the sample that began
// first never waits for a block that cannot start.
#pragma once

#include "stream.h"

namespace eca::cuda {

// A thread's vectors that its registers cannot hold: in shared memory, where it alone uses them.
template <class T, int kDepth>
class Spare {
 public:
  static constexpr int V = kVector<T>;
  using A = Accumulator<T>;

  __device__ Spare(const Tiling& tiling, const SharedLayout& shared,
                   const Column<T, kDepth>& column)
      : places_(shared_array<T>(shared.held, tiling.spare * tiling.threads * V)),
        end_(min(tiling.share, (column.left + column.rows - 1) / column.rows)) {}

  __device__ void fetch_from(const Cursor<T, int64_t>& from) const {
#pragma unroll 4
    for (int i = kDepth; i < end_; ++i) places_.template fetch<V>(place(i), from.at(i));
  }

  __device__ void add_to(Vector<A, V>& sums) const {
#pragma unroll 2
    for (int i = kDepth; i < end_; ++i) add_all(sums, widen(get(i)));
  }

  // Adds the gradients, made of the kept dy, times x, kAtOnce vectors at a time.
  template <int kAtOnce, class Gradient>
  __device__ void add_products_to(const Cursor<T, int64_t>& x, const Gradient& gradient,
                                  Vector<A, V>& sums) const {
#pragma unroll 1
    for (int first = kDepth; first < end_; first += kAtOnce) {
      Vector<T, V> some[kAtOnce] = {};
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (first + u < end_) some[u] = load<V>(x.at(first + u));
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        if (first + u >= end_) continue;
        Vector<T, V> g = get(first + u);
        gradient(first + u, g);
        add_all(sums, products_of(g, some[u]));
      }
    }
  }

  // body(i, vector) for each.
  template <class Body>
  __device__ void for_each(Body body) const {
#pragma unroll 2
    for (int i = kDepth; i < end_; ++i) body(i, get(i));
  }

  __device__ int end() const { return end_; }
  __device__ Vector<T, V> get(int i) const { return places_.template load<V>(place(i)); }
  __device__ void set(int i, const Vector<T, V>& v) const {
    places_.template store<V>(place(i), v);
  }

 private:
  __device__ int place(int i) const { return ((i - kDepth) * thread_count() + thread_index()) * V; }

  Shared<T> places_;
  int end_;
};

// Which sample, and which part of its pixels.
struct KeptPart {
  int64_t sample;
  int part, begin, end;  // pixels

  // Divisions are of 32 bits: one of 64 would take 100 instructions.
  __device__ KeptPart(const Problem& problem, const Tiling& tiling, int rows)
      : sample(uint32_t(block_index()) / uint32_t(tiling.parts)),
        part(int(uint32_t(block_index()) - uint32_t(sample) * uint32_t(tiling.parts))),
        begin(part * tiling.share * rows),
        end(min(int(problem.pixels), begin + tiling.share * rows)) {}
};

// Leaves a block's sums for the last block of the sample. counters.arrive() comes later.
template <class T, int kDepth>
__device__ inline void leave_sums(const Problem& problem, const Tiling& tiling,
                                  const SharedLayout& shared, const Workspace& work,
                                  const KeptPart& here, const Column<T, kDepth>& column,
                                  const Vector<Accumulator<T>, kVector<T>>& sums) {
  const auto parts = sums_in<T, Layout::kPixels>(tiling, shared);
  column.put_parts(sums, tiling.held, parts);
  block_barrier();
  for (int c = thread_index(); c < tiling.held; c += thread_count())
    put_part<Layout::kPixels>(problem, tiling, work, here.sample, here.part, c,
                              column.total(c, tiling.held, parts));
}

template <class T, int kDepth, class Step>
__global__ void __launch_bounds__(kColumnThreads,
                                  resident_blocks(kept_blocks(false, Step::kWholeTiles)))
    forward_kept(Forward f, Tiling tiling, SharedLayout shared, Workspace work, Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& problem = f.problem;
  const KeptPart here(problem, tiling, tiling.threads / (tiling.held / V));
  const HeldTile tile(problem, tiling, here.sample, 0);
  const StreamCounters counters(problem, work, here.sample, tiling.parts);
  const Column<T, kDepth> column(problem, tiling, tile, here.begin, here.end);
  const Spare<T, kDepth> spare(tiling, shared, column);
  typename Column<T, kDepth>::Held x;
  const auto xs = column.cursor(f.x);
  spare.fetch_from(xs);
  column.load_from(xs, x);
  Vector<A, V> sums{};
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    add_all(sums, widen(x[i]));
    forget(x[i]);
  }
  finish_fetches();
  spare.add_to(sums);
  leave_sums<T>(problem, tiling, shared, work, here, column, sums);
  if (counters.arrive(shared_array<uint32_t>(shared.flag, 1)))
    make_gates_of_sample<T, Layout::kPixels>(f, tiling, shared, work, tile, counters, step);
  counters.wait();
  const uint32_t passed = counters.pass();
  if constexpr (Step::kWholeTiles) {
    const A* const gates = static_cast<const A*>(f.gate) + here.sample * problem.channels;
    for (int c = thread_index(); c < tile.own; c += thread_count())
      step.put_terms(shared, tile, c, value_at(gates + c));
    block_barrier();
    if (column.any()) step.write(f.y, column, x, shared, tile, spare);
  } else if (column.any()) {
    const Vector<A, V> gate =
        numbers_from<V, A>(f.gate, here.sample * problem.channels + column.channel);
    const auto result = step.forward(f.y, column);
    column.for_each([&](int i) { result.put(i, x[i], gate); });
    spare.for_each([&](int i, const Vector<T, V>& some) { result.put(i, some, gate); });
  }
  counters.leave(passed);
}

// dm / S (samples, channels), dx, and what dweight is made from; what a tail has in their place.
template <class T, int kDepth, class Step>
__global__ void __launch_bounds__(kColumnThreads,
                                  resident_blocks(kept_blocks(true, Step::kWholeTiles)))
    backward_kept(Backward b, Tiling tiling, SharedLayout shared, Workspace work, Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& problem = b.problem;
  const KeptPart here(problem, tiling, tiling.threads / (tiling.held / V));
  const HeldTile tile(problem, tiling, here.sample, 0);
  const StreamCounters counters(problem, work, here.sample, tiling.parts);
  const Column<T, kDepth> column(problem, tiling, tile, here.begin, here.end);
  const Spare<T, kDepth> spare(tiling, shared, column);
  typename Column<T, kDepth>::Held dy;
  const auto dys = column.cursor(b.dy);
  spare.fetch_from(dys);
  column.load_from(dys, dy);
  if constexpr (Step::kWholeTiles) {
    typename Step::template ColumnSums<T> sums{};
    step.add_held(column.again(), dy, sums);
    finish_fetches();
    step.add_spares(column, spare, sums);
    leave_sums<T>(problem, tiling, shared, work, here, column, sums.of_g);
    block_barrier();  // all have read the first sums
    leave_sums<T>(problem, tiling, shared, second_sums<T, Layout::kPixels>(problem, tiling, work),
                  here, column, sums.by_x);
  } else {
    Vector<A, V> sums{};
    constexpr int kAtOnce = 4;
    const auto gradient = step.gradient(column);
    const auto xs = column.cursor(b.x);
    add_products<kAtOnce>(column, dy, xs, gradient, sums);
    finish_fetches();
    spare.template add_products_to<kAtOnce>(xs, gradient, sums);
    leave_sums<T>(problem, tiling, shared, work, here, column, sums);
  }
  if (counters.arrive(shared_array<uint32_t>(shared.flag, 1)))
    make_shifts_of_sample<T, Layout::kPixels>(b, tiling, shared, work, tile, counters, step);
  counters.wait();
  const uint32_t passed = counters.pass();
  const int64_t channels = here.sample * problem.channels;
  if constexpr (Step::kWholeTiles) {
    const auto gates = shared_array<A>(shared.gate, tiling.held),
               shifts = shared_array<A>(shared.shift, tiling.tile);
    const A* const sample_gates = static_cast<const A*>(b.gate) + channels;
    for (int c = thread_index(); c < tile.own; c += thread_count())
      step.put_factors(shared, tile, c, value_at(sample_gates + c),
                       step.template dmean<A>(tile.sample, c), A(tiling.factor), gates, shifts);
    block_barrier();
    if (column.any()) step.write(column.again(), dy, shared, tile, gates, shifts, spare);
  } else if (column.any() && b.dx.data) {
    const int64_t at = channels + column.channel;
    const Vector<A, V> gate = numbers_from<V, A>(b.gate, at);
    const Vector<A, V> shift = numbers_from<V, A>(work.shift, at);
    const auto gradient = step.gradient(column);
    const auto result = step.backward(b.dx, column);
    column.for_each([&](int i) { result.put(i, dy[i], gate, shift); });
    spare.for_each([&](int i, Vector<T, V> g) {
      gradient(i, g);
      result.put(i, g, gate, shift);
    });
  }
  counters.leave(passed);
}

}  // namespace eca::cuda
