// The passes of a residual block's tail that write maps: y and its mask, or the gradients. They read
// every map once and write every result once: at the speed of a copy, with two vectors of each map
// asked for before the first is used, and four blocks on a multiprocessor (TUNING.md). Blocks begin
// with what the pass before has read last, which may still be in the L2 cache.
// gated_element.h has other passes for the same kernels.
#pragma once

#include "tail_element.h"
#include "tail_mask.h"

namespace eca::cuda {

// ---- what is written ----

// y = act(v), and the mask.
template <class T, bool kSmooth, bool kIdentity>
struct TailForward {
  using A = Accumulator<T>;
  static constexpr int kResults = 1;
  static constexpr int kFlatBlocks = 4, kColumnsAtOnce = 4;
  Map x, identity, y;
  uint8_t* mask;
  TailCoefficients coefficients;
  bool relu;
  Activation activation;

  template <int V, bool>
  struct Read {
    Packed<T, V> x, identity;

    __device__ void pack() {
      forget(x);
      if constexpr (kIdentity) forget(identity);
    }
  };
  template <int W>
  using Terms = TailTerms<A, W>;
  __device__ bool has_identity() const { return kIdentity && identity.data; }

  template <int V, bool kAcross>
  __device__ Read<V, kAcross> read(bool there, const TailShape&, const TailPlace& at) const {
    Read<V, kAcross> found;
    found.x = load_if<V>(there, at.in<const T>(x));
    if constexpr (kIdentity)
      found.identity = load_if<V>(there && identity.data, at.in<const T>(identity));
    return found;
  }

  template <class Read>
  __device__ uint32_t bits(const Read&, const TailShape&, const TailPlace&, int) const {
    return 0;
  }

  template <int W>
  __device__ Terms<W> terms(int64_t plane, int channel) const {
    Terms<W> found;
    found.load_all(coefficients, plane, channel, has_identity());
    return found;
  }

  // Of element e of the vectors, channel w of the terms. Returns its bit of the mask to write; the
  // bits that are given are of the mask that is read.
  template <class Read, int W>
  __device__ bool compute(const Terms<W>& k, int w, const Read& from, int e, uint32_t,
                          A (&results)[kResults]) const {
    A other = 0;
    if constexpr (kIdentity) other = from.identity.wide(e);
    const A v = k.argument(w, from.x.wide(e), other);
    const bool kept = !(v <= A(0));  // NaN is kept
    if constexpr (kSmooth) results[0] = smooth(activation, v).value;
    else results[0] = kept || !relu ? v : A(0);
    return kept;
  }

  template <int V>
  __device__ void store(const TailPlace& at, const Packed<T, V> (&results)[kResults]) const {
    cuda::store(at.in<T>(y), results[0].vector());
  }
};

// dx = p * g + q * (x - centre) + r, and d_identity with its own coefficients.
template <class T, bool kSmooth, bool kIdentity>
struct TailBackward {
  using A = Accumulator<T>;
  using Maps = TailGradientMaps<T, kSmooth, kIdentity>;
  static constexpr int kResults = 2;
  static constexpr int kFlatBlocks = kIdentity ? 2 : 3,
                       kColumnsAtOnce = kSmooth || kIdentity ? 2 : 4;
  Maps maps;
  Map dx, d_identity;                                            // or null pointers
  const void *p, *q, *r, *identity_p, *identity_q, *identity_r;  // see TailGradients
  static constexpr uint8_t* mask = nullptr;                      // none is written

  template <int V, bool kAcross>
  using Read = typename Maps::template Read<V, kAcross>;
  template <int W>
  struct Terms {
    TailTerms<A, W> v;
    Vector<A, W> p, q, r, identity_p, identity_q, identity_r;
  };
  __device__ bool by_identity() const { return kIdentity && identity_q; }

  template <int V, bool kAcross>
  __device__ Read<V, kAcross> read(bool there, const TailShape& shape, const TailPlace& at) const {
    return maps.template read<V, kAcross>(there, shape, at);
  }

  template <class Read>
  __device__ uint32_t bits(const Read& from, const TailShape& shape, const TailPlace& at,
                           int left) const {
    return maps.bits(from, shape, at, left);
  }

  template <int W>
  __device__ Terms<W> terms(int64_t plane, int channel) const {
    return {maps.template terms<W>(plane, channel),
            coefficients_if<A, W>(dx.data, p, plane),
            coefficients_if<A, W>(q, q, channel),
            coefficients_if<A, W>(dx.data, r, plane),
            coefficients_if<A, W>(d_identity.data, identity_p, channel),
            coefficients_if<A, W>(by_identity(), identity_q, channel),
            coefficients_if<A, W>(by_identity(), identity_r, channel)};
  }

