// Strategy rows: planes in registers. A team of `lanes` threads holds a plane, kDepth vectors each.
// Shuffles sum it; teams of more than a warp add up in shared memory. The rows of a map may have
// gaps between them.
#pragma once

#include "registers.h"

namespace eca::cuda {

// A team's plane.
template <class T, int kDepth>
struct Row {
  static constexpr int V = kVector<T>;
  using A = Accumulator<T>;
  using Held = Vector<T, V>[kDepth];

  int lanes, lane, held;  // held: the channel's number in the tile
  int channel;            // -1 where there is none
  int begin;              // this lane's first vector of the plane
  int left;               // vectors from there on
  int64_t sample;

  __device__ Row(const Problem& problem, const Tiling& tiling, const HeldTile& tile)
      : lanes(tiling.lanes), lane(thread_index() % tiling.lanes),
        held(thread_index() / tiling.lanes), channel(tile.channel(held)), begin(lane),
        left(channel < 0 ? 0 : int(problem.pixels) / V - lane), sample(tile.sample) {}

  // For all threads of a block: `count` vectors of a plane from `first` on.
  __device__ Row(int threads, int64_t sample, int channel, int first, int count)
      : lanes(threads), lane(thread_index()), held(0), channel(channel), begin(first + lane),
        left(count - lane), sample(sample) {}

  __device__ bool has(int i) const { return i * lanes < left; }

  // Threads without a channel have no vectors there.
  __device__ int64_t offset(const Map& map) const {
    return sample * map.sample_stride + max(channel, 0) * map.row_stride + begin * V;
  }

  __device__ void load_from(const Map& map, Held& to) const {
    const auto from = cursor(map);
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      to[i] = {};
      if (has(i)) to[i] = cuda::load<V>(from.at(i));
    }
  }

  __device__ Cursor<T, int> cursor(const Map& map) const {
    return {pinned(static_cast<T*>(map.data) + offset(map)), lanes * V};
  }

  // body(i) for each vector of the plane that this thread has.
  template <class Body>
  __device__ void for_each(Body body) const {
#pragma unroll
    for (int i = 0; i < kDepth; ++i)
      if (has(i)) body(i);
  }

  // The team's total, in all of its threads. By all threads of the block.
  __device__ A total(A sum, Shared<A> scratch) const {
    for (int mask = min(lanes, 32) / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lanes <= 32) return sum;
    const int warp = thread_index() / 32;
    if (thread_index() % 32 == 0) scratch.set(warp, sum);
    block_barrier();
    sum = 0;
    for (int w = 0; w < lanes / 32; ++w) sum += scratch.get(held * (lanes / 32) + w);
    return sum;
  }
};

template <class T, int kDepth, class Step>
__global__ void __launch_bounds__(row_threads(kDepth), resident_blocks(row_blocks(kDepth)))
    forward_rows(Forward f, Tiling tiling, SharedLayout shared, Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& problem = f.problem;
  const HeldTile tile(problem, tiling);
  const Row<T, kDepth> row(problem, tiling, tile);
  typename Row<T, kDepth>::Held x;
  row.load_from(f.x, x);
  const NearTaps<T> taps(problem, f.weight, shared);
  taps.put();
  const Neighbours<A> means(problem, tiling, shared.padded);

  ChainedSum<A> sum;
#pragma unroll
  for (int i = 0; i < kDepth; ++i) sum.add(widen(x[i]));
  A mean =
      row.total(sum.total(), shared_array<A>(shared.scratch, tiling.threads / 32)) * tiling.factor;
  if (row.lane == 0 && row.held < tile.held) {
    if (row.channel >= 0) mean = step.pooled(tile.sample, row.channel, tile.is_own(row.held), mean);
    means.set(row.held, row.channel < 0 ? A(0) : mean);
  }
  means.clear_ends();
  block_barrier();
  const bool own = tile.is_own(row.held);
  // Where a byte of a mask has bits of two vectors, all threads of a warp exchange them.
  constexpr bool kExchanges = Step::kWholeTiles && V < 8;
  if (!kExchanges && !own) return;

  const A gate = own ? gate_of(means, taps, row.channel, row.held) : A(0);
  if (own && row.lane == 0) MeansAndGates<A, Step>(f, tile).put(row.held - tile.halo, mean, gate);
  if constexpr (Step::kWholeTiles) {
    step.write(f.y, row, x, gate, own);
  } else {
    const auto result = step.forward(f.y, row);
    row.for_each([&](int i) { result.put(i, x[i], all_of<V>(gate)); });
  }
}

// dx, and what dweight is made from.
template <class T, int kDepth, class Step>
__global__ void __launch_bounds__(row_threads(kDepth), resident_blocks(row_blocks(kDepth)))
    backward_rows(Backward b, Tiling tiling, SharedLayout shared, Workspace work, Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& problem = b.problem;
  const HeldTile tile(problem, tiling);
  const Row<T, kDepth> row(problem, tiling, tile);
  typename Row<T, kDepth>::Held dy, x;
  row.load_from(b.dy, dy);
  if constexpr (!Step::kWholeTiles) row.load_from(b.x, x);
  const int64_t i_channel = row.sample * problem.channels + row.channel;
  const A gate = row.channel < 0 ? A(0) : value_at(static_cast<const A*>(b.gate) + i_channel);
  const NearTaps<T> taps(problem, b.weight, shared);
  const Neighbours<A> dz(problem, tiling, shared.padded);
  const DweightMeans<T> means(b, tiling, shared, tile);
  if (row.lane == 0 && row.held < tile.held) means.fetch(row.held, row.channel, step);

  const auto scratch = shared_array<A>(shared.scratch, tiling.threads / 32);
  A own_dz;
  if constexpr (Step::kWholeTiles) {
    own_dz = step.dz(row, dy, gate, tile.is_own(row.held), scratch);
  } else {
    const auto gradient = step.gradient(row);
    ChainedSum<A> sum;
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      if (row.has(i)) gradient(i, dy[i]);
      sum.add(products_of(dy[i], x[i]));
      if constexpr (kShortOfRegisters) forget(dy[i]);
    }
    own_dz = row.total(sum.total(), scratch) * gate * (A(1) - gate);
  }
  if (row.lane == 0 && row.held < tile.held) dz.set(row.held, row.channel < 0 ? A(0) : own_dz);
  dz.clear_ends();
  means.clear_ends();
  taps.put();
  finish_fetches();
  block_barrier();

  means.leave_dweight(b, work, tile, dz);
  if (!tile.is_own(row.held) || !(b.dx.data || Step::kWholeTiles)) return;
  const A dm = dm_of(tile, dz, taps, row.held);
  if constexpr (Step::kWholeTiles) {
    if (row.lane == 0) step.put_dmean(row.sample, row.channel, dm);
    step.write(row, dy, step.factors(row.sample, row.channel, gate, dm, A(tiling.factor)));
  } else {
    const A shift = dm * tiling.factor;
    const auto result = step.backward(b.dx, row);
    row.for_each([&](int i) { result.put(i, dy[i], all_of<V>(gate), all_of<V>(shift)); });
  }
}

}  // namespace eca::cuda
