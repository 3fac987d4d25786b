// Strategy two_pass, for what the others cannot do: maps that begin anywhere in memory or have gaps,
// planes that no block can hold, float64. One kernel sums, a small one makes the gates, a third
// rescales. They take a few samples at a time, so that the third finds them in the L2 cache. It
// starts with what was read last.
#pragma once

#include "columns.h"

namespace eca::cuda {

template <class T>
__device__ inline const T* sample_of(const Map& map, int64_t sample) {
  return static_cast<const T*>(map.data) + sample * map.sample_stride;
}

// Samples from `first` on, `count` of them: one launch's part of the batch.
struct Chunk {
  int64_t first, count;
};

// A part of a row that a warp walks: vectors that begin at whole lines of one map, and single
// elements before and after them. Other maps may lie differently within their lines.
template <class T>
struct Stretch {
  static constexpr int V = kVector<T>;
  int head, vectors, count;

  __device__ Stretch(int count, const T* address)
      : head(min(count, (V - place_in_line(address)) % V)), vectors((count - head) / V),
        count(count) {}

  // body(i, width) for each single element and each vector, by the lanes of a warp.
  template <class Body>
  __device__ void for_each(int lane, Body body) const {
    for (int e = lane; e < count - vectors * V; e += 32)
      body(e < head ? e : e + vectors * V, std::integral_constant<int, 1>{});
#pragma unroll 4
    for (int v = lane; v < vectors; v += 32) body(head + v * V, std::integral_constant<int, V>{});
  }
};

// Where part `part` of `parts` of a length begins: at a multiple of 16.
__device__ inline int64_t part_begin(int64_t length, int parts, int part) {
  const int64_t share = ((length + parts - 1) / parts + 15) / 16 * 16;
  return min(share * part, length);
}

// What a channel's sum adds up: forward the elements of x, backward their products with dy.
template <bool kProducts, int V, class T, class Epilogue>
__device__ inline Vector<Accumulator<T>, V> terms_of(const T* x, const T* dy, Epilogue epilogue) {
  const Vector<T, V> some = load_anywhere<V>(x);
  if constexpr (kProducts) return products_of(load_anywhere<V>(dy), some, epilogue);
  else return widen(some);
}

// A warp's place in a launch over planes: one warp for each part of each plane.
struct PlanePart {
  int64_t sample, channel;
  int part;
  bool exists;

  __device__ PlanePart(const Problem& p, const Tiling& t, const Chunk& chunk, bool from_behind) {
    const int64_t all = chunk.count * p.channels * t.parts;
    int64_t i = block_index() * (thread_count() / 32) + thread_index() / 32;
    exists = i < all;
    if (from_behind) i = all - 1 - i;
    part = int(i % t.parts);
    channel = i / t.parts % p.channels;
    sample = chunk.first + i / t.parts / p.channels;
  }
};

// sums (parts, samples, channels), of x or, with kProducts, of dy * x.
template <class T, bool kProducts, class Epilogue>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    sum_planes(Problem p, Map x, Map dy, Tiling t, Chunk chunk, Workspace work, Epilogue epilogue) {
  using A = Accumulator<T>;
  const PlanePart here(p, t, chunk, false);
  if (!here.exists) return;
  const int lane = thread_index() % 32;
  const int64_t begin = part_begin(p.pixels, t.parts, here.part);
  const int count = int(part_begin(p.pixels, t.parts, here.part + 1) - begin);
  const T* const x_part = sample_of<T>(x, here.sample) + here.channel * x.row_stride + begin;
  const T* const dy_part =
      kProducts ? sample_of<T>(dy, here.sample) + here.channel * dy.row_stride + begin : x_part;
  ChainedSum<A> sum;
  Stretch<T>(count, x_part).for_each(lane, [&](int i, auto width) {
    sum.add(terms_of<kProducts, decltype(width)::value>(x_part + i, dy_part + i, epilogue));
  });
  const A total = warp_sum(sum.total());
  if (lane == 0)
    put(static_cast<A*>(work.sums) + (here.part * p.samples + here.sample) * p.channels +
            here.channel,
        total);
}

// A block's place in a launch over pixels: one block for each part of the pixels of a sample.
struct PixelPart {
  int64_t sample, begin, end;
  int part;