  template <class Read, int W>
  __device__ bool compute(const Terms<W>& k, int w, const Read& from, int e, uint32_t bits,
                          A (&results)[kResults]) const {
    const auto of = maps.element(k.v, w, from, e, bits);
    results[0] = k.p.element[w] * of.g + k.r.element[w];
    if (q) results[0] += k.q.element[w] * (of.x - k.v.centre.element[w]);
    results[1] = k.identity_p.element[w] * of.g;
    if (by_identity())
      results[1] += k.identity_q.element[w] * (of.identity - k.v.identity_centre.element[w]) +
                    k.identity_r.element[w];
    return false;
  }

  template <int V>
  __device__ void store(const TailPlace& at, const Packed<T, V> (&results)[kResults]) const {
    if (dx.data) cuda::store(at.in<T>(dx), results[0].vector());
    if (d_identity.data) cuda::store(at.in<T>(d_identity), results[1].vector());
  }
};

// compute(e, results) for the elements [begin, begin + kCount) of some vectors. Pairs of results are
// rounded at once: 16-bit ones then take half of the registers.
template <int kCount, class T, int V, int kResults, class Compute>
__device__ inline uint32_t compute_some(int begin, Packed<T, V> (&to)[kResults], Compute compute) {
  using A = Accumulator<T>;
  constexpr int P = kCount % 2 == 0 ? 2 : 1;
  uint32_t bits = 0;
#pragma unroll
  for (int e = begin; e < begin + kCount; e += P) {
    Vector<A, P> wide[kResults];
#pragma unroll
    for (int i = 0; i < P; ++i) {
      A results[kResults];
      bits |= uint32_t(compute(e + i, results)) << (e + i);
#pragma unroll
      for (int r = 0; r < kResults; ++r) wide[r].element[i] = results[r];
    }
#pragma unroll
    for (int r = 0; r < kResults; ++r) to[r].put(e, narrow<T>(wide[r]));
  }
  return bits;
}

// ---- by rows: planes, and whatever has no whole vectors ----

// A block's elements: `count` of them from an element of a row on, over the rows that follow.
struct FlatTile {
  int row, offset, count;

  __device__ explicit FlatTile(const TailGrid& grid) {
    const int64_t tile = block_count() - 1 - block_index();
    if (grid.octets) {
      const int64_t first = tile * grid.octets,
                    all = int64_t(grid.all_rows) * (grid.shape.length / 8);
      row = quotient(int(first), grid.by_octets);
      offset = int(first - int64_t(row) * (grid.shape.length / 8)) * 8;
      count = int(min(grid.octets, all - first)) * 8;
    } else {
      const int rows = int(uint32_t(tile) / uint32_t(grid.parts));
      row = rows * grid.rows;
      offset = int(tile - int64_t(rows) * grid.parts) * grid.part;
      count = grid.parts > 1 ? min(grid.part, grid.shape.length - offset)
                             : min(grid.rows, grid.all_rows - row) * grid.shape.length;
    }
  }

