// Strategy stream, here for pixels, where no block can hold a tile of enough channels. One launch
// has blocks of two kinds. The first sum a part of a sample's pixels, and the last of a sample to
// arrive makes its gates. The others rescale a part, which they find in the L2 cache. By number,
// the blocks that sum a group of samples alternate with those that rescale the group before.
//
// A block that waits for gates waits for blocks of lower numbers. These never wait, and they have
// started, because a GPU starts blocks in order. Every decoupled look-back scan assumes the same.
#pragma once

#include "columns.h"
#include "dweight.h"

namespace eca::cuda {

// What a block does.
struct StreamPart {
  bool exists, rescales;
  int64_t sample;
  int part;

  // `parts`: of a sample.
  __device__ StreamPart(const Problem& problem, const Tiling& tiling, int parts) {
    const int block = int(block_index()), step = quotient(block, tiling.by_step);
    const int within = block - step * 2 * int(tiling.chunk) * parts, pair = within / 2;
    rescales = within % 2 != 0;
    const int in_group = quotient(pair, tiling.by_blocks);
    sample = (int64_t(step) - (rescales ? 1 : 0)) * tiling.chunk + in_group;
    part = pair - in_group * parts;
    exists = sample >= 0 && sample < problem.samples;
  }
};

// A sample's counters: how many parts have been summed, and whether the gates are there.
class StreamCounters {
 public:
  __device__ StreamCounters(const Problem& problem, const Workspace& work, int64_t sample,
                            int parts)
      : arrived_(work.counters.arrived(sample)), ready_(arrived_ + problem.samples), parts_(parts) {
  }

  // True in all threads of the last block to arrive, which sees what the others wrote. By all
  // threads.
  __device__ bool arrive(Shared<uint32_t> flag) const {
    block_barrier();
    if (thread_index() == 0) {
      const bool last = fetch_add(arrived_, 1) == uint32_t(parts_ - 1);
      if (last) put(arrived_, 0u);
      flag.set(0, last);
    }
    block_barrier();
    return flag.get(0) != 0;
  }

  // After a barrier, by one thread.
  __device__ void set_ready() const { fetch_add(ready_, kReady); }

  // Until the gates are there. By all threads.
  __device__ void wait() const {
    if (thread_index() == 0)
      while (load_acquire(ready_) < kReady) pause();
    block_barrier();
  }

  // Each block says that it has waited, and the last one leaves the counter zero. What comes
  // between the two calls does not wait for the answer.
  __device__ uint32_t pass() const { return thread_index() == 0 ? fetch_add_alone(ready_, 1) : 0; }
  __device__ void leave(uint32_t passed_before) const {
    if (passed_before == kReady + uint32_t(parts_ - 1)) fetch_add_alone(ready_, ~passed_before);
  }

 private:
  static constexpr uint32_t kReady = 1u << 31;
  uint32_t *arrived_, *ready_;
  int parts_;
};

// Where the last block of a sample adds up the sums of all; for pixels, also where a block adds up
// its own, (rows, channels).
template <class T, Layout kLayout>
__device__ inline Shared<Accumulator<T>> sums_in(const Tiling& tiling, const SharedLayout& shared) {
  const int count = kLayout == Layout::kPlanes
                        ? int(scratch_of_planes(tiling))
                        : tiling.threads / (tiling.held / kVector<T>)*tiling.held;
  return shared_array<Accumulator<T>>(shared.scratch, count);
}

// Numbers from one row of sums to the next. Pixels have whole vectors of channels.
template <Layout kLayout>
__device__ inline int64_t stride_of_sums(const Problem& problem) {
  return kLayout == Layout::kPlanes ? sums_of_channels(int(problem.channels)) : problem.channels;
}

// The sums of a sample's parts, added up by its last block. Threads share the parts too, so that
// all of them are asked for at once: the other blocks wait for this.
template <Layout kLayout>
class SampleTotals {
 public:
  // By all threads. `scratch` has room for the channels, or for four numbers of each thread.
  __device__ SampleTotals(const Problem& problem, const Tiling& tiling, const Workspace& work,
                          int64_t sample, Shared<float> scratch)
      : scratch_(scratch), channels_(int(stride_of_sums<kLayout>(problem))) {
    constexpr int W = 4, kAtOnce = 8;
    const int columns = channels_ / W;
    groups_ = max(1, thread_count() / columns);
    const int group = thread_index() / columns;
    const float* const sums =
        static_cast<const float*>(work.sums) + sample * tiling.parts * channels_;
    if (group < groups_) {
      for (int column = thread_index() - group * columns; column < columns;
           column += thread_count()) {
        Vector<float, W> total{};
#pragma unroll 1
        for (int first = group; first < tiling.parts; first += kAtOnce * groups_) {
          Vector<float, W> some[kAtOnce] = {};
#pragma unroll
          for (int u = 0; u < kAtOnce; ++u) {
            const int part = first + u * groups_;
            if (part < tiling.parts)
              some[u] = load_from_other_block(sums + int64_t(part) * channels_ + column * W);
          }
#pragma unroll
          for (int u = 0; u < kAtOnce; ++u) add_all(total, some[u]);
        }
        scratch_.store<W>(group * channels_ + column * W, total);
      }
    }
    block_barrier();
  }