  // Divisions are of 32 bits, as in KeptPart.
  __device__ PixelPart(const Problem& p, const Tiling& t, const Chunk& chunk, bool from_behind) {
    const auto blocks = uint32_t(block_count()), block = uint32_t(block_index());
    const uint32_t i = from_behind ? blocks - 1 - block : block, in_chunk = i / uint32_t(t.parts);
    part = int(i - in_chunk * uint32_t(t.parts));
    sample = chunk.first + in_chunk;
    begin = part_begin(p.pixels, t.parts, part);
    end = part_begin(p.pixels, t.parts, part + 1);
  }
};

// Columns of vectors in rows of channels. A thread keeps to one column and takes every
// row_count-th row. Threads that are left over have no column.
struct ColumnLanes {
  int columns, row_count, column, row;

  __device__ explicit ColumnLanes(int columns)
      : columns(columns), row_count(thread_count() / columns), column(thread_index() % columns),
        row(thread_index() / columns) {
    if (row >= row_count) column = columns;
  }
};

template <bool kProducts, int V, class T, class Epilogue>
__device__ void sum_pixel_part(const Problem& p, const Map& x, const Map& dy, const PixelPart& here,
                               Shared<Accumulator<T>> scratch, Accumulator<T>* sums,
                               Epilogue epilogue) {
  using A = Accumulator<T>;
  const T* const x_part = sample_of<T>(x, here.sample) + here.begin * x.row_stride;
  const T* const dy_part =
      kProducts ? sample_of<T>(dy, here.sample) + here.begin * dy.row_stride : x_part;
  const int64_t all_columns = p.channels / V;
  for (int64_t base = 0; base < all_columns; base += thread_count()) {
    const ColumnLanes lanes(int(min(all_columns - base, int64_t(thread_count()))));
    if (lanes.column < lanes.columns) {
      const int64_t c = (base + lanes.column) * V;
      const int rows = int(here.end - here.begin);
      Vector<A, V> sum{};
#pragma unroll 4
      for (int row = lanes.row; row < rows; row += lanes.row_count)
        add_all(sum, terms_of<kProducts, V>(x_part + row * x.row_stride + c,
                                            dy_part + row * dy.row_stride + c, epilogue));
#pragma unroll
      for (int e = 0; e < V; ++e)
        scratch.set((lanes.row * lanes.columns + lanes.column) * V + e, sum.element[e]);
    }
    block_barrier();
    for (int i = thread_index(); i < lanes.columns * V; i += thread_count()) {
      A sum = 0;
      for (int row = 0; row < lanes.row_count; ++row)
        sum += scratch.get(row * lanes.columns * V + i);
      put(sums + base * V + i, sum);
    }
    block_barrier();
  }
}

template <class T, bool kProducts, class Epilogue>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    sum_pixels(Problem p, Map x, Map dy, Tiling t, Chunk chunk, Workspace work, Epilogue epilogue) {
  using A = Accumulator<T>;
  const PixelPart here(p, t, chunk, false);
  const auto scratch = shared_array<A>(0, t.threads * kVector<T>);
  A* const sums = static_cast<A*>(work.sums) + (here.part * p.samples + here.sample) * p.channels;
  if (t.vectors) sum_pixel_part<kProducts, kVector<T>, T>(p, x, dy, here, scratch, sums, epilogue);
  else sum_pixel_part<kProducts, 1, T>(p, x, dy, here, scratch, sums, epilogue);
}

// A warp's channel in a launch with one warp for each channel of each sample.
inline __device__ bool find_channel(const Problem& p, const Chunk& chunk, int64_t* sample,
                                    int64_t* channel) {
  const int64_t i = block_index() * (thread_count() / 32) + thread_index() / 32;
  *sample = chunk.first + i / p.channels;
  *channel = i % p.channels;
  return i < chunk.count * p.channels;
}

// The parts of the sums of a sample's channels.
template <class A>
struct SampleParts {
  const A* sums;  // of the sample's first channel
  int64_t stride;
  int parts;

