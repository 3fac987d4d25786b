// Strategy two_pass, for what the others cannot do: planes with gaps between them, pixels whose
// channels are not whole vectors, float64. One kernel sums, a small one makes the gates, a third
// rescales. They take a few samples at a time, so that the third finds them in the L2 cache. It
// starts with what was read last.
#pragma once

#include "columns.h"

namespace eca::cuda {

// Samples from `first` on, `count` of them: one launch's part of the batch.
struct Chunk {
  int64_t first, count;
};

// Where part `part` of `parts` of a length begins: at a multiple of `unit`.
__device__ inline int64_t part_begin(int64_t length, int parts, int part, int unit) {
  const int64_t share = ((length + parts - 1) / parts + unit - 1) / unit * unit;
  return min(share * part, length);
}

// A warp's place in a launch over planes: one warp for each part of each plane. Elements of the
// part are counted from 0 on.
template <class T>
struct PlanePart {
  static constexpr int kUnit = 16;

  int64_t sample, channel, begin;
  int part, count;
  bool exists;

  // Divisions are of 32 bits: one of 64 would take 100 instructions. The launcher refuses more
  // warps than that.
  __device__ PlanePart(const Problem& problem, const Tiling& tiling, const Chunk& chunk,
                       bool from_behind) {
    const auto parts = uint32_t(tiling.parts), channels = uint32_t(problem.channels);
    const uint32_t all = uint32_t(chunk.count) * channels * parts;
    uint32_t i = uint32_t(block_index()) * (thread_count() / 32) + thread_index() / 32;
    exists = i < all;
    if (from_behind) i = all - 1 - i;
    const uint32_t plane = i / parts;
    part = int(i - plane * parts);
    channel = plane % channels;
    sample = chunk.first + plane / channels;
    begin = part_begin(problem.pixels, tiling.parts, part, kUnit);
    count = int(part_begin(problem.pixels, tiling.parts, part + 1, kUnit) - begin);
  }

  __device__ Cursor<T, std::integral_constant<int, 1>> cursor(const Map& map) const {
    return {
        static_cast<T*>(map.data) + sample * map.sample_stride + channel * map.row_stride + begin,
        {}};
  }
};

// Vectors that a thread asks for before it uses the first.
constexpr int kPassAtOnce = 4;

// A vector of x and, if the sum takes it, one of dy.
template <class Sum, class T, int V>
struct Terms {
  Vector<T, V> x, dy;

  // Both from a multiple of the vector's size, but for dy if not kAligned.
  template <bool kAligned, class Where>
  __device__ static Terms load(const Where& x, const Where& dy, int i) {
    if constexpr (Sum::kTakesGradient)
      return {cuda::load<V>(x.at(i)), load_from<kAligned, V>(dy.at(i))};
    else return {cuda::load<V>(x.at(i)), {}};
  }

  // Calls add(s, terms) for each sum s.
  template <class Gradient, class Add>
  __device__ void add_up(int i, const Gradient& gradient, Add add) const {
    using A = Accumulator<T>;
    Vector<A, V> g{}, terms[Sum::kSums];
    if constexpr (Sum::kTakesGradient) {
      Vector<T, V> some = dy;
      gradient(i, some);
      g = widen(some);
    }
    Sum::terms(widen(x), g, terms);
#pragma unroll
    for (int s = 0; s < Sum::kSums; ++s) add(s, terms[s]);
  }
};

// sums (Sum::kSums, parts, samples, channels). dy is read if the sum takes the gradient.
template <class T, class Sum, class Step>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    sum_planes(Problem problem, Map x, Map dy, Tiling tiling, Chunk chunk, Workspace work,
               Step step) {
  using A = Accumulator<T>;
  const PlanePart<T> here(problem, tiling, chunk, false);
  if (!here.exists) return;
  const int lane = thread_index() % 32;
  const auto xs = here.cursor(x), dys = here.cursor(Sum::kTakesGradient ? dy : x);
  const auto gradient = step.gradient(here);
  ChainedSum<A> sums[Sum::kSums];
  const Stretch<T> stretch(here.count, xs.first);
  with_choice(stretch.fits(dys.first), [&](auto aligned) {
    stretch.template for_each<kPassAtOnce>(
        lane, 32,
        [&](int i, auto width) {
          return Terms<Sum, T, decltype(width)::value>::template load<decltype(aligned)::value>(
              xs, dys, i);
        },
        [&](int i, auto, const auto& terms) {
          terms.add_up(i, gradient, [&](int s, const auto& some) { sums[s].add(some); });
        });
  });
#pragma unroll
  for (int s = 0; s < Sum::kSums; ++s) {
    const A total = warp_sum(sums[s].total());
    const int64_t row = (int64_t(s) * tiling.parts + here.part) * problem.samples + here.sample;
    if (lane == 0) put(static_cast<A*>(work.sums) + row * problem.channels + here.channel, total);
  }
}

// A block's place in a launch over pixels: one block for each part of the pixels of a sample.
struct PixelPart {
  int64_t sample, begin, end;
  int part;

