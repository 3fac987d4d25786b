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

 private:
  __device__ int place(int i) const { return ((i - kDepth) * thread_count() + thread_index()) * V; }
  __device__ Vector<T, V> get(int i) const { return places_.template load<V>(place(i)); }

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

// Hands a block's sums to the last block of the sample. True in that one.
template <class T, int kDepth>
__device__ inline bool give_sums(const Problem& problem, const Tiling& tiling,
                                 const SharedLayout& shared, const Workspace& work,
                                 const KeptPart& here, const Column<T, kDepth>& column,
                                 const Vector<Accumulator<T>, kVector<T>>& sums,
                                 const StreamCounters& counters) {
  const auto parts = sums_in<T, Layout::kPixels>(tiling, shared);
  column.put_parts(sums, tiling.held, parts);
  block_barrier();
  for (int c = thread_index(); c < tiling.held; c += thread_count())
    put_part<Layout::kPixels>(problem, tiling, work, here.sample, here.part, c,
                              column.total(c, tiling.held, parts));
  return counters.arrive(shared_array<uint32_t>(shared.flag, 1));
}

template <class T, int kDepth, class Step>
__global__ void __launch_bounds__(kColumnThreads, resident_blocks(kept_blocks(false)))
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
  if (give_sums<T>(problem, tiling, shared, work, here, column, sums, counters))
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

// dm / S (samples, channels), dx, and what dweight is made from.
template <class T, int kDepth, class Step>
__global__ void __launch_bounds__(kColumnThreads, resident_blocks(kept_blocks(true)))
    backward_kept(Backward b, Tiling tiling, SharedLayout shared, Workspace work, Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>, kAtOnce = 4;
  const Problem& problem = b.problem;
  const KeptPart here(problem, tiling, tiling.threads / (tiling.held / V));
  const HeldTile tile(problem, tiling, here.sample, 0);
  const StreamCounters counters(problem, work, here.sample, tiling.parts);
  const Column<T, kDepth> column(problem, tiling, tile, here.begin, here.end);
  const Spare<T, kDepth> spare(tiling, shared, column);
  typename Column<T, kDepth>::Held dy;
  const auto dys = column.cursor(b.dy), xs = column.cursor(b.x);
  spare.fetch_from(dys);
  column.load_from(dys, dy);
  Vector<A, V> sums{};
  const auto gradient = step.gradient(column);
  add_products<kAtOnce>(column, dy, xs, gradient, sums);
  finish_fetches();
  spare.template add_products_to<kAtOnce>(xs, gradient, sums);
  if (give_sums<T>(problem, tiling, shared, work, here, column, sums, counters))
    make_shifts_of_sample<T, Layout::kPixels>(b, tiling, shared, work, tile, counters, step);
  counters.wait();
  const uint32_t passed = counters.pass();
  if (column.any() && b.dx.data) {
    const int64_t at = here.sample * problem.channels + column.channel;
    const Vector<A, V> gate = numbers_from<V, A>(b.gate, at);
    const Vector<A, V> shift = numbers_from<V, A>(work.shift, at);
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
