// Strategies A, B and D: a tile in shared memory. Forward reads x once and writes y once; backward
// reads dy and x once and writes dx once.
//
// A group of blocks holds a tile of channels of one sample, with the halo that its gates need. It
// sums them, exchanges the sums, makes the gates and rescales the tile. Neighbouring groups read
// each other's halos at about the same time, so these come from the L2 cache.
#pragma once

#include "dweight.h"
#include "epilogue.h"
#include "group.h"
#include "tile.h"

namespace eca::cuda {

template <class T, Layout kLayout>
using TileOf = std::conditional_t<kLayout == Layout::kPlanes, Planes<T>, Pixels<T>>;

// Of a channel: the gate, and what is added to gate * dy.
template <class A>
struct GateAndShift {
  A gate, shift;
};

template <class T, Layout kLayout, class Epilogue>
__global__ void __launch_bounds__(kMostThreads, 65536 / kMostThreads / kForwardRegisters)
    forward_on_chip(Forward f, Tiling t, SharedLayout s, Workspace work, Epilogue epilogue) {
  using A = Accumulator<T>;
  const Problem& p = f.problem;
  const auto flag = shared_array<uint32_t>(s.flag, 1);
  Group<A> group(t, start_order(t, work.counters, flag), work);
  const int64_t sample = group.sample(), tile = group.tile();
  const HeldChannels held(p, t, tile);
  const TileOf<T, kLayout> block(p, t, held, group.rank());

  const int place = block.place(f.x, sample);
  const auto x = shared_array<T>(s.held, (s.staged - s.held) / int(sizeof(T)));
  Copies copies(shared_array<uint64_t>(s.barrier, 1));
  block.copy(copies, f.x, sample, x, place);
  copies.wait();

  const auto sums = shared_array<A>(s.sums, t.held);
  const auto scratch = shared_array<A>(s.scratch, (s.held - s.scratch) / int(sizeof(A)));
  const auto sum = [&](auto width) {
    constexpr int V = decltype(width)::value;
    block.template sum<V>(
        sums, scratch, [&](int h) { return block.on_chip_line(x, place, h); },
        [](int, const Vector<T, V>& v, int) {
          Vector<A, V> terms;
#pragma unroll
          for (int e = 0; e < V; ++e) terms.element[e] = widen(v.element[e]);
          return terms;
        });
  };
  if (t.vectors) sum(std::integral_constant<int, kVector<T>>{});
  else sum(std::integral_constant<int, 1>{});

  const Window window{p.channels, held.begin, held.own, t.pad, p.circular};
  const auto means = shared_array<A>(s.padded, t.tile + 2 * t.pad);
  group.exchange(sums, held.held);
  for (int i = thread_index(); i < window.count(); i += thread_count()) {
    const int h = held.at(window, i);
    means.set(i, h < 0 ? A(0) : group.total(sums, h) / A(p.pixels));
  }
  group.done_reading();
  block_barrier();

  const auto gates = shared_array<A>(s.gate, t.tile);
  const Taps<T> taps(p, f.weight);
  for (int c = thread_index(); c < held.own; c += thread_count()) {
    const A gate = sigmoid(convolve(window, taps, means, c));
    gates.set(c, gate);
    if (group.rank() != 0 || !f.mean) continue;
    const int64_t i = sample * p.channels + held.begin + c;
    put(static_cast<A*>(f.mean) + i, means.get(c + t.pad));
    put(static_cast<A*>(f.gate) + i, gate);
  }
  block_barrier();

  block.for_each(
      t, f.y, sample, place, [&](int c) { return gates.get(c); },
      [&](const auto& gate, int i, int64_t offset) {
        constexpr int V = sizeof(gate) / sizeof(A);
        const Vector<T, V> v = x.template load<V>(block.on_chip(i, place));
        store(static_cast<T*>(f.y.data) + offset, epilogue.forward(v, gate));
      });
  group.finish();
}

template <class T, Layout kLayout, class Epilogue>
__global__ void __launch_bounds__(kMostThreads, 65536 / kMostThreads / kBackwardRegisters)
    backward_on_chip(Backward b, Tiling t, SharedLayout s, Workspace work, Epilogue epilogue) {
  using A = Accumulator<T>;
  const Problem& p = b.problem;
  const auto flag = shared_array<uint32_t>(s.flag, 1);
  Group<A> group(t, start_order(t, work.counters, flag), work);
  const int64_t sample = group.sample(), tile = group.tile();
  const HeldChannels held(p, t, tile);
  const TileOf<T, kLayout> block(p, t, held, group.rank());

  const int place = block.place(b.dy, sample), x_place = block.place(b.x, sample);
  const auto dy = shared_array<T>(s.held, (s.staged - s.held) / int(sizeof(T)));
  const auto x = shared_array<T>(s.staged, (s.end - s.staged) / int(sizeof(T)));
  Copies copies(shared_array<uint64_t>(s.barrier, 1));
  block.copy(copies, b.dy, sample, dy, place);
  if (t.stage_x) block.copy(copies, b.x, sample, x, x_place);
  copies.wait();

  const auto sums = shared_array<A>(s.sums, t.held);
  const auto scratch = shared_array<A>(s.scratch, (s.held - s.scratch) / int(sizeof(A)));
  const auto sum = [&](auto width, auto line) {
    constexpr int V = decltype(width)::value;
    block.template sum<V>(sums, scratch, line, [&](int h, const Vector<T, V>& v, int step) {
      const Vector<T, V> g = block.on_chip_line(dy, place, h).template load<V>(step);
      Vector<A, V> terms;
#pragma unroll
      for (int e = 0; e < V; ++e)
        terms.element[e] = epilogue.gradient(g.element[e]) * widen(v.element[e]);
      return terms;
    });
  };
  if (t.stage_x)
    sum(std::integral_constant<int, 1>{}, [&](int h) { return block.on_chip_line(x, x_place, h); });
  else
    sum(std::integral_constant<int, kVector<T>>{},
        [&](int h) { return block.global_line(b.x, sample, h); });

  const Window window{p.channels, held.begin, held.own, t.pad, p.circular};
  const auto dz = shared_array<A>(s.padded, t.tile + 2 * t.pad);
  const A* const sample_gates = static_cast<const A*>(b.gate) + sample * p.channels;
  group.exchange(sums, held.held);
  for (int i = thread_index(); i < window.count(); i += thread_count()) {
    const int h = held.at(window, i);
    A value = 0;
    if (h >= 0) {
      const A gate = value_at(sample_gates + window.channel(i));
      value = group.total(sums, h) * gate * (A(1) - gate);
    }
    dz.set(i, value);
  }
  group.done_reading();
  block_barrier();

  if (b.dx.data) {
    const auto gates = shared_array<A>(s.gate, t.tile), shifts = shared_array<A>(s.shift, t.tile);
    const Taps<T> taps(p, b.weight);
    for (int c = thread_index(); c < held.own; c += thread_count()) {
      gates.set(c, value_at(sample_gates + held.begin + c));
      shifts.set(c, convolve_transposed(window, taps, dz, c) / A(p.pixels));
    }
    block_barrier();
    block.for_each(
        t, b.dx, sample, place, [&](int c) { return GateAndShift<A>{gates.get(c), shifts.get(c)}; },
        [&](const auto& values, int i, int64_t offset) {
          constexpr int V = sizeof(values) / sizeof(GateAndShift<A>);
          const Vector<T, V> g = dy.template load<V>(block.on_chip(i, place));
          Vector<T, V> dx;
#pragma unroll
          for (int e = 0; e < V; ++e)
            dx.element[e] = narrow<T>(values.element[e].gate * epilogue.gradient(g.element[e]) +
                                      values.element[e].shift);
          store(static_cast<T*>(b.dx.data) + offset, dx);
        });
  }
  if (group.rank() == 0) {
    const A* const means = static_cast<const A*>(b.mean) + sample * p.channels;
    leave_dweight<T>(
        b, work, sample, held.begin, held.own, sample * t.tiles + tile, thread_index() / 32,
        thread_count() / 32, [&](int c) { return dz.get(c + t.pad); },
        [&](int c, int j) { return mean_under_tap(p, means, held.begin + c, j); });
  }
  group.finish();
}

}  // namespace eca::cuda