  __device__ PixelPart(const Problem& problem, const Tiling& tiling, const Chunk& chunk,
                       bool from_behind) {
    const auto blocks = uint32_t(block_count()), block = uint32_t(block_index());
    const uint32_t i = from_behind ? blocks - 1 - block : block,
                   in_chunk = i / uint32_t(tiling.parts);
    part = int(i - in_chunk * uint32_t(tiling.parts));
    sample = chunk.first + in_chunk;
    begin = part_begin(problem.pixels, tiling.parts, part, 1);
    end = part_begin(problem.pixels, tiling.parts, part + 1, 1);
  }

  __device__ int rows() const { return int(end - begin); }
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

// A column of a part of the pixels, from a channel on. Rows are counted from 0 on.
template <class T>
struct PixelColumn {
  int64_t sample, channel, begin;

  __device__ Cursor<T, int64_t> cursor(const Map& map) const {
    return {
        static_cast<T*>(map.data) + sample * map.sample_stride + begin * map.row_stride + channel,
        map.row_stride};
  }
};

// Calls body(integral_constant) with the number of elements that one access moves.
template <class T, class Body>
__device__ inline void with_width(int bytes, Body body) {
  constexpr int V = kVector<T>;
  if (bytes == 16) return body(std::integral_constant<int, V>{});
  if constexpr (V >= 4)
    if (bytes == 8) return body(std::integral_constant<int, V / 2>{});
  if constexpr (V >= 8)
    if (bytes == 4) return body(std::integral_constant<int, V / 4>{});
  body(std::integral_constant<int, 1>{});
}

template <class Sum, int V, class T, class Step>
__device__ void sum_pixel_part(const Problem& problem, const Map& x, const Map& dy,
                               const Tiling& tiling, const PixelPart& here,
                               Shared<Accumulator<T>> scratch, const Workspace& work, Step step) {
  using A = Accumulator<T>;
  const int64_t all_columns = problem.channels / V;
  for (int64_t base = 0; base < all_columns; base += thread_count()) {
    const ColumnLanes lanes(int(min(all_columns - base, int64_t(thread_count()))));
    const bool has_column = lanes.column < lanes.columns;
    Vector<A, V> sums[Sum::kSums] = {};
    if (has_column) {
      const PixelColumn<T> column{here.sample, (base + lanes.column) * V, here.begin};
      const auto xs = column.cursor(x), dys = column.cursor(Sum::kTakesGradient ? dy : x);
      const auto gradient = step.gradient(column);
      in_batches<kPassAtOnce>(
          lanes.row, here.rows(), lanes.row_count,
          [&](int row) { return Terms<Sum, T, V>::template load<true>(xs, dys, row); },
          [&](int row, const auto& terms) {
            terms.add_up(row, gradient, [&](int s, const auto& some) { add_all(sums[s], some); });
          });
    }
#pragma unroll
    for (int s = 0; s < Sum::kSums; ++s) {
      if (has_column) store_all((lanes.row * lanes.columns + lanes.column) * V, sums[s], scratch);
      block_barrier();
      const int64_t row = (int64_t(s) * tiling.parts + here.part) * problem.samples + here.sample;
      for (int i = thread_index(); i < lanes.columns * V; i += thread_count()) {
        A sum = 0;
        for (int r = 0; r < lanes.row_count; ++r) sum += scratch.get(r * lanes.columns * V + i);
        put(static_cast<A*>(work.sums) + row * problem.channels + base * V + i, sum);
      }
      block_barrier();
    }
  }
}

template <class T, class Sum, class Step>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    sum_pixels(Problem problem, Map x, Map dy, Tiling tiling, Chunk chunk, Workspace work,
               Step step) {
  const PixelPart here(problem, tiling, chunk, false);
  const auto scratch = shared_array<Accumulator<T>>(0, tiling.threads * kVector<T>);
  with_width<T>(tiling.width, [&](auto width) {
    sum_pixel_part<Sum, decltype(width)::value, T>(problem, x, dy, tiling, here, scratch, work,
                                                   step);
  });
}

// A warp's channel in a launch with one warp for each channel of each sample.
inline __device__ bool find_channel(const Problem& problem, const Chunk& chunk, int64_t* sample,
                                    int64_t* channel) {
  const int64_t i = block_index() * (thread_count() / 32) + thread_index() / 32;
  *sample = chunk.first + i / problem.channels;
  *channel = i % problem.channels;
  return i < chunk.count * problem.channels;
}

// The parts of the sums of a sample's channels.
template <class A>
struct SampleParts {
  const A* sums;  // of the sample's first channel
  int64_t stride;
  int parts;