  // Of the tile's element i.
  __device__ TailPlace place(const TailGrid& grid, int i) const {
    const int rows = quotient(offset + i, grid.by_length), in_all = row + rows;
    TailPlace at;
    at.offset = offset + i - rows * grid.shape.length;
    at.sample = quotient(in_all, grid.by_sample);
    at.row = in_all - at.sample * grid.shape.rows_of_sample;
    return at;
  }
};

// V is 1, or whole vectors for planes: these follow one another without a gap, or are whole vectors.
template <class T, int V, class Pass>
__global__ void __launch_bounds__(kTailThreads, resident_blocks(Pass::kFlatBlocks))
    tail_flat(TailGrid grid, Pass pass) {
  constexpr int kAtOnce = kTailAtOnce<V>, kChunk = kTailThreads * kAtOnce * V;
  const TailShape& shape = grid.shape;
  const FlatTile tile(grid);
  // Bytes of a vector of eight need no other thread.
  const bool whole = V == 8 && grid.octets, staged = pass.mask && !whole;
  const MaskBits<V, kAtOnce> mask(staged);
#pragma unroll 1
  for (int begin = 0; begin < tile.count; begin += kChunk) {
    const int first = begin + thread_index() * V;
    typename Pass::template Read<V, (V > 1)> read[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = first + u * kTailThreads * V;
      read[u] = pass.template read<V, (V > 1)>(i < tile.count, shape, tile.place(grid, i));
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = hidden(first + u * kTailThreads * V);
      if (i >= tile.count) continue;
      const TailPlace at = tile.place(grid, i);
      int channel = at.channel(shape), left = shape.length - at.offset;
      auto terms = pass.template terms<1>(at.plane(shape), channel);
      Packed<T, V> results[Pass::kResults];
      const uint32_t given = pass.bits(read[u], shape, at, left);
      const uint32_t bits = compute_some<V>(0, results, [&](int e, auto& some) {
        if (e % 2 == 0) read[u].pack();
        if (V > 1 && e == left) {  // the next plane
          channel = channel + 1 < shape.channels ? channel + 1 : 0;
          terms = pass.template terms<1>(at.plane(shape) + 1, channel);
        }
        return pass.compute(terms, 0, read[u], e, given, some);
      });
      pass.store(at, results);
      if (!pass.mask) continue;
      if (staged) mask.put(i, bits);
      else put(pass.mask + at.mask_row(shape) + at.offset / 8, uint8_t(bits));
    }
    if (!staged) continue;
    block_barrier();
    mask.write(pass.mask + int64_t(tile.row) * shape.row_bytes + tile.offset / 8, shape.row_bytes,
               begin, begin + kChunk, tile.count,
               grid.octets || grid.parts > 1 ? tile.count : shape.length);
  }
}

// ---- by columns: pixels whose channels are whole vectors ----

// A thread keeps to a column, whose coefficients its vectors share: in float, those of a vector take
// more of the L1 cache than the vector does of memory. So it has more vectors at a time than in
// tail_flat, and a multiprocessor fewer blocks.
template <class T, class Pass>
__global__ void __launch_bounds__(kTailThreads, 2) tail_columns(TailGrid grid, Pass pass) {
  constexpr int V = kVector<T>, kAtOnce = Pass::kColumnsAtOnce, W = 4;
  const TailShape& shape = grid.shape;
  const auto block = uint32_t(block_count() - 1 - block_index()),
             in_part = block / uint32_t(grid.parts);
  const int first_channel = int(block - in_part * uint32_t(grid.parts)) * grid.part,
            sample = int(in_part / uint32_t(grid.tiles)),
            first_row = (int(in_part) - sample * grid.tiles) * grid.rows,
            channels = min(grid.part, shape.length - first_channel),
            rows = min(grid.rows, shape.rows_of_sample - first_row);
  const int columns = channels / V, row_count = kTailThreads / columns,
            row = int(uint32_t(thread_index()) / uint32_t(columns)),
            channel = (thread_index() - row * columns) * V;
  const bool staged = V < 8 && pass.mask;
  const MaskBits<V, kAtOnce> mask(staged);
  // Hidden, because the thread's place in each map would take two registers.
  const auto place = [&](int r) {
    return TailPlace{hidden(sample), first_row + r, hidden(first_channel + channel)};
  };
  const int end = row < row_count ? rows : 0;
  const auto has = [&](int r) { return r < end; };
#pragma unroll 1
  for (int begin = 0; begin < rows; begin += kAtOnce * row_count) {
    typename Pass::template Read<V, false> read[kAtOnce];
    Packed<T, V> results[kAtOnce][Pass::kResults];
    uint32_t bits[kAtOnce] = {};
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int r = begin + row + u * row_count;
      read[u] = pass.template read<V, false>(has(r), shape, place(r));
    }
    if (has(begin + row)) {
      uint32_t given[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) given[u] = pass.bits(read[u], shape, place(0), V);
#pragma unroll
      for (int e = 0; e < V; e += W) {
        const int c = hidden(e);  // without which all coefficients would be in registers
        const TailPlace at = place(0);
        const auto terms = pass.template terms<W>(at.plane(shape) + c, at.offset + c);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
          bits[u] |= compute_some<W>(e, results[u], [&](int i, auto& some) {
            if (i % 2 == 0) read[u].pack();
            return pass.compute(terms, i - e, read[u], i, given[u], some);
          });
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int r = begin + row + u * row_count;
      if (!has(r)) continue;
      pass.store(place(r), results[u]);
      if (!pass.mask) continue;
      if (staged) mask.put(r * channels + channel, bits[u]);
      else put(pass.mask + place(r).mask_row(shape) + place(r).offset / 8, uint8_t(bits[u]));
    }
    if (!staged) continue;
    block_barrier();
    mask.write(pass.mask + TailPlace{sample, first_row, 0}.mask_row(shape) + first_channel / 8,
               shape.row_bytes, begin * channels, (begin + kAtOnce * row_count) * channels,
               rows * channels, channels);
  }
}

}  // namespace eca::cuda
