// Everything that only a GPU has: coordinates, barriers, shuffles, shared memory, atomics,
// launches. The one file with intrinsics and inline PTX; kernels are plain C++ over it.
// tests/gpu_host/simt/simt.h offers the same on the host, where the kernels run under sanitizers.
#pragma once

#if defined(ECA_HOST_SIMT)
#include "simt.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "lines.h"

namespace eca::cuda {

// ---- numbers ----

using half = __half;
using bfloat16 = __nv_bfloat16;

// Sums, taps and gates.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(half x) { return __half2float(x); }
__device__ inline float widen(bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T>
__device__ inline T narrow(Accumulator<T> x) {
  if constexpr (std::is_same_v<T, half>) return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, bfloat16>) return __float2bfloat16_rn(x);
  else return x;
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

__device__ inline double one_over_root(double x) { return rsqrt(x); }

__device__ inline float error_function(float x) { return erff(x); }
__device__ inline double error_function(double x) { return erf(x); }

// V consecutive elements, moved by one instruction.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T element[V];
};

// A vector's elements, and back. Two 16-bit numbers lie in one register: converting them as a pair
// takes half the instructions of one after the other.
template <class T, int V>
__device__ inline Vector<Accumulator<T>, V> widen(const Vector<T, V>& v) {
  Vector<Accumulator<T>, V> wide;
  if constexpr (std::is_same_v<T, bfloat16> && V % 2 == 0) {
    const auto* const pairs = reinterpret_cast<const uint32_t*>(&v);
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      wide.element[2 * i] = __uint_as_float(pairs[i] << 16);
      wide.element[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) wide.element[i] = widen(v.element[i]);
  }
  return wide;
}

template <class T, int V>
__device__ inline Vector<T, V> narrow(const Vector<Accumulator<T>, V>& wide) {
  Vector<T, V> v;
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
    using Pair = std::conditional_t<std::is_same_v<T, half>, __half2, __nv_bfloat162>;
    Pair pairs[V / 2];
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      const float a = wide.element[2 * i], b = wide.element[2 * i + 1];
      if constexpr (std::is_same_v<T, half>) pairs[i] = __floats2half2_rn(a, b);
      else pairs[i] = __floats2bfloat162_rn(a, b);
    }
    std::memcpy(&v, pairs, sizeof v);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) v.element[i] = narrow<T>(wide.element[i]);
  }
  return v;
}

// Hides the vector's value from the compiler, which would otherwise keep the converted elements for
// their next use, in twice the registers.
template <class T, int V>
__device__ inline void forget(Vector<T, V>& v) {
  static_assert(sizeof(v) % 4 == 0);
  uint32_t words[sizeof(v) / 4];
  std::memcpy(words, &v, sizeof v);
#pragma unroll
  for (uint32_t& word : words) asm volatile("" : "+r"(word));
  std::memcpy(&v, words, sizeof v);
}