  __device__ SampleParts(const Problem& p, const Tiling& t, const Workspace& work, int64_t sample)
      : sums(static_cast<const A*>(work.sums) + sample * p.channels),
        stride(p.samples * p.channels), parts(t.parts) {}

  // A channel's total, in all lanes. By all lanes of a warp, which share the parts.
  __device__ A total(int64_t channel) const {
    A total = 0;
#pragma unroll 4
    for (int part = thread_index() % 32; part < parts; part += 32)
      total += value_at(sums + part * stride + channel);
    return warp_sum(total);
  }

  // The sum over the taps of factor(tap) times the total of channel(tap), or 0 where that is -1. By
  // all lanes of a warp, which share the taps and the parts: a lane that added up all parts of a
  // channel would wait for one after the other.
  template <class Channel, class Factor>
  __device__ A weighted(int64_t taps, Channel channel, Factor factor) const {
    int lanes = 1;  // that share the parts of a channel
    while (lanes < 32 && lanes < parts) lanes *= 2;
    const int lane = thread_index() % lanes;
    A sum = 0;
    for (int64_t tap = thread_index() % 32 / lanes; tap < taps; tap += 32 / lanes) {
      const int64_t from = channel(tap);
      A total = 0;
      if (from >= 0)
        for (int part = lane; part < parts; part += lanes)
          total += value_at(sums + part * stride + from);
      sum += factor(tap) * total;
    }
    return warp_sum(sum);
  }
};

// result (samples, channels): the total of each channel's parts, divided.
template <class T>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    add_parts(Problem p, Tiling t, Chunk chunk, Workspace work, void* result, int64_t divisor) {
  using A = Accumulator<T>;
  int64_t sample, c;
  if (!find_channel(p, chunk, &sample, &c)) return;
  const A total = SampleParts<A>(p, t, work, sample).total(c);
  if (thread_index() % 32 == 0)
    put(static_cast<A*>(result) + sample * p.channels + c, total / A(divisor));
}

// mean and gate (samples, channels), of all samples.
template <class T>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    make_gates(Forward f, Tiling t, Chunk chunk, Workspace work) {
  using A = Accumulator<T>;
  const Problem& p = f.problem;
  int64_t sample, c;
  if (!find_channel(p, chunk, &sample, &c)) return;
  const Taps<T> taps(p, f.weight);
  const SampleParts<A> parts(p, t, work, sample);
  const A mean = parts.total(c) / A(p.pixels);
  // The zeros beyond the ends take part, so that a tap there shows if it is not finite.
  const A z = parts.weighted(
      taps.size(),
      [&](int64_t j) { return channel_at(c + j - taps.size() / 2, p.channels, p.circular); },
      [&](int64_t j) { return taps.get(c, j); });
  if (thread_index() % 32 != 0) return;
  put(static_cast<A*>(f.mean) + sample * p.channels + c, mean);
  put(static_cast<A*>(f.gate) + sample * p.channels + c, sigmoid(z / A(p.pixels)));
}

// dz and dm / S (samples, channels).
template <class T>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    make_shifts(Backward b, Tiling t, Chunk chunk, Workspace work) {
  using A = Accumulator<T>;
  const Problem& p = b.problem;
  int64_t sample, c;
  if (!find_channel(p, chunk, &sample, &c)) return;
  const Taps<T> taps(p, b.weight);
  const SampleParts<A> parts(p, t, work, sample);
  const auto slope = [&](int64_t channel) {
    const A gate = value_at(static_cast<const A*>(b.gate) + sample * p.channels + channel);
    return gate * (A(1) - gate);
  };
  const auto under_tap = [&](int64_t j) {
    return channel_at(c - j + taps.size() / 2, p.channels, p.circular);
  };
  // Beyond the ends there are no channels whose taps could lie over this one.
  const A dm = parts.weighted(taps.size(), under_tap, [&](int64_t j) {
    const int64_t from = under_tap(j);
    return from < 0 ? A(0) : taps.get(from, j) * slope(from);
  });
  const A dz = parts.total(c) * slope(c);
  if (thread_index() % 32 != 0) return;
  put(static_cast<A*>(work.dz) + sample * p.channels + c, dz);
  put(static_cast<A*>(work.shift) + sample * p.channels + c, dm / A(p.pixels));
}

// y from x where there are no shifts, or dx from dy: V elements, and the numbers of their channels.
template <bool kShifts, int V, class T, class Epilogue>
__device__ inline void rescale(const T* from, T* to, const Vector<Accumulator<T>, V>& gate,
                               const Vector<Accumulator<T>, V>& shift, Epilogue epilogue) {
  const Vector<T, V> some = load_anywhere<V>(from);
  if constexpr (kShifts) store(to, dx_of(some, gate, shift, epilogue));
  else store(to, epilogue.forward(some, gate));
}

// gates and shifts (samples, channels).
template <class T, bool kShifts, class Epilogue>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    rescale_planes(Problem p, Map from, Map to, const void* gates, const void* shifts, Tiling t,
                   Chunk chunk, Epilogue epilogue) {
  using A = Accumulator<T>;
  const PlanePart here(p, t, chunk, true);
  if (!here.exists) return;
  const int64_t begin = part_begin(p.pixels, t.parts, here.part);
  const int count = int(part_begin(p.pixels, t.parts, here.part + 1) - begin);
  const T* const source = sample_of<T>(from, here.sample) + here.channel * from.row_stride + begin;
  T* const target = static_cast<T*>(to.data) + here.sample * to.sample_stride +
                    here.channel * to.row_stride + begin;
  const int64_t i = here.sample * p.channels + here.channel;
  const A gate = value_at(static_cast<const A*>(gates) + i);
  const A shift = kShifts ? value_at(static_cast<const A*>(shifts) + i) : A(0);
  Stretch<T>(count, target).for_each(thread_index() % 32, [&](int e, auto width) {
    constexpr int V = decltype(width)::value;
    rescale<kShifts, V>(source + e, target + e, all_of<V>(gate), all_of<V>(shift), epilogue);
  });
}

template <bool kShifts, int V, class T, class Epilogue>
__device__ void rescale_pixel_part(const Problem& p, const Map& from, const Map& to,
                                   const void* gates, const void* shifts, const PixelPart& here,
                                   Epilogue epilogue) {
  using A = Accumulator<T>;
  const int64_t all_columns = p.channels / V;
  for (int64_t base = 0; base < all_columns; base += thread_count()) {
    const ColumnLanes lanes(int(min(all_columns - base, int64_t(thread_count()))));
    if (lanes.column >= lanes.columns) continue;
    const int64_t c = (base + lanes.column) * V;
    Vector<A, V> gate, shift{};
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const int64_t i = here.sample * p.channels + c + e;
      gate.element[e] = value_at(static_cast<const A*>(gates) + i);
      if (kShifts) shift.element[e] = value_at(static_cast<const A*>(shifts) + i);
    }
    const T* const source = sample_of<T>(from, here.sample) + c;
    T* const target = static_cast<T*>(to.data) + here.sample * to.sample_stride + c;
#pragma unroll 4
    for (int64_t row = here.begin + lanes.row; row < here.end; row += lanes.row_count)
      rescale<kShifts, V>(source + row * from.row_stride, target + row * to.row_stride, gate, shift,
                          epilogue);
  }
}

template <class T, bool kShifts, class Epilogue>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    rescale_pixels(Problem p, Map from, Map to, const void* gates, const void* shifts, Tiling t,
                   Chunk chunk, Epilogue epilogue) {
  const PixelPart here(p, t, chunk, true);
  if (t.vectors)
    rescale_pixel_part<kShifts, kVector<T>, T>(p, from, to, gates, shifts, here, epilogue);
  else rescale_pixel_part<kShifts, 1, T>(p, from, to, gates, shifts, here, epilogue);
}

}  // namespace eca::cuda
