// Vectors that begin anywhere in memory, out of the lines of 16 bytes in which they lie.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ECA_ANYWHERE __host__ __device__
#else
#define ECA_ANYWHERE
#endif

namespace eca::cuda {

// Moves the 16 bytes from byte `skip` of two lines on to the beginning of `words`; `skip` is below
// 16 and even. Each step is one selection, or one shift of two registers, for each word.
ECA_ANYWHERE inline void take_from(uint32_t skip, uint32_t (&words)[8]) {
  for (int i = 0; i < 6; ++i) words[i] = skip & 8 ? words[i + 2] : words[i];
  for (int i = 0; i < 5; ++i) words[i] = skip & 4 ? words[i + 1] : words[i];
  for (int i = 0; i < 4; ++i)
    words[i] = uint32_t((uint64_t(words[i + 1]) << 32 | words[i]) >> (skip & 2) * 8);
}

}  // namespace eca::cuda

#undef ECA_ANYWHERE
