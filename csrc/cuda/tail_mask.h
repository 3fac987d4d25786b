// The mask of ReLU: threads leave the bits of their vectors in shared memory, and bytes are made of
// them there. A byte may have bits of several vectors, and a vector those of several rows.
#pragma once

#include "arguments.h"
#include "tail_plan.h"

namespace eca::cuda {

// Of vectors of V elements, kAtOnce of which a thread has at a time.
template <int V, int kAtOnce>
class MaskBits {
 public:
  __device__ MaskBits(bool staged, int first_byte = 0)
      : ring_(shared_array<uint8_t>(first_byte, staged ? kMaskRing<kAtOnce> : 0)) {}

  // Of the vector that begins with this element of the tile.
  __device__ void put(int element, uint32_t bits) const { ring_.set(place(element), bits); }

  // Writes the bytes that end within the elements [begin, end) of a tile: `count` elements of rows
  // of `length`, whose bytes lie side by side from `to` on, `pitch` from a row to the next. By all
  // threads, after a barrier.
  __device__ void write(uint8_t* to, int64_t pitch, int begin, int end, int count,
                        int length) const {
    const int row_bytes = (length + 7) / 8;
    const auto ended = [&](int element) {
      const int row = int(uint32_t(element) / uint32_t(length));
      return row * row_bytes + (element - row * length) / 8;
    };
    const int first = ended(begin), last = ended(min(end, count));
#pragma unroll 1
    for (int i = first + thread_index(); i < last; i += thread_count()) {
      const int row = int(uint32_t(i) / uint32_t(row_bytes)), byte = i - row * row_bytes;
      const int from = row * length + 8 * byte, bits = min(8, length - 8 * byte);
      put_byte(to + row * pitch + byte, from, bits);
    }
  }

 private:
  __device__ static int place(int element) { return element / V & (kMaskRing<kAtOnce> - 1); }

  __device__ void put_byte(uint8_t* to, int from, int bits) const {
    uint32_t byte = 0;
    for (int e = from / V * V; e < from + bits; e += V) {
      const uint32_t some = ring_.get(place(e));
      byte |= e < from ? some >> (from - e) : some << (e - from);
    }
    cuda::put(to, uint8_t(byte & ((1u << bits) - 1)));
  }

  Shared<uint8_t> ring_;
};

}  // namespace eca::cuda
