// Strategy stream for small planes whose tiles cannot have a halo, because the result is written
// over x or channels wrap around; and where maps begin anywhere in memory, such as slices of
// channels. As in stream.h, but a block has the planes of a tile as a run of runs.h.
#pragma once

#include "runs.h"
#include "stream.h"

namespace eca::cuda {

// Hands the sums of a tile's planes to the sample's last block, from the terms that all threads
// have put. True in that one.
template <class T, int kDepth, int kGranule>
__device__ inline bool give_sums(const Problem& problem, const Tiling& tiling,
                                 const SharedLayout& shared, const Workspace& work,
                                 const HeldTile& tile, const Run<T, kDepth, kGranule>& run,
                                 Shared<Accumulator<T>> terms, const StreamCounters& counters) {
  block_barrier();
  run.for_each_total(tile, tiling, terms, [&](int c, auto sum) {
    put_part<Layout::kPlanes>(problem, tiling, work, tile.sample, 0, tile.begin + c, sum);
  });
  return counters.arrive(shared_array<uint32_t>(shared.flag, 1));
}

// The numbers of a tile's channels, and one beyond the last, which the last vector reads too. By
// all threads, before finish_fetches() and a barrier.
template <class A>
__device__ inline void fetch_numbers(const HeldTile& tile, const void* numbers, Shared<A> to) {
  const A* const from = static_cast<const A*>(numbers) + tile.sample * tile.channels + tile.begin;
#pragma unroll 1
  for (int c = thread_index(); c < tile.own; c += kRunThreads) to.template fetch<1>(c, from + c);
  if (thread_index() == 0) to.set(tile.own, A(0));
}

// The elements of a tile, counted from its first one on. For a result that begins or ends within a
// line of 16 bytes: its lines decide where vectors begin, and the sources are read from anywhere.
template <class T>
struct TileElements {
  int64_t sample;
  int pixels, begin, count;

  __device__ TileElements(const Problem& problem, const HeldTile& tile)
      : sample(tile.sample), pixels(int(problem.pixels)), begin(tile.begin * pixels),
        count(tile.own * pixels) {}

  __device__ Cursor<T, std::integral_constant<int, 1>> cursor(const Map& map) const {
    return {static_cast<T*>(map.data) + sample * map.sample_stride + begin, {}};
  }

  // Whether they are whole lines of 16 bytes of a map.
  __device__ bool are_lines_of(const Map& map) const {
    return count % kVector<T> == 0 && place_in_line(cursor(map).first) == 0;
  }

