// What rows, runs and columns have in common, the kernels that keep a tile in registers. Forward
// reads x once and writes y once; backward reads dy and x once and writes dx once.
//
// A block has all loads of a tile of channels and its halo under way at once. It sums them, makes
// the gates and rescales the tile out of its registers. No other block takes part, so the blocks of
// a multiprocessor are at different stages and keep the memory busy. Measured on an H200, planes of
// 56x56 reach 0.97 of a copy's speed, where shared memory and clusters reached 0.7 (TUNING.md).
#pragma once

#include "dweight.h"
#include "step.h"

namespace eca::cuda {

// A number of each held channel that the taps reach: the means or dz. A tile of all channels has
// `pad` more places at either end: zeros, or the channels that wrap around.
template <class A>
struct Neighbours {
  Shared<A> values;
  int channels, pad, halo, radius;
  bool circular;

  __device__ Neighbours(const Problem& problem, const Tiling& tiling, int first_byte)
      : values(shared_array<A>(first_byte, tiling.held + (tiling.halo ? 0 : 2 * tiling.pad))),
        channels(int(problem.channels)), pad(tiling.pad), halo(tiling.halo),
        radius(int(problem.kernel_size / 2)), circular(problem.circular) {}

  __device__ int place(int held) const { return halo ? held : held + pad; }

  // One thread calls this for each held channel. All threads call clear_ends().
  __device__ void set(int held, A value) const {
    values.set(place(held), value);
    if (halo || !circular) return;
    if (held < pad) values.set(pad + channels + held, value);
    if (held >= channels - pad) values.set(held - (channels - pad), value);
  }

  // set() with a number in global memory, for which no thread waits. finish_fetches() and a barrier
  // come later.
  __device__ void fetch(int held, const A* from) const {
    values.template fetch<1>(place(held), from);
    if (halo || !circular) return;
    if (held < pad) values.template fetch<1>(pad + channels + held, from);
    if (held >= channels - pad) values.template fetch<1>(held - (channels - pad), from);
  }

  __device__ void clear_ends() const {
    if (halo || circular) return;
#pragma unroll 1
    for (int i = thread_index(); i < pad; i += thread_count()) {
      values.set(i, A(0));
      values.set(pad + channels + i, A(0));
    }
  }

  __device__ A get(int held) const { return values.get(place(held)); }

  // From the value of the tile's first channel on.
  __device__ Shared<A> own() const { return values.from(place(halo)); }

  // From the value under the first tap of a held channel on.
  __device__ Shared<A> from(int held) const { return values.from(place(held) - radius); }

  // The value of the channel whose tap j lies over a held channel.
  __device__ A over_tap(int held, int j) const { return values.get(place(held) + radius - j); }
};

// The taps: in shared memory, or in global memory where each channel has its own. By all threads:
// the constructor asks for them, and put() waits for them, before a barrier.
template <class T>
class NearTaps {
 public:
  using A = Accumulator<T>;

  __device__ NearTaps(const Problem& problem, const void* weight, const SharedLayout& shared)
      : taps_(problem, weight),
        near_(shared_array<A>(shared.taps, problem.taps_per_channel ? 0 : int(taps_.size()))),
        own_(problem.taps_per_channel) {
    if (!own_ && thread_index() < size()) first_ = taps_.load(0, thread_index());
  }

  __device__ void put() const {
    if (own_ || thread_index() >= size()) return;
    near_.set(thread_index(), taps_.value_of(first_));
#pragma unroll 1
    for (int j = thread_index() + thread_count(); j < size(); j += thread_count())
      near_.set(j, taps_.get(0, j));
  }

  __device__ int size() const { return int(taps_.size()); }
  __device__ bool own() const { return own_; }
  __device__ Shared<A> near() const { return near_; }
  __device__ A far(int64_t channel, int j) const { return taps_.get(channel, j); }

 private:
  Taps<T> taps_;
  typename Taps<T>::Loaded first_;
  Shared<A> near_;
  bool own_;
};

__device__ inline int quotient(int n, const Divisor& by) {
  return int(uint64_t(uint32_t(n)) * by.multiplier >> by.shift);
}

// The block's tile: which sample, and which channels it holds.
struct HeldTile {
  int64_t sample;
  int tile, begin;  // of the tile: its number and its first channel
  int own, halo, held;
  int channels;
  bool circular;

  HeldTile() = default;

