// Strategy two_pass, for what does not fit on chip and for maps with gaps that the others cannot
// read. One kernel sums, a small one makes the gates, a third rescales. They take a few samples at
// a time, so that the third finds them in the L2 cache. It starts with what was read last.
#pragma once

#include "epilogue.h"
#include "tile.h"

namespace eca::cuda {

// Samples from `first` on, `count` of them: one launch's part of the batch.
struct Chunk {
  int64_t first, count;
};

// A part of a row that a warp walks: a head up to the first whole line, vectors, and a tail. Where
// the maps do not have the same offset within a line, all of it is head.
template <class T>
struct Stretch {
  static constexpr int V = kVector<T>;
  int head, vectors, count;

  __device__ Stretch(int count, int place, bool alike)
      : head(alike ? min(count, (V - place) % V) : count), vectors((count - head) / V),
        count(count) {}

  // body(i, width) for each vector and each single element, by the lanes of a warp.
  template <class Body>
  __device__ void for_each(int lane, Body body) const {
    for (int v = lane; v < vectors; v += 32) body(head + v * V, std::integral_constant<int, V>{});
    for (int e = lane; e < count - vectors * V; e += 32)
      body(e < head ? e : e + vectors * V, std::integral_constant<int, 1>{});
  }
};

// Where part `part` of `parts` of a length begins: at a multiple of 16.
__device__ inline int64_t part_begin(int64_t length, int parts, int part) {
  const int64_t share = ((length + parts - 1) / parts + 15) / 16 * 16;
  return min(share * part, length);
}

// Forward the elements of x; backward, with dy, their products with dy.
template <int V, class T, class Epilogue>
__device__ inline Vector<Accumulator<T>, V> terms_of(const Vector<T, V>& x, const T* dy,
                                                     Epilogue epilogue) {
  Vector<Accumulator<T>, V> terms;
  Vector<T, V> g{};
  if (dy) g = load<V>(dy);
#pragma unroll
  for (int e = 0; e < V; ++e)
    terms.element[e] = widen(x.element[e]) * (dy ? epilogue.gradient(g.element[e]) : 1);
  return terms;
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

// sums (parts, samples, channels). dy.data is null forward.
template <class T, class Epilogue>
__global__ void __launch_bounds__(kMostThreads)
    sum_planes(Problem p, Map x, Map dy, Tiling t, Chunk chunk, Workspace work, Epilogue epilogue) {
  using A = Accumulator<T>;
  const PlanePart here(p, t, chunk, false);
  if (!here.exists) return;
  const int lane = thread_index() % 32;
  const int64_t begin = part_begin(p.pixels, t.parts, here.part);
  const int count = int(part_begin(p.pixels, t.parts, here.part + 1) - begin);
  const T* const x_part = sample_of<T>(x, here.sample) + here.channel * x.row_stride + begin;
  const T* const dy_part =
      dy.data ? sample_of<T>(dy, here.sample) + here.channel * dy.row_stride + begin : nullptr;
  const int place = place_in_line(x_part);
  const Stretch<T> s(count, place, !dy_part || place_in_line(dy_part) == place);

  constexpr int V = kVector<T>;
  const auto at = [&](int i) { return dy_part ? dy_part + i : nullptr; };
  A sum = 0;
  const auto add = [&](int begin, int end, auto width) {
    constexpr int W = decltype(width)::value;
    walk(
        begin + lane * W, begin, end, 32 * W, [&](int i) { return load<W>(x_part + i); },
        [&](const Vector<T, W>& v, int i) {
          const Vector<A, W> more = terms_of<W>(v, at(i), epilogue);
#pragma unroll
          for (int e = 0; e < W; ++e) sum += more.element[e];
        });
  };
  const int tail = s.head + s.vectors * V;
  add(0, s.head, std::integral_constant<int, 1>{});
  add(s.head, tail, std::integral_constant<int, V>{});
  add(tail, count, std::integral_constant<int, 1>{});
  sum = warp_sum(sum);
  if (lane == 0)
    put(static_cast<A*>(work.sums) + (here.part * p.samples + here.sample) * p.channels +
            here.channel,
        sum);
}

// A block's place in a launch over pixels: one block for each part of the pixels of a sample.
struct PixelPart {
  int64_t sample, begin, end;
  int part;

  __device__ PixelPart(const Problem& p, const Tiling& t, const Chunk& chunk, bool from_behind) {
    const int64_t i = from_behind ? chunk.count * t.parts - 1 - block_index() : block_index();
    part = int(i % t.parts);
    sample = chunk.first + i / t.parts;
    begin = part_begin(p.pixels, t.parts, part);
    end = part_begin(p.pixels, t.parts, part + 1);
  }
};

// A thread takes columns of vectors and rows as in Pixels.
template <int V, class T, class Epilogue>
__device__ void sum_pixel_part(const Problem& p, const Map& x, const Map& dy, const PixelPart& here,
                               Shared<Accumulator<T>> scratch, Accumulator<T>* sums,
                               Epilogue epilogue) {
  using A = Accumulator<T>;
  const T* const x_part = sample_of<T>(x, here.sample) + here.begin * x.row_stride;
  const T* const dy_part =
      dy.data ? sample_of<T>(dy, here.sample) + here.begin * dy.row_stride : nullptr;
  const int64_t all_columns = p.channels / V;
  for (int64_t base = 0; base < all_columns; base += thread_count()) {
    const ColumnLanes lanes(int(min(all_columns - base, int64_t(thread_count()))));
    if (lanes.column < lanes.columns) {
      const int64_t c = (base + lanes.column) * V;
      Vector<A, V> sum{};
      walk(
          lanes.row, 0, int(here.end - here.begin), lanes.row_count,
          [&](int row) { return load<V>(x_part + row * x.row_stride + c); },
          [&](const Vector<T, V>& v, int row) {
            const Vector<A, V> more =
                terms_of<V>(v, dy_part ? dy_part + row * dy.row_stride + c : nullptr, epilogue);
#pragma unroll
            for (int e = 0; e < V; ++e) sum.element[e] += more.element[e];
          });
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

template <class T, class Epilogue>
__global__ void __launch_bounds__(kMostThreads)
    sum_pixels(Problem p, Map x, Map dy, Tiling t, Chunk chunk, Workspace work, Epilogue epilogue) {
  using A = Accumulator<T>;
  const PixelPart here(p, t, chunk, false);
  const auto scratch = shared_array<A>(0, t.threads * kVector<T>);
  A* const sums = static_cast<A*>(work.sums) + (here.part * p.samples + here.sample) * p.channels;
  if (t.vectors) sum_pixel_part<kVector<T>, T>(p, x, dy, here, scratch, sums, epilogue);
  else sum_pixel_part<1, T>(p, x, dy, here, scratch, sums, epilogue);
}

// The total of a channel's parts.
template <class A>
__device__ inline A total_of_parts(const Problem& p, const Tiling& t, const A* sums, int64_t sample,
                                   int64_t channel) {
  A total = 0;
  for (int part = 0; part < t.parts; ++part)
    total += value_at(sums + (part * p.samples + sample) * p.channels + channel);
  return total;
}

// A warp's channel in a launch with one warp for each channel of each sample.
inline __device__ bool find_channel(const Problem& p, const Chunk& chunk, int64_t* sample,
                                    int64_t* channel) {
  const int64_t i = block_index() * (thread_count() / 32) + thread_index() / 32;
  *sample = chunk.first + i / p.channels;
  *channel = i % p.channels;
  return i < chunk.count * p.channels;
}

// result (samples, channels): the total of each channel's parts, divided.
template <class T>
__global__ void __launch_bounds__(kMostThreads)
    add_parts(Problem p, Tiling t, Chunk chunk, Workspace work, void* result, int64_t divisor) {
  using A = Accumulator<T>;
  int64_t sample, c;
  if (!find_channel(p, chunk, &sample, &c)) return;
  const int64_t i = sample * p.channels + c;
  A total = 0;
  for (int part = thread_index() % 32; part < t.parts; part += 32)
    total += value_at(static_cast<const A*>(work.sums) + part * p.samples * p.channels + i);
  total = warp_sum(total);
  if (thread_index() % 32 == 0) put(static_cast<A*>(result) + i, total / A(divisor));
}

// mean and gate (samples, channels), of all samples.
template <class T>
__global__ void __launch_bounds__(kMostThreads)
    make_gates(Forward f, Tiling t, Chunk chunk, Workspace work) {
  using A = Accumulator<T>;
  const Problem& p = f.problem;
  int64_t sample, c;
  if (!find_channel(p, chunk, &sample, &c)) return;
  const Taps<T> taps(p, f.weight);
  const A* const sums = static_cast<const A*>(work.sums);
  A z = 0;
  for (int64_t j = thread_index() % 32; j < taps.size(); j += 32) {
    const int64_t from = channel_at(c + j - taps.size() / 2, p.channels, p.circular);
    // The zeros beyond the ends take part, so that a tap there shows if it is not finite.
    const A mean = from < 0 ? A(0) : total_of_parts(p, t, sums, sample, from) / A(p.pixels);
    z += taps.get(c, j) * mean;
  }
  z = warp_sum(z);
  if (thread_index() % 32 != 0) return;
  put(static_cast<A*>(f.mean) + sample * p.channels + c,
      total_of_parts(p, t, sums, sample, c) / A(p.pixels));
  put(static_cast<A*>(f.gate) + sample * p.channels + c, sigmoid(z));
}

// dz and dm / S (samples, channels).
template <class T>
__global__ void __launch_bounds__(kMostThreads)
    make_shifts(Backward b, Tiling t, Chunk chunk, Workspace work) {
  using A = Accumulator<T>;
  const Problem& p = b.problem;
  int64_t sample, c;
  if (!find_channel(p, chunk, &sample, &c)) return;
  const Taps<T> taps(p, b.weight);
  const auto dz_of = [&](int64_t channel) {
    const A gate = value_at(static_cast<const A*>(b.gate) + sample * p.channels + channel);
    return total_of_parts(p, t, static_cast<const A*>(work.sums), sample, channel) * gate *
           (A(1) - gate);
  };
  A dm = 0;
  for (int64_t j = thread_index() % 32; j < taps.size(); j += 32) {
    const int64_t from = channel_at(c - j + taps.size() / 2, p.channels, p.circular);
    if (from >= 0) dm += taps.get(from, j) * dz_of(from);
  }
  dm = warp_sum(dm);
  if (thread_index() % 32 != 0) return;
  put(static_cast<A*>(work.dz) + sample * p.channels + c, dz_of(c));
  put(static_cast<A*>(work.shift) + sample * p.channels + c, dm / A(p.pixels));
}

// Forward the epilogue of `from` and gate; else gate * from + shift, with the epilogue's gradient.
template <int V, class T, class Epilogue>
__device__ inline void rescale(const T* from, T* to, int64_t offset,
                               const Vector<Accumulator<T>, V>& gate,
                               const Vector<Accumulator<T>, V>& shift, bool forward,
                               Epilogue epilogue) {
  const Vector<T, V> v = load<V>(from);
  if (forward) return store(to + offset, epilogue.forward(v, gate));
  Vector<T, V> dx;
#pragma unroll
  for (int e = 0; e < V; ++e)
    dx.element[e] = narrow<T>(gate.element[e] * epilogue.gradient(v.element[e]) + shift.element[e]);
  store(to + offset, dx);
}

// y from x, or dx from dy. gates (samples, channels); shifts likewise, or null for none.
template <class T, class Epilogue>
__global__ void __launch_bounds__(kMostThreads)
    rescale_planes(Problem p, Map from, Map to, const void* gates, const void* shifts, Tiling t,
                   Chunk chunk, Epilogue epilogue) {
  using A = Accumulator<T>;
  const PlanePart here(p, t, chunk, true);
  if (!here.exists) return;
  const int64_t begin = part_begin(p.pixels, t.parts, here.part);
  const int count = int(part_begin(p.pixels, t.parts, here.part + 1) - begin);
  const T* const source = sample_of<T>(from, here.sample) + here.channel * from.row_stride + begin;
  T* const target = static_cast<T*>(to.data);
  const int64_t offset = here.sample * to.sample_stride + here.channel * to.row_stride + begin;
  const int64_t i = here.sample * p.channels + here.channel;
  const A gate = value_at(static_cast<const A*>(gates) + i);
  const A shift = shifts ? value_at(static_cast<const A*>(shifts) + i) : A(0);
  const int place = place_in_line(source);
  const Stretch<T> s(count, place, place == place_in_line(target + offset));
  s.for_each(thread_index() % 32, [&](int e, auto width) {
    constexpr int V = decltype(width)::value;
    Vector<A, V> gate_vector, shift_vector;
#pragma unroll
    for (int u = 0; u < V; ++u) gate_vector.element[u] = gate, shift_vector.element[u] = shift;
    rescale<V>(source + e, target, offset + e, gate_vector, shift_vector, !shifts, epilogue);
  });
}

template <int V, class T, class Epilogue>
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
      if (shifts) shift.element[e] = value_at(static_cast<const A*>(shifts) + i);
    }
    const T* const source = sample_of<T>(from, here.sample) + c;
    const int64_t offset = here.sample * to.sample_stride + c;
    for (int64_t row = here.begin + lanes.row; row < here.end; row += lanes.row_count)
      rescale<V>(source + row * from.row_stride, static_cast<T*>(to.data),
                 offset + row * to.row_stride, gate, shift, !shifts, epilogue);
  }
}

template <class T, class Epilogue>
__global__ void __launch_bounds__(kMostThreads)
    rescale_pixels(Problem p, Map from, Map to, const void* gates, const void* shifts, Tiling t,
                   Chunk chunk, Epilogue epilogue) {
  const PixelPart here(p, t, chunk, true);
  if (t.vectors) rescale_pixel_part<kVector<T>, T>(p, from, to, gates, shifts, here, epilogue);
  else rescale_pixel_part<1, T>(p, from, to, gates, shifts, here, epilogue);
}

}  // namespace eca::cuda