  __device__ SampleParts(const Problem& problem, const Tiling& tiling, const Workspace& work,
                         int64_t sample)
      : sums(static_cast<const A*>(work.sums) + sample * problem.channels),
        stride(problem.samples * problem.channels), parts(tiling.parts) {}

  // A channel's total, in all lanes. By all lanes of a warp, which share the parts.
  __device__ A total(int64_t channel) const {
    A total = 0;
#pragma unroll 4
    for (int part = thread_index() % 32; part < parts; part += 32)
      total += value_at(sums + part * stride + channel);
    return warp_sum(total);
  }

  // The sum over the taps of factor(tap, channel) times the total of channel(tap), or 0 where that
  // is -1. By all lanes of a warp, which share the taps and the parts: a lane that added up all
  // parts of a channel would wait for one after the other.
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
      sum += factor(tap, from) * total;
    }
    return warp_sum(sum);
  }
};

// result (samples, channels): the total of each channel's parts, divided.
template <class T>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    add_parts(Problem problem, Tiling tiling, Chunk chunk, Workspace work, void* result,
              int64_t divisor) {
  using A = Accumulator<T>;
  int64_t sample, c;
  if (!find_channel(problem, chunk, &sample, &c)) return;
  const A total = SampleParts<A>(problem, tiling, work, sample).total(c);
  if (thread_index() % 32 == 0)
    put(static_cast<A*>(result) + sample * problem.channels + c, total / A(divisor));
}

// mean and gate (samples, channels), of all samples.
template <class T>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    make_gates(Forward f, Tiling tiling, Chunk chunk, Workspace work) {
  using A = Accumulator<T>;
  const Problem& problem = f.problem;
  int64_t sample, c;
  if (!find_channel(problem, chunk, &sample, &c)) return;
  const Taps<T> taps(problem, f.weight);
  const SampleParts<A> parts(problem, tiling, work, sample);
  const A mean = parts.total(c) / A(problem.pixels);
  // The zeros beyond the ends take part, so that a tap there shows if it is not finite.
  const A z = parts.weighted(
      taps.size(),
      [&](int64_t j) {
        return channel_at(c + j - taps.size() / 2, problem.channels, problem.circular);
      },
      [&](int64_t j, int64_t) { return taps.get(c, j); });
  if (thread_index() % 32 != 0) return;
  put(static_cast<A*>(f.mean) + sample * problem.channels + c, mean);
  put(static_cast<A*>(f.gate) + sample * problem.channels + c, sigmoid(z / A(problem.pixels)));
}

// dz and dm / S (samples, channels).
template <class T>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    make_shifts(Backward b, Tiling tiling, Chunk chunk, Workspace work) {
  using A = Accumulator<T>;
  const Problem& problem = b.problem;
  int64_t sample, c;
  if (!find_channel(problem, chunk, &sample, &c)) return;
  const Taps<T> taps(problem, b.weight);
  const SampleParts<A> parts(problem, tiling, work, sample);
  const auto slope = [&](int64_t channel) {
    const A gate = value_at(static_cast<const A*>(b.gate) + sample * problem.channels + channel);
    return gate * (A(1) - gate);
  };
  // Beyond the ends there are no channels whose taps could lie over this one.
  const A dm = parts.weighted(
      taps.size(),
      [&](int64_t j) {
        return channel_at(c - j + taps.size() / 2, problem.channels, problem.circular);
      },
      [&](int64_t j, int64_t from) { return from < 0 ? A(0) : taps.get(from, j) * slope(from); });
  const A dz = parts.total(c) * slope(c);
  if (thread_index() % 32 != 0) return;
  put(static_cast<A*>(work.dz) + sample * problem.channels + c, dz);
  put(static_cast<A*>(work.shift) + sample * problem.channels + c, dm / A(problem.pixels));
}

