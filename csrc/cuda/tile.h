// What a block holds of one sample in shared memory, in either layout: it is copied in, summed per
// channel, and read again for the result.
//
// A group of blocks holds `held` channels: a tile and its halo, numbered from 0 on. Those outside
// the map are absent (padding with zeros) or wrap around (circular).
#pragma once

#include "gates.h"

namespace eca::cuda {

constexpr int kUnroll = 4;  // vectors that a thread asks for before it uses the first

// Which channels a group holds.
struct HeldChannels {
  int64_t channels;  // of the map
  int64_t begin;     // the tile's first channel
  int own;           // channels of the tile: those whose result the group stores
  int halo, held;
  int first, last;  // the held numbers [first, last) are present

  __device__ HeldChannels(const Problem& p, const Tiling& t, int64_t tile)
      : channels(p.channels), begin(tile * t.tile),
        own(int(min(int64_t(t.tile), p.channels - begin))), halo(t.halo), held(own + 2 * t.halo) {
    first = p.circular ? 0 : int(max(int64_t(0), halo - begin));
    last = p.circular ? held : int(min(int64_t(held), channels - begin + halo));
  }

  // The channel of a held number that is present.
  __device__ int64_t channel(int h) const {
    const int64_t c = begin - halo + h;
    return c < 0 ? c + channels : c < channels ? c : c - channels;
  }

  // The held number at place i of a window on the channels, -1 where there is none. The window does
  // not reach beyond the halo. A tile of all channels has no halo, and its window wraps around.
  __device__ int at(const Window& window, int i) const {
    const int64_t c = window.channel(i);
    if (c < 0) return -1;
    return halo == 0 ? int(c - begin) : i - window.pad + halo;
  }