// Hides how a number was made: what is computed from it, or loaded, is not kept from before.
__device__ inline int hidden(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Hides how an address was made from the compiler, which would otherwise make it anew, in 64 bits,
// for each access at some distance from it.
template <class T>
__device__ inline T* pinned(T* address) {  // in global memory
  size_t global = __cvta_generic_to_global(address);
  asm volatile("" : "+l"(global));
  return static_cast<T*>(__cvta_global_to_generic(global));
}

// Of a power of two.
__device__ inline int log2_of(int power) { return __ffs(power) - 1; }

// The widest vector that one instruction moves.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

// The integer type as which one instruction moves a vector.
template <int kBytes>
using Word = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2,
                       std::conditional_t<kBytes == 4, uint32_t,
                                          std::conditional_t<kBytes == 2, uint16_t, uint8_t> > > >;

// Blocks that a multiprocessor shall hold, as an argument of __launch_bounds__. One less from
// compute capability 10.0 on: there nvcc 13.0 needs more registers for the same kernel than three
// or four blocks leave it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int resident_blocks(int wanted) { return wanted > 2 ? wanted - 1 : wanted; }
constexpr bool kShortOfRegisters = true;
#else
constexpr int resident_blocks(int wanted) { return wanted; }
constexpr bool kShortOfRegisters = false;
#endif

// ---- coordinates ----

__device__ inline int thread_index() { return int(threadIdx.x); }
__device__ inline int thread_count() { return int(blockDim.x); }
__device__ inline int64_t block_index() { return int64_t(blockIdx.x); }
__device__ inline int64_t block_count() { return int64_t(gridDim.x); }

// ---- barriers and exchange within a block ----

__device__ inline void block_barrier() { __syncthreads(); }

// The value of the lane whose index is this lane's xor `mask`. By all lanes of a warp.
template <class A>
__device__ inline A shuffle_xor(A value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- global memory ----

// `from` is a multiple of the vector's size.
template <int V, class T>
__device__ inline Vector<T, V> load(const T* from) {
  static_assert(sizeof(T) * V == sizeof(Word<sizeof(T) * V>));
  using W = Word<sizeof(T) * V>;
  const W word = *reinterpret_cast<const W*>(from);
  Vector<T, V> v;
  std::memcpy(&v, &word, sizeof v);
  return v;
}

// The same if i < end; else any value, where an assignment would have to give one.
template <int V, class T>
__device__ inline Vector<T, V> load_if_below(const T* from, int i, int end) {
  static_assert(sizeof(T) * V == 16);
  uint32_t word[4];
  asm volatile(
      "{ .reg .pred p; setp.lt.s32 p, %5, %6; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
      : "l"(__cvta_generic_to_global(from)), "r"(i), "r"(end));
  Vector<T, V> v;
  std::memcpy(&v, word, sizeof v);
  return v;
}

// V elements in words. As elements, nvcc 13.0 would give each one of two bytes a register of its own
// where they go from one branch to another, and wait for a load to do so.
template <class T, int V>
struct Packed {
  uint32_t word[sizeof(T) * V < 4 ? 1 : sizeof(T) * V / 4];

  __device__ Accumulator<T> wide(int e) const {
    if constexpr (sizeof(T) == 2 && V > 1) {
      Vector<T, 2> pair;
      std::memcpy(&pair, &word[e / 2], sizeof pair);
      return widen(pair).element[e % 2];
    } else {
      T element;
      std::memcpy(&element, &word[e * sizeof(T) / 4], sizeof element);
      return widen(element);
    }
  }

  // From element e on, which begins a word.
  template <int P>
  __device__ void put(int e, const Vector<T, P>& some) {
    std::memcpy(&word[e * sizeof(T) / 4], &some, sizeof some);
  }

  // Zeros where a bit is not set, whatever was there.
  __device__ void keep(uint32_t bits) {
    constexpr int kInWord = 4 / int(sizeof(T));
#pragma unroll
    for (int w = 0; w < V / kInWord; ++w) {
      uint32_t kept = bits >> w * kInWord & 1 ? (kInWord == 2 ? 0xffffu : ~0u) : 0u;
      if (kInWord == 2 && bits >> (w * kInWord + 1) & 1) kept |= 0xffff0000u;
      word[w] &= kept;
    }
  }

  __device__ Vector<T, V> vector() const {
    Vector<T, V> v;
    std::memcpy(&v, word, sizeof v);
    return v;
  }
};

// As for vectors.
template <class T, int V>
__device__ inline void forget(Packed<T, V>& v) {
#pragma unroll
  for (uint32_t& word : v.word) asm volatile("" : "+r"(word));
}

// load() if `there`, else zeros, without a branch.
template <int V, class T>
__device__ inline Packed<T, V> load_if(bool there, const T* from) {
  constexpr int kBytes = int(sizeof(T)) * V;
  const size_t at = __cvta_generic_to_global(from);
  Packed<T, V> v{};
  uint32_t* const w = v.word;
  if constexpr (kBytes == 16)
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3])
        : "l"(at), "r"(uint32_t(there)));
  else if constexpr (kBytes == 8)
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.v2.u32 {%0, %1}, [%2]; }"
                 : "+r"(w[0]), "+r"(w[1])
                 : "l"(at), "r"(uint32_t(there)));
  else if constexpr (kBytes == 4)
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.u32 %0, [%1]; }"
                 : "+r"(w[0])
                 : "l"(at), "r"(uint32_t(there)));
  else if constexpr (kBytes == 2)
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.u16 %0, [%1]; }"
                 : "+r"(w[0])
                 : "l"(at), "r"(uint32_t(there)));
  else
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.u8 %0, [%1]; }"
                 : "+r"(w[0])
                 : "l"(at), "r"(uint32_t(there)));
  return v;
}

__device__ inline uint32_t load_byte_if(bool there, const uint8_t* from) {
  return load_if<1>(there, from).word[0];
}

// An address's offset within a line of 16 bytes, in elements.
template <class T>
__device__ inline int place_in_line(const T* address) {
  return int(reinterpret_cast<uintptr_t>(address) % 16 / sizeof(T));
}

// 16 bytes that are no multiple of that, out of the two lines of 16 bytes in which they lie. All of
// a line can be read: memory is allocated in whole ones.
template <int V, class T>
__device__ inline Vector<T, V> load_across(const T* from) {
  static_assert(sizeof(T) * V == 16);
  const auto skip = uint32_t(reinterpret_cast<uintptr_t>(from)) & 15;
  const auto* const lines =
      reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(from) - skip);
  const uint4 first = lines[0], second = lines[1];
  uint32_t words[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
  take_from(skip, words);
  Vector<T, V> v;
  std::memcpy(&v, words, sizeof v);
  return v;
}

// V elements from any address.
template <int V, class T>
__device__ inline Vector<T, V> load_anywhere(const T* from) {
  if (V == 1 || place_in_line(from) == 0) return load<V>(from);
  return load_across<V>(from);
}