  __device__ HeldTile(const Problem& problem, const Tiling& tiling)
      : HeldTile(problem, tiling, quotient(int(block_index()), tiling.by_blocks)) {}

  __device__ HeldTile(const Problem& problem, const Tiling& tiling, int sample)
      : HeldTile(problem, tiling, sample, int(block_index()) - sample * int(tiling.tiles)) {}

  __device__ HeldTile(const Problem& problem, const Tiling& tiling, int64_t sample, int tile)
      : sample(sample), tile(tile), begin(tile * tiling.tile),
        own(min(tiling.tile, int(problem.channels) - begin)), halo(tiling.halo),
        held(own + 2 * tiling.halo), channels(int(problem.channels)), circular(problem.circular) {}

  // All channels of a sample, by the block that makes their gates.
  __device__ static HeldTile whole(const Problem& problem, int64_t sample) {
    HeldTile tile;
    tile.sample = sample;
    tile.tile = tile.begin = tile.halo = 0;
    tile.own = tile.held = tile.channels = int(problem.channels);
    tile.circular = problem.circular;
    return tile;
  }

  // The channel of held number h, or -1 where the padding is zero.
  __device__ int channel(int h) const {
    if (h >= held) return -1;
    const int c = begin - halo + h;
    if (c >= 0 && c < channels) return c;
    if (!circular) return -1;
    return c < 0 ? c + channels : c - channels;
  }

  // So many that each thread of a warp takes part for as many channels as the others.
  __device__ int held_up(int at_once) const { return (held + at_once - 1) & ~(at_once - 1); }

  __device__ bool is_own(int h) const { return h >= halo && h < halo + own; }
};

// The means under the taps of a tile, for its part of dweight.
template <class T>
class DweightMeans {
 public:
  using A = Accumulator<T>;

  __device__ DweightMeans(const Backward& b, const Tiling& tiling, const SharedLayout& shared,
                          const HeldTile& tile)
      : means_(b.problem, tiling, shared.means),
        row_(static_cast<const A*>(b.mean) + tile.sample * tile.channels),
        wanted_(b.dweight && !b.problem.taps_per_channel) {}

  // One thread calls this for each held channel, which is -1 where there is none. All threads call
  // clear_ends(). finish_fetches() and a barrier come later.
  template <class Step>
  __device__ void fetch(int held, int channel, const Step& step) const {
    if (!wanted_) return;
    if (channel < 0) means_.set(held, A(0));
    else if constexpr (Step::kWholeTiles)
      means_.set(held, step.mean_of(channel, value_at(row_ + channel)));
    else means_.fetch(held, row_ + channel);
  }

  __device__ void clear_ends() const { means_.clear_ends(); }

  // By all threads, after a barrier and before the shifts, which the first warps make meanwhile.
  __device__ void leave_dweight(const Backward& b, const Workspace& work, const HeldTile& tile,
                                const Neighbours<A>& dz) const {
    const int warps = thread_count() / 32;
    leave(b, work, tile, dz, 0, tile.own, block_index(), warps - 1 - thread_index() / 32, warps);
  }

  // The same for a tile of all channels, in several parts.
  __device__ void leave_dweight_parts(const Backward& b, const Workspace& work,
                                      const HeldTile& tile, const Neighbours<A>& dz) const {
    const int parts = (tile.own + kDweightTile - 1) / kDweightTile;
    for (int part = thread_index() / 32; part < parts; part += thread_count() / 32) {
      const int begin = part * kDweightTile;
      leave(b, work, tile, dz, begin, min(kDweightTile, tile.own - begin),
            tile.sample * parts + part, 0, 1);
    }
  }

 private:
  // Of the tile's channels [begin, begin + count).
  __device__ void leave(const Backward& b, const Workspace& work, const HeldTile& tile,
                        const Neighbours<A>& dz, int begin, int count, int64_t part, int warp,
                        int warps) const {
    const Shared<A> own_dz = dz.own().from(begin), own_means = means_.from(tile.halo + begin);
    cuda::leave_dweight<T>(
        b, work, tile.sample, tile.begin + begin, count, part, warp, warps,
        [&](int c) { return own_dz.get(c); }, [&](int c, int j) { return own_means.get(c + j); });
  }