  // The end of the run of present channels from h on that follow one another in the map.
  __device__ int run_end(int h) const { return int(min(int64_t(last), h + channels - channel(h))); }
};

template <class T>
__device__ inline const T* sample_of(const Map& map, int64_t sample) {
  return static_cast<const T*>(map.data) + sample * map.sample_stride;
}

// An address's offset within a line of Copies, in elements.
template <class T>
__device__ inline int place_in_line(const T* address) {
  return int(reinterpret_cast<uintptr_t>(address) % Copies::kAlignment / sizeof(T));
}

template <class T>
constexpr int kVector = 16 / int(sizeof(T));

// Steps from `step` up to `end`, `stride` apart: fetch(step) reads, use(what was read, step) adds
// it up. A thread asks for kUnroll vectors before it uses the first. If its first step lies before
// `begin`, it reads at `begin` and leaves that out.
template <class Fetch, class Use>
__device__ inline void walk(int step, int begin, int end, int stride, Fetch fetch, Use use) {
  for (; step < end; step += kUnroll * stride) {
    decltype(fetch(0)) read[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (step + u * stride < end) read[u] = fetch(u == 0 ? max(step, begin) : step + u * stride);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if ((u > 0 || step >= begin) && step + u * stride < end) use(read[u], step + u * stride);
  }
}

// The steps of a channel's sum: the elements of a plane, or the rows of a column.
template <class T>
struct OnChipLine {
  Shared<T> data;
  int base, stride;

  template <int V>
  __device__ Vector<T, V> load(int step) const {
    return data.template load<V>(base + step * stride);
  }

  __device__ int first_step(int begin) const { return begin; }
};

template <class T>
struct GlobalLine {
  const T* base;
  int64_t stride;

  template <int V>
  __device__ Vector<T, V> load(int step) const {
    return cuda::load<V>(base + step * stride);
  }

  // Threads begin at the sector of `begin`, so that together they ask for whole sectors.
  __device__ int first_step(int begin) const {
    constexpr int kSector = 32 / int(sizeof(T));
    return begin - int(reinterpret_cast<uintptr_t>(base + begin) / sizeof(T) % kSector);
  }
};

// Planes: the held planes are one run of elements, of which each block of the group has a share.
template <class T>
class Planes {
 public:
  using A = Accumulator<T>;

  __device__ Planes(const Problem& p, const Tiling& t, const HeldChannels& c, int rank)
      : c_(c), pixels_(int(p.pixels)), lanes_(t.lanes),
        begin_(min(c.first * pixels_ + rank * t.share, c.last * pixels_)),
        end_(min(begin_ + t.share, c.last * pixels_)) {}

  // An element's address in a map; `i` counts all elements that the group holds.
  __device__ const T* address(const Map& map, int64_t sample, int i) const {
    const int h = i / pixels_;
    return sample_of<T>(map, sample) + c_.channel(h) * map.row_stride + (i - h * pixels_);
  }

  // The offset within a line of the block's part of a map. Its copy on chip has the same offset.
  __device__ int place(const Map& map, int64_t sample) const {
    return begin_ < end_ ? place_in_line(address(map, sample, begin_)) : 0;
  }

  __device__ int on_chip(int i, int place) const { return place + i - begin_; }

  __device__ void copy(Copies& copies, const Map& map, int64_t sample, Shared<T> to,
                       int place) const {
    for (int i = begin_; i < end_;) {
      const int end = min(end_, c_.run_end(i / pixels_) * pixels_);
      copies.copy(to, on_chip(i, place), address(map, sample, i), end - i);
      i = end;
    }
  }

  // The steps of held channel h.
  __device__ OnChipLine<T> on_chip_line(Shared<T> data, int place, int) const {
    return {data, place - begin_, 1};
  }

  __device__ GlobalLine<T> global_line(const Map& map, int64_t sample, int h) const {
    return {sample_of<T>(map, sample) + c_.channel(h) * map.row_stride - h * pixels_, 1};
  }

  // Puts into `sums` what this block's share adds to the sum of each held channel. For V elements a
  // step, line(h) gives what to read, and terms(h, vector, step) what to add.
  template <int V, class Line, class Terms>
  __device__ void sum(Shared<A> sums, Shared<A> scratch, Line line, Terms terms) const {
    const int first = begin_ / pixels_;
    const int planes = begin_ < end_ ? (end_ + pixels_ - 1) / pixels_ - first : 0;
    const int teams = thread_count() / lanes_, lane = thread_index() % lanes_;
    const int warps = max(1, lanes_ / 32);  // in a team
    for (int base = 0; base < planes; base += teams) {
      const int plane = base + thread_index() / lanes_;
      A sum = 0;
      if (plane < planes) {
        const int h = first + plane;
        const auto source = line(h);
        const int begin = max(begin_, h * pixels_);
        walk(
            source.first_step(begin) + lane * V, begin, min(end_, (h + 1) * pixels_), lanes_ * V,
            [&](int step) { return source.template load<V>(step); },
            [&](const Vector<T, V>& v, int step) {
              const Vector<A, V> more = terms(h, v, step);
#pragma unroll
              for (int e = 0; e < V; ++e) sum += more.element[e];
            });
      }
      for (int mask = min(lanes_, 32) / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (plane < planes && lane % 32 == 0) scratch.set(plane * warps + lane / 32, sum);
    }
    block_barrier();
    for (int h = thread_index(); h < c_.held; h += thread_count()) {
      A sum = 0;
      if (h >= first && h < first + planes)
        for (int w = 0; w < warps; ++w) sum += scratch.get((h - first) * warps + w);
      sums.set(h, sum);
    }
  }

  // Visits what this block holds of the tile itself, in vectors where its offset within a line is
  // the same on chip and in `to`. of_channel(c) gives what body needs of the tile's channel c.
  // body(values, i, offset) handles elements from i on, one for each value, at `offset` in `to`.
  template <class OfChannel, class Body>
  __device__ void for_each(const Tiling& t, const Map& to, int64_t sample, int place,
                           OfChannel of_channel, Body body) const {
    constexpr int V = kVector<T>;
    const int begin = max(begin_, c_.halo * pixels_);
    const int count = min(end_, (c_.halo + c_.own) * pixels_) - begin;
    if (count <= 0) return;
    const int64_t offset =
        sample * to.sample_stride + c_.begin * to.row_stride + (begin - c_.halo * pixels_);
    const int there = place_in_line(static_cast<const T*>(to.data) + offset);
    const bool alike = on_chip(begin, place) % V == there;
    const int head = alike ? min(count, (V - there) % V) : count;
    const int body_count = (count - head) / V * V, step = thread_count() * V;
    Position at(begin + head + thread_index() * V - c_.halo * pixels_, pixels_);
    const Position ahead(step, pixels_);
    for (int e = head + thread_index() * V; e < head + body_count; e += step) {
      body(values_from<V>(at, t.vectors, of_channel), begin + e, offset + e);
      at.move(ahead, pixels_);
    }
    for (int e = thread_index(); e < count - body_count; e += thread_count()) {
      const int single = e < head ? e : e + body_count;
      const Position here(begin + single - c_.halo * pixels_, pixels_);
      body(values_from<1>(here, true, of_channel), begin + single, offset + single);
    }
  }

 private:
  // An element by its channel, counted from the tile's first, and its pixel.
  struct Position {
    int channel, pixel;

    __device__ Position(int i, int pixels) : channel(i / pixels), pixel(i - channel * pixels) {}

    // Without a division: one for each vector would be most of the work.
    __device__ void move(const Position& by, int pixels) {
      channel += by.channel;
      pixel += by.pixel;
      if (pixel >= pixels) pixel -= pixels, ++channel;
    }
  };

  // What of_channel gives for V elements: one value if they lie in one plane.
  template <int V, class OfChannel>
  __device__ auto values_from(const Position& from, bool one_plane, OfChannel of_channel) const {
    auto value = of_channel(from.channel);
    Vector<decltype(value), V> values;
    int channel = from.channel, pixel = from.pixel;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      values.element[e] = value;
      if (one_plane || ++pixel < pixels_) continue;
      pixel = 0;
      if (++channel < c_.own) value = of_channel(channel);
    }
    return values;
  }

  HeldChannels c_;
  int pixels_, lanes_;
  int begin_, end_;  // this block's elements, of all that the group holds
};

// Columns of vectors in rows of channels. A thread keeps to one column, or to every
// column_count-th, and takes every row_count-th row. Threads that are left over have no column.
struct ColumnLanes {
  int columns, column_count, row_count, column, row;

  __device__ explicit ColumnLanes(int columns)
      : columns(columns), column_count(min(columns, thread_count())),
        row_count(thread_count() / column_count), column(thread_index() % column_count),
        row(thread_index() / column_count) {
    if (row >= row_count) column = columns;
  }
};

// Pixels: each block of the group has a share of the rows, `held` elements of each.
template <class T>
class Pixels {
 public:
  using A = Accumulator<T>;

  __device__ Pixels(const Problem& p, const Tiling& t, const HeldChannels& c, int rank)
      : c_(c), vectors_(t.vectors), begin_(int(min(int64_t(rank) * t.share, p.pixels))),
        end_(int(min(int64_t(begin_ + t.share), p.pixels))) {}

  __device__ const T* address(const Map& map, int64_t sample, int i) const {
    const int row = i / c_.held;
    return sample_of<T>(map, sample) + row * map.row_stride + c_.channel(i - row * c_.held);
  }

  __device__ int place(const Map& map, int64_t sample) const {
    return vectors_ || begin_ == end_ ? 0 : place_in_line(address(map, sample, begin_ * c_.held));
  }

  __device__ int on_chip(int i, int place) const { return place + i - begin_ * c_.held; }

  __device__ void copy(Copies& copies, const Map& map, int64_t sample, Shared<T> to,
                       int place) const {
    if (begin_ == end_) return;
    const int rows = end_ - begin_;
    const bool one_run = c_.own == c_.channels && (rows == 1 || map.row_stride == c_.channels);
    if (one_run)
      return copies.copy(to, place, address(map, sample, begin_ * c_.held), rows * c_.held);
    for (int h = c_.first; h < c_.last;) {
      const int end = c_.run_end(h);
      copies.copy_rows(to, h, c_.held, address(map, sample, begin_ * c_.held + h), map.row_stride,
                       rows, end - h);
      h = end;
    }
  }

  __device__ OnChipLine<T> on_chip_line(Shared<T> data, int place, int h) const {
    return {data, place - begin_ * c_.held + h, c_.held};
  }

  __device__ GlobalLine<T> global_line(const Map& map, int64_t sample, int h) const {
    return {sample_of<T>(map, sample) + c_.channel(h), map.row_stride};
  }

  template <int V, class Line, class Terms>
  __device__ void sum(Shared<A> sums, Shared<A> scratch, Line line, Terms terms) const {
    const int present = c_.last - c_.first;
    const ColumnLanes lanes(present / V);
    for (int column = lanes.column; column < lanes.columns; column += lanes.column_count) {
      const int h = c_.first + column * V;
      const auto source = line(h);
      Vector<A, V> sum{};
      walk(
          begin_ + lanes.row, begin_, end_, lanes.row_count,
          [&](int step) { return source.template load<V>(step); },
          [&](const Vector<T, V>& v, int step) {
            const Vector<A, V> more = terms(h, v, step);
#pragma unroll
            for (int e = 0; e < V; ++e) sum.element[e] += more.element[e];
          });
#pragma unroll
      for (int e = 0; e < V; ++e) scratch.set(lanes.row * present + column * V + e, sum.element[e]);
    }
    block_barrier();
    for (int h = thread_index(); h < c_.held; h += thread_count()) {
      A sum = 0;
      if (h >= c_.first && h < c_.last)
        for (int row = 0; row < lanes.row_count; ++row)
          sum += scratch.get(row * present + h - c_.first);
      sums.set(h, sum);
    }
  }

  template <class OfChannel, class Body>
  __device__ void for_each(const Tiling& t, const Map& to, int64_t sample, int /* place */,
                           OfChannel of_channel, Body body) const {
    if (t.vectors) each<kVector<T>>(to, sample, of_channel, body);
    else each<1>(to, sample, of_channel, body);
  }

 private:
  template <int V, class OfChannel, class Body>
  __device__ void each(const Map& to, int64_t sample, OfChannel of_channel, Body body) const {
    const ColumnLanes lanes(c_.own / V);
    for (int column = lanes.column; column < lanes.columns; column += lanes.column_count) {
      Vector<decltype(of_channel(0)), V> values;
#pragma unroll
      for (int e = 0; e < V; ++e) values.element[e] = of_channel(column * V + e);
      const int64_t offset = sample * to.sample_stride + c_.begin + column * V;
      for (int row = begin_ + lanes.row; row < end_; row += lanes.row_count)
        body(values, row * c_.held + c_.halo + column * V, offset + row * to.row_stride);
    }
  }

  HeldChannels c_;
  bool vectors_;
  int begin_, end_;  // this block's rows
};

}  // namespace eca::cuda