template <int V, class T>
__device__ inline void store(T* to, const Vector<T, V>& v) {
  using W = Word<sizeof(T) * V>;
  W word;
  std::memcpy(&word, &v, sizeof v);
  // nvcc 13.0 turns an assignment of 16 bytes into four stores of 4. The assembly has no memory
  // clobber, so that loads may move before the store. No launch reads what it stores here.
  if constexpr (sizeof(W) == 16)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w));
  else *reinterpret_cast<W*>(to) = word;
}

// Reads what another block of this launch has written, after an atomic has said that it is there.
__device__ inline Vector<float, 4> load_from_other_block(const float* from) {
  Vector<float, 4> v;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.element[0]), "=f"(v.element[1]), "=f"(v.element[2]), "=f"(v.element[3])
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return v;
}

// Returns the value before the addition. Whoever reads the new value with fetch_add() or
// load_acquire() sees what this thread wrote, and what its block wrote before a barrier. So does
// the reader's block after a barrier.
__device__ inline uint32_t fetch_add(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

// The same without that. A thread waits for the value where it uses it.
__device__ inline uint32_t fetch_add_alone(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

__device__ inline uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// For loops that wait for another block.
__device__ inline void pause() { __nanosleep(64); }

// ---- shared memory ----

// An array in shared memory.
template <class T>
class Shared {
 public:
  __device__ Shared(T* data, int /* count: for the host's checks */) : data_(data) {}

  __device__ T get(int i) const { return data_[i]; }
  __device__ void set(int i, T value) const { data_[i] = value; }

  // The array from element i on.
  __device__ Shared from(int i) const { return Shared(data_ + i, 0); }

  // i is a multiple of V, and the array starts at a multiple of the vector's size.
  template <int V>
  __device__ Vector<T, V> load(int i) const {
    return cuda::load<V>(data_ + i);
  }

  template <int V>
  __device__ void store(int i, const Vector<T, V>& v) const {
    if constexpr (sizeof(v) < 16) return cuda::store(data_ + i, v);
    static_assert(sizeof(v) <= 16);
    uint32_t word[4];
    std::memcpy(word, &v, sizeof v);
    // As in store(): an assignment becomes four stores, which conflict in their banks.
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(
                     uint32_t(__cvta_generic_to_shared(data_ + i))),
                 "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
  }

  // Starts to copy 4, 8 or 16 bytes from global memory, without a register on the way, so that
  // nothing waits for them. This thread reads them after finish_fetches(), others after a barrier
  // that follows it.
  template <int V>
  __device__ void fetch(int i, const T* from) const {
    constexpr int kBytes = int(sizeof(T)) * V;
#if __CUDA_ARCH__ >= 800
    const auto to = uint32_t(__cvta_generic_to_shared(data_ + i));
    const auto global = __cvta_generic_to_global(from);
    if constexpr (kBytes == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes)
                   : "memory");
#else
    store<V>(i, cuda::load<V>(from));
#endif
  }

 private:
  T* data_;
};

// An array in the block's dynamic shared memory, at a byte that suits T.
template <class T>
__device__ inline Shared<T> shared_array(int first_byte, int count) {
  extern __shared__ __align__(16) unsigned char memory[];
  return Shared<T>(reinterpret_cast<T*>(memory + first_byte), count);
}

// Waits for what this thread has fetched.
__device__ inline void finish_fetches() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// ---- launches, on the host ----

using Stream = cudaStream_t;

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears the error: the next check would report it
  throw std::runtime_error(std::string("eca_fused: ") + what + ": " + cudaGetErrorString(status));
}

inline void fill_with_zeros(void* memory, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(memory, 0, bytes, stream), "zeroing the workspace failed");
}

// Lets a kernel have all the shared memory of the current device. Once for each kernel and device:
// a limit set for each launch could be another thread's when the launch comes. The driver divides
// the memory between this and the L1 cache. Defined in host.cu.
void allow_all_shared_memory(const void* kernel);

struct Launch {
  int64_t blocks;
  int threads;           // in a block
  int64_t shared_bytes;  // dynamic shared memory of a block
  Stream stream;
  bool in_order = false;  // for the host: blocks that wait for others start in order
};

template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (how.blocks < 1 || how.blocks > INT32_MAX)
    throw std::runtime_error("eca_fused: expected 1 to 2147483647 blocks in a launch, got " +
                             std::to_string(how.blocks) + "; use a smaller batch or fewer taps");
  // A block may have 48 KB without this.
  if (how.shared_bytes > 48 << 10) allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(how.blocks));
  config.blockDim = dim3(unsigned(how.threads));
  config.dynamicSmemBytes = size_t(how.shared_bytes);
  config.stream = how.stream;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "a kernel did not start");
}

}  // namespace eca::cuda

#endif