// y from x where there are no shifts, or dx from dy. gates and shifts (samples, channels).
template <class T, bool kShifts, class Step>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    rescale_planes(Problem problem, Map from, Map to, const void* gates, const void* shifts,
                   Tiling tiling, Chunk chunk, Step step) {
  using A = Accumulator<T>;
  const PlanePart<T> here(problem, tiling, chunk, true);
  if (!here.exists) return;
  const auto source = here.cursor(from);
  const int64_t channel = here.sample * problem.channels + here.channel;
  const A gate = value_at(static_cast<const A*>(gates) + channel);
  const Stretch<T> stretch(here.count, here.cursor(to).first);
  const auto for_each = [&](auto use) {
    with_choice(stretch.fits(source.first), [&](auto aligned) {
      stretch.template for_each<kPassAtOnce>(
          thread_index() % 32, 32,
          [&](int i, auto width) {
            return load_from<decltype(aligned)::value, decltype(width)::value>(source.at(i));
          },
          use);
    });
  };
  if constexpr (kShifts) {
    const A shift = value_at(static_cast<const A*>(shifts) + channel);
    const auto gradient = step.gradient(here);
    const auto result = step.backward(to, here);
    for_each([&](int i, auto width, auto g) {
      constexpr int V = decltype(width)::value;
      gradient(i, g);
      result.put(i, g, all_of<V>(gate), all_of<V>(shift));
    });
  } else {
    const auto result = step.forward(to, here);
    for_each([&](int i, auto width, const auto& some) {
      result.put(i, some, all_of<decltype(width)::value>(gate));
    });
  }
}

// The numbers (samples, channels) of V channels.
template <int V, class A>
__device__ inline Vector<A, V> numbers_of(const void* numbers, int64_t at) {
  Vector<A, V> v;
#pragma unroll
  for (int e = 0; e < V; ++e) v.element[e] = value_at(static_cast<const A*>(numbers) + at + e);
  return v;
}

template <bool kShifts, int V, class T, class Step>
__device__ void rescale_pixel_part(const Problem& problem, const Map& from, const Map& to,
                                   const void* gates, const void* shifts, const PixelPart& here,
                                   Step step) {
  using A = Accumulator<T>;
  const int64_t all_columns = problem.channels / V;
  for (int64_t base = 0; base < all_columns; base += thread_count()) {
    const ColumnLanes lanes(int(min(all_columns - base, int64_t(thread_count()))));
    if (lanes.column >= lanes.columns) continue;
    const PixelColumn<T> column{here.sample, (base + lanes.column) * V, here.begin};
    const int64_t channel = here.sample * problem.channels + column.channel;
    const Vector<A, V> gate = numbers_of<V, A>(gates, channel);
    const auto source = column.cursor(from);
    const auto for_each = [&](auto use) {
      in_batches<kPassAtOnce>(
          lanes.row, here.rows(), lanes.row_count, [&](int row) { return load<V>(source.at(row)); },
          use);
    };
    if constexpr (kShifts) {
      const Vector<A, V> shift = numbers_of<V, A>(shifts, channel);
      const auto gradient = step.gradient(column);
      const auto result = step.backward(to, column);
      for_each([&](int row, Vector<T, V> g) {
        gradient(row, g);
        result.put(row, g, gate, shift);
      });
    } else {
      const auto result = step.forward(to, column);
      for_each([&](int row, const auto& some) { result.put(row, some, gate); });
    }
  }
}

template <class T, bool kShifts, class Step>
__global__ void __launch_bounds__(kPassThreads, kPassBlocks)
    rescale_pixels(Problem problem, Map from, Map to, const void* gates, const void* shifts,
                   Tiling tiling, Chunk chunk, Step step) {
  const PixelPart here(problem, tiling, chunk, true);
  with_width<T>(tiling.width, [&](auto width) {
    rescale_pixel_part<kShifts, decltype(width)::value, T>(problem, from, to, gates, shifts, here,
                                                           step);
  });
}

}  // namespace eca::cuda