  // use(i, width, plane, vector) for each vector of the source, and for each single element at the
  // ends.
  template <class Use>
  __device__ void for_each(const Map& source, const Map& result, const Divisor& by_pixels,
                           Use use) const {
    const auto from = cursor(source);
    const Stretch<T> stretch(count, cursor(result).first);
    with_choice(stretch.fits(from.first), [&](auto aligned) {
      stretch.template for_each<4>(
          thread_index(), kRunThreads,
          [&](int i, auto width) {
            return load_from<decltype(aligned)::value, decltype(width)::value>(from.at(i));
          },
          [&](int i, auto width, const auto& some) {
            use(i, width, PlaneAt(i, pixels, by_pixels), some);
          });
    });
  }
};

template <class T, int kDepth, int kGranule, class Step>
__global__ void __launch_bounds__(kRunThreads, run_blocks(kDepth))
    forward_stream_runs(Forward f, Tiling tiling, SharedLayout shared, Workspace work, Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& problem = f.problem;
  const StreamPart here(problem, tiling, int(tiling.tiles));
  if (!here.exists) return;
  const StreamCounters counters(problem, work, here.sample, int(tiling.tiles));
  const HeldTile tile(problem, tiling, here.sample, here.part);
  const Run<T, kDepth, kGranule> run(problem, tile);
  typename Run<T, kDepth, kGranule>::Held x;
  run.load_from_anywhere(f.x, x);
  if (here.rescales) {
    const auto gates = shared_array<A>(shared.gate, tiling.tile + 1);
    counters.wait();
    const uint32_t passed = counters.pass();
    fetch_numbers(tile, f.gate, gates);
    finish_fetches();
    block_barrier();
    const TileElements<T> elements(problem, tile);
    if (elements.are_lines_of(f.y)) {
      const auto result = step.forward(f.y, run);
      run.for_each_own(tiling.by_pixels, [&](int i, auto at) {
        result.put(i, x[i], by_element<V, kGranule>(gates, at));
      });
    } else {
      const auto result = step.forward(f.y, elements);
      elements.for_each(f.x, f.y, tiling.by_pixels,
                        [&](int i, auto width, auto at, const auto& some) {
                          result.put(i, some, by_element<decltype(width)::value, 1>(gates, at));
                        });
    }
    return counters.leave(passed);
  }

  const auto terms = shared_array<A>(shared.terms, kDepth * kRunThreads * V / kGranule);
#pragma unroll
  for (int i = 0; i < kDepth; ++i) run.put(i, widen(x[i]), terms);
  if (!give_sums(problem, tiling, shared, work, tile, run, terms, counters)) return;
  make_gates_of_sample<T, Layout::kPlanes>(f, tiling, shared, work,
                                           HeldTile::whole(problem, here.sample), counters, step);
}

// dm / S (samples, channels), dx, and what dweight is made from.
template <class T, int kDepth, int kGranule, class Step>
__global__ void __launch_bounds__(kRunThreads, run_blocks(kDepth))
    backward_stream_runs(Backward b, Tiling tiling, SharedLayout shared, Workspace work,
                         Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& problem = b.problem;
  const StreamPart here(problem, tiling, int(tiling.tiles));
  if (!here.exists) return;
  const StreamCounters counters(problem, work, here.sample, int(tiling.tiles));
  const HeldTile tile(problem, tiling, here.sample, here.part);
  const Run<T, kDepth, kGranule> run(problem, tile);
  typename Run<T, kDepth, kGranule>::Held dy;
  run.load_from_anywhere(b.dy, dy);
  const auto gradient = step.gradient(run);
  if (here.rescales) {
    const auto gates = shared_array<A>(shared.gate, tiling.tile + 1),
               shifts = shared_array<A>(shared.shift, tiling.tile + 1);
    counters.wait();
    const uint32_t passed = counters.pass();
    if (b.dx.data) {
      fetch_numbers(tile, b.gate, gates);
      fetch_numbers(tile, work.shift, shifts);
      finish_fetches();
      block_barrier();
      const TileElements<T> elements(problem, tile);
      if (elements.are_lines_of(b.dx)) {
        const auto result = step.backward(b.dx, run);
        run.for_each_own(tiling.by_pixels, [&](int i, auto at) {
          gradient(i, dy[i]);
          result.put(i, dy[i], by_element<V, kGranule>(gates, at),
                     by_element<V, kGranule>(shifts, at));
        });
      } else {
        const auto gradient_at = step.gradient(elements);
        const auto result = step.backward(b.dx, elements);
        elements.for_each(b.dy, b.dx, tiling.by_pixels, [&](int i, auto width, auto at, auto g) {
          constexpr int W = decltype(width)::value;
          gradient_at(i, g);
          result.put(i, g, by_element<W, 1>(gates, at), by_element<W, 1>(shifts, at));
        });
      }
    }
    return counters.leave(passed);
  }

  typename Run<T, kDepth, kGranule>::Held x;
  run.load_from_anywhere(b.x, x);
  const auto terms = shared_array<A>(shared.terms, kDepth * kRunThreads * V / kGranule);
  run.make_gradients(gradient, step.gradient(TileElements<T>(problem, tile)), dy);
#pragma unroll
  for (int i = 0; i < kDepth; ++i) run.put(i, products_of(dy[i], x[i]), terms);
  if (!give_sums(problem, tiling, shared, work, tile, run, terms, counters)) return;
  make_shifts_of_sample<T, Layout::kPlanes>(b, tiling, shared, work,
                                            HeldTile::whole(problem, here.sample), counters, step);
}

}  // namespace eca::cuda
