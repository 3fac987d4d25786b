// Strategy stream for planes that no block can hold: as in stream.h, but a block has a part of a
// plane, which its threads hold as a team of rows.h.
#pragma once

#include "rows.h"
#include "stream.h"

namespace eca::cuda {

// The part of a plane that a block has.
template <class T, int kDepth>
struct RowPart {
  int channel, part;  // of the plane
  Row<T, kDepth> row;

  __device__ RowPart(const Problem& problem, const Tiling& tiling, const StreamPart& here)
      : channel(quotient(here.part, tiling.by_parts)), part(here.part - channel * tiling.parts),
        row(thread_count(), here.sample, channel, part * tiling.share,
            min(tiling.share, int(problem.pixels) / kVector<T> - part * tiling.share)) {}
};

// Adds up the terms that the threads hold and hands the sum to the sample's last block. True in
// that one.
template <class T, int kDepth>
__device__ inline bool give_sum(const Problem& problem, const Tiling& tiling,
                                const SharedLayout& shared, const Workspace& work,
                                const StreamPart& here, const RowPart<T, kDepth>& part,
                                const ChainedSum<Accumulator<T>>& sum,
                                const StreamCounters& counters) {
  using A = Accumulator<T>;
  const A total = part.row.total(sum.total(), shared_array<A>(shared.scratch, tiling.threads / 32));
  if (thread_index() == 0)
    put_part<Layout::kPlanes>(problem, tiling, work, here.sample, part.part, part.channel, total);
  return counters.arrive(shared_array<uint32_t>(shared.flag, 1));
}

template <class T, int kDepth, class Step>
__global__ void __launch_bounds__(kColumnThreads, resident_blocks(stream_blocks(false)))
    forward_stream_planes(Forward f, Tiling tiling, SharedLayout shared, Workspace work,
                          Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& problem = f.problem;
  const StreamPart here(problem, tiling, int(problem.channels) * tiling.parts);
  if (!here.exists) return;
  const StreamCounters counters(problem, work, here.sample, int(problem.channels) * tiling.parts);
  const RowPart<T, kDepth> part(problem, tiling, here);
  typename Row<T, kDepth>::Held x;
  part.row.load_from(f.x, x);
  if (here.rescales) {
    counters.wait();
    const uint32_t passed = counters.pass();
    const A gate =
        value_at(static_cast<const A*>(f.gate) + here.sample * problem.channels + part.channel);
    const auto result = step.forward(f.y, part.row);
    part.row.for_each([&](int i) { result.put(i, x[i], all_of<V>(gate)); });
    return counters.leave(passed);
  }

  ChainedSum<A> sum;
#pragma unroll
  for (int i = 0; i < kDepth; ++i) sum.add(widen(x[i]));
  if (!give_sum(problem, tiling, shared, work, here, part, sum, counters)) return;
  make_gates_of_sample<T, Layout::kPlanes>(f, tiling, shared, work,
                                           HeldTile::whole(problem, here.sample), counters, step);
}

// dm / S (samples, channels), dx, and what dweight is made from.
template <class T, int kDepth, class Step>
__global__ void __launch_bounds__(kColumnThreads, resident_blocks(stream_blocks(true)))
    backward_stream_planes(Backward b, Tiling tiling, SharedLayout shared, Workspace work,
                           Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& problem = b.problem;
  const StreamPart here(problem, tiling, int(problem.channels) * tiling.parts);
  if (!here.exists) return;
  const StreamCounters counters(problem, work, here.sample, int(problem.channels) * tiling.parts);
  const RowPart<T, kDepth> part(problem, tiling, here);
  typename Row<T, kDepth>::Held dy;
  part.row.load_from(b.dy, dy);
  const auto gradient = step.gradient(part.row);
  if (here.rescales) {
    counters.wait();
    const uint32_t passed = counters.pass();
    if (b.dx.data) {
      const int64_t i = here.sample * problem.channels + part.channel;
      const A gate = value_at(static_cast<const A*>(b.gate) + i);
      const A shift = value_at(static_cast<const A*>(work.shift) + i);
      const auto result = step.backward(b.dx, part.row);
      part.row.for_each([&](int i) {
        gradient(i, dy[i]);
        result.put(i, dy[i], all_of<V>(gate), all_of<V>(shift));
      });
    }
    return counters.leave(passed);
  }

  typename Row<T, kDepth>::Held x;
  part.row.load_from(b.x, x);
  ChainedSum<A> sum;
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    if (part.row.has(i)) gradient(i, dy[i]);
    sum.add(products_of(dy[i], x[i]));
  }
  if (!give_sum(problem, tiling, shared, work, here, part, sum, counters)) return;
  make_shifts_of_sample<T, Layout::kPlanes>(b, tiling, shared, work,
                                            HeldTile::whole(problem, here.sample), counters, step);
}

}  // namespace eca::cuda