  __device__ float get(int c) const {
    float total = 0;
    for (int group = 0; group < groups_; ++group) total += scratch_.get(group * channels_ + c);
    return total;
  }

 private:
  Shared<float> scratch_;
  int channels_, groups_;
};

// This block's sum of a channel, for the sample's last block.
template <Layout kLayout, class A>
__device__ inline void put_part(const Problem& problem, const Tiling& tiling, const Workspace& work,
                                int64_t sample, int part, int c, A sum) {
  put(static_cast<A*>(work.sums) +
          (sample * tiling.parts + part) * stride_of_sums<kLayout>(problem) + c,
      sum);
}

// The workspace whose sums are the second ones, where a step has two of each channel.
template <class T, Layout kLayout>
__device__ inline Workspace second_sums(const Problem& problem, const Tiling& tiling,
                                        Workspace work) {
  work.sums = static_cast<Accumulator<T>*>(work.sums) +
              problem.samples * tiling.parts * stride_of_sums<kLayout>(problem);
  return work;
}

// The numbers of V channels from a multiple of V on, 16 bytes at a time. If another block wrote
// them, this comes after the barrier that follows the wait.
template <int V, class A>
__device__ inline Vector<A, V> numbers_from(const void* numbers, int64_t at) {
  constexpr int W = 16 / int(sizeof(A));
  static_assert(V % W == 0);
  Vector<A, V> v;
#pragma unroll
  for (int e = 0; e < V; e += W) {
    const Vector<A, W> some = load<W>(static_cast<const A*>(numbers) + at + e);
#pragma unroll
    for (int u = 0; u < W; ++u) v.element[e + u] = some.element[u];
  }
  return v;
}

// By the last block of a sample: mean and gate of all its channels. Then the other blocks go on.
template <class T, Layout kLayout, class Step>
__device__ inline void make_gates_of_sample(const Forward& f, const Tiling& tiling,
                                            const SharedLayout& shared, const Workspace& work,
                                            const HeldTile& tile, const StreamCounters& counters,
                                            const Step& step) {
  using A = Accumulator<T>;
  const Problem& problem = f.problem;
  const NearTaps<T> taps(problem, f.weight, shared);
  const Neighbours<A> means(problem, tiling, shared.padded);
  const SampleTotals<kLayout> totals(problem, tiling, work, tile.sample,
                                     sums_in<T, kLayout>(tiling, shared));
  taps.put();
  for (int c = thread_index(); c < tile.held; c += thread_count())
    means.set(c, step.pooled(tile.sample, c, true, totals.get(c) * tiling.factor));
  means.clear_ends();
  block_barrier();
  const MeansAndGates<A, Step> small(f, tile);
  for (int c = thread_index(); c < tile.held; c += thread_count())
    small.put(c, means.get(c), gate_of(means, taps, c, c));
  block_barrier();
  if (thread_index() == 0) counters.set_ready();
}

// By the last block of a sample: dm / S of all its channels and then, when the other blocks go on,
// its part of dweight.
template <class T, Layout kLayout, class Step>
__device__ inline void make_shifts_of_sample(const Backward& b, const Tiling& tiling,
                                             const SharedLayout& shared, const Workspace& work,
                                             const HeldTile& tile, const StreamCounters& counters,
                                             const Step& step) {
  using A = Accumulator<T>;
  const Problem& problem = b.problem;
  const NearTaps<T> taps(problem, b.weight, shared);
  const int64_t channels = tile.sample * problem.channels;
  const Neighbours<A> dz(problem, tiling, shared.padded);
  const auto gates = shared_array<A>(shared.gate, tiling.held);
  constexpr int W = 16 / int(sizeof(A));
  const A* const sample_gates = static_cast<const A*>(b.gate) + channels;
  if (tiling.held % W == 0)
    for (int c = thread_index() * W; c < tiling.held; c += thread_count() * W)
      gates.template fetch<W>(c, sample_gates + c);
  else
    for (int c = thread_index(); c < tiling.held; c += thread_count())
      gates.template fetch<1>(c, sample_gates + c);
  const auto scratch = sums_in<T, kLayout>(tiling, shared);
  const SampleTotals<kLayout> totals(problem, tiling, work, tile.sample, scratch);
  taps.put();
  finish_fetches();
  block_barrier();
  if constexpr (Step::kWholeTiles) {
    for (int c = thread_index(); c < tile.held; c += thread_count()) dz.set(c, totals.get(c));
    block_barrier();
    const SampleTotals<kLayout> by_x(
        problem, tiling, second_sums<T, kLayout>(problem, tiling, work), tile.sample, scratch);
    for (int c = thread_index(); c < tile.held; c += thread_count())
      dz.set(c, step.dz_of(tile.sample, c, true, gates.get(c), dz.get(c), by_x.get(c)));
  } else {
    for (int c = thread_index(); c < tile.held; c += thread_count()) {
      const A gate = gates.get(c);
      dz.set(c, totals.get(c) * gate * (A(1) - gate));
    }
  }
  dz.clear_ends();
  block_barrier();
  for (int c = thread_index(); c < tile.held; c += thread_count()) {
    const A dm = dm_of(tile, dz, taps, c);
    if constexpr (Step::kWholeTiles) step.put_dmean(tile.sample, c, dm);
    else put(static_cast<A*>(work.shift) + channels + c, dm * tiling.factor);
  }
  block_barrier();
  if (thread_index() == 0) counters.set_ready();

  const DweightMeans<T> means(b, tiling, shared, tile);
  for (int c = thread_index(); c < tile.held; c += thread_count()) means.fetch(c, c, step);
  means.clear_ends();
  finish_fetches();
  block_barrier();
  means.leave_dweight_parts(b, work, tile, dz);
}

template <class T, int kDepth, class Step>
__global__ void __launch_bounds__(kColumnThreads, resident_blocks(stream_blocks(false)))
    forward_stream(Forward f, Tiling tiling, SharedLayout shared, Workspace work, Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& problem = f.problem;
  const StreamPart here(problem, tiling, tiling.parts);
  if (!here.exists) return;
  const HeldTile tile = HeldTile::whole(problem, here.sample);
  const StreamCounters counters(problem, work, here.sample, tiling.parts);
  const int rows = tiling.threads / (tiling.held / V);
  const Column<T, kDepth> column(problem, tiling, tile, here.part * kDepth * rows,
                                 int(problem.pixels));
  typename Column<T, kDepth>::Held x;
  column.load_from(f.x, x);
  if (here.rescales) {
    counters.wait();
    const uint32_t passed = counters.pass();
    if (column.any()) {
      const Vector<A, V> gate =
          numbers_from<V, A>(f.gate, here.sample * problem.channels + column.channel);
      const auto result = step.forward(f.y, column);
      column.for_each([&](int i) { result.put(i, x[i], gate); });
    }
    return counters.leave(passed);
  }

  const auto parts = sums_in<T, Layout::kPixels>(tiling, shared);
  Vector<A, V> sums{};
#pragma unroll
  for (int i = 0; i < kDepth; ++i) add_all(sums, widen(x[i]));
  column.put_parts(sums, tiling.held, parts);
  block_barrier();
  for (int c = thread_index(); c < tile.held; c += thread_count())
    put_part<Layout::kPixels>(problem, tiling, work, here.sample, here.part, c,
                              column.total(c, tiling.held, parts));
  if (!counters.arrive(shared_array<uint32_t>(shared.flag, 1))) return;

  make_gates_of_sample<T, Layout::kPixels>(f, tiling, shared, work, tile, counters, step);
}

// dm / S (samples, channels), dx, and what dweight is made from.
template <class T, int kDepth, class Step>
__global__ void __launch_bounds__(kColumnThreads, resident_blocks(stream_blocks(true)))
    backward_stream(Backward b, Tiling tiling, SharedLayout shared, Workspace work, Step step) {
  using A = Accumulator<T>;
  constexpr int V = kVector<T>;
  const Problem& problem = b.problem;
  const StreamPart here(problem, tiling, tiling.parts);
  if (!here.exists) return;
  const HeldTile tile = HeldTile::whole(problem, here.sample);
  const StreamCounters counters(problem, work, here.sample, tiling.parts);
  const int rows = tiling.threads / (tiling.held / V);
  const Column<T, kDepth> column(problem, tiling, tile, here.part * kDepth * rows,
                                 int(problem.pixels));
  const int64_t channels = here.sample * problem.channels;
  typename Column<T, kDepth>::Held dy;
  column.load_from(b.dy, dy);
  const auto gradient = step.gradient(column);
  if (here.rescales) {
    counters.wait();
    const uint32_t passed = counters.pass();
    if (column.any() && b.dx.data) {
      const Vector<A, V> gate = numbers_from<V, A>(b.gate, channels + column.channel);
      const Vector<A, V> shift = numbers_from<V, A>(work.shift, channels + column.channel);
      const auto result = step.backward(b.dx, column);
      column.for_each([&](int i) {
        gradient(i, dy[i]);
        result.put(i, dy[i], gate, shift);
      });
    }
    return counters.leave(passed);
  }

  typename Column<T, kDepth>::Held x;
  column.load_from(b.x, x);
  const auto parts = sums_in<T, Layout::kPixels>(tiling, shared);
  Vector<A, V> sums{};
#pragma unroll
  for (int i = 0; i < kDepth; ++i) {
    if (column.has(i)) gradient(i, dy[i]);
    add_all(sums, products_of(dy[i], x[i]));
  }
  column.put_parts(sums, tiling.held, parts);
  block_barrier();
  for (int c = thread_index(); c < tile.held; c += thread_count())
    put_part<Layout::kPixels>(problem, tiling, work, here.sample, here.part, c,
                              column.total(c, tiling.held, parts));
  if (!counters.arrive(shared_array<uint32_t>(shared.flag, 1))) return;

  make_shifts_of_sample<T, Layout::kPixels>(b, tiling, shared, work, tile, counters, step);
}

}  // namespace eca::cuda