  Neighbours<A> means_;
  const A* row_;
  bool wanted_;
};

// Of the held channels: the gates, and the means for dweight. By all threads. finish_fetches() and
// a barrier come later: a thread that waited here would ask for its next numbers a microsecond
// later.
template <class T, class Step>
__device__ inline void fetch_gates_and_means(const Backward& b, const HeldTile& tile,
                                             Shared<Accumulator<T>> gates,
                                             const DweightMeans<T>& means, const Step& step) {
  using A = Accumulator<T>;
  const A* const sample_gates = static_cast<const A*>(b.gate) + tile.sample * tile.channels;
#pragma unroll 1
  for (int h = thread_index(); h < tile.held; h += thread_count()) {
    const int channel = tile.channel(h);
    if (channel < 0) gates.set(h, A(0));
    else gates.template fetch<1>(h, sample_gates + channel);
    means.fetch(h, channel, step);
  }
}

// The sum of vectors, in four chains that do not wait for each other.
template <class A>
struct ChainedSum {
  A chains[4] = {};

  template <int V>
  __device__ void add(const Vector<A, V>& v) {
#pragma unroll
    for (int e = 0; e < V; ++e) chains[e % 4] += v.element[e];
  }

  __device__ A total() const { return (chains[0] + chains[1]) + (chains[2] + chains[3]); }
};

template <class T, int V>
__device__ inline Vector<Accumulator<T>, V> products_of(const Vector<T, V>& g,
                                                        const Vector<T, V>& x) {
  Vector<Accumulator<T>, V> products = widen(x);
  const Vector<Accumulator<T>, V> wide = widen(g);
#pragma unroll
  for (int e = 0; e < V; ++e) products.element[e] *= wide.element[e];
  return products;
}

template <int V, class A>
__device__ inline Vector<A, V> all_of(A value) {
  Vector<A, V> v;
#pragma unroll
  for (int e = 0; e < V; ++e) v.element[e] = value;
  return v;
}

// The gate of a held channel from the means, and dm from dz.
template <class T, class A>
__device__ inline A gate_of(const Neighbours<A>& means, const NearTaps<T>& taps, int64_t channel,
                            int held) {
  Shared<A> mean = means.from(held);
  A z = 0;
  if (taps.own()) {
#pragma unroll 1
    for (int j = 0; j < taps.size(); ++j) z += taps.far(channel, j) * mean.get(j);
    return sigmoid(z);
  }
  // The number of taps is odd.
  Shared<A> tap = taps.near();
  z = tap.get(0) * mean.get(0);
#pragma unroll 1
  for (int j = 1; j < taps.size(); j += 2) {
    z += tap.get(1) * mean.get(1);
    z += tap.get(2) * mean.get(2);
    tap = tap.from(2);
    mean = mean.from(2);
  }
  return sigmoid(z);
}

template <class T, class A>
__device__ inline A dm_of(const HeldTile& tile, const Neighbours<A>& dz, const NearTaps<T>& taps,
                          int held) {
  // Beyond the ends there are no channels whose taps could lie over this one.
  const int top = tile.begin - tile.halo + held + dz.radius;  // the channel of tap 0
  const int first = tile.circular ? 0 : max(0, top - tile.channels + 1);
  const int end = tile.circular ? taps.size() : min(taps.size(), top + 1);
  A dm = 0;
#pragma unroll 1
  for (int j = first; j < end; ++j) {
    const A tap = taps.own() ? taps.far(channel_at(top - j, tile.channels, tile.circular), j)
                             : taps.near().get(j);
    dm += tap * dz.over_tap(held, j);
  }
  return dm;
}

// Where the means and gates of the tile's channels go, if anywhere. A step with kWholeTiles keeps
// its own means.
template <class A, class Step>
struct MeansAndGates {
  static constexpr bool kMeans = !Step::kWholeTiles;
  bool wanted;
  A *mean, *gate;

  __device__ MeansAndGates(const Forward& f, const HeldTile& tile) : wanted(f.gate) {
    const int64_t first = tile.sample * tile.channels + tile.begin;
    if constexpr (kMeans) mean = pinned(static_cast<A*>(f.mean) + first);
    gate = pinned(static_cast<A*>(f.gate) + first);
  }

  __device__ void put(int c, A own_mean, A own_gate) const {
    if (!wanted) return;
    if constexpr (kMeans) cuda::put(mean + c, own_mean);
    cuda::put(gate + c, own_gate);
  }
};

}  // namespace eca::cuda
