// The host's form of csrc/cuda/device.h, with the same names and meanings. Kernels compile against
// it with -DECA_HOST_SIMT and run on the fibers of runtime.h. A trailing `Place` is the kernel's
// line by default.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "../../../csrc/cuda/lines.h"
#include "numbers.h"
#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

// CUDA's, in the global namespace and for operands of different types.
template <class A, class B,
          class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return std::fmin(C(a), C(b));
  else return C(b) < C(a) ? C(b) : C(a);
}

template <class A, class B,
          class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return std::fmax(C(a), C(b));
  else return C(a) < C(b) ? C(b) : C(a);
}

namespace eca::cuda {

using simt::Place;

// ---- coordinates ----

inline int thread_index() { return simt::here->thread; }
inline int thread_count() { return simt::here->threads; }
inline int64_t block_index() { return simt::here->block; }
inline int64_t block_count() { return simt::here->blocks; }

// ---- barriers and exchange within a block ----

inline void block_barrier(Place place = Place::here()) { simt::block_barrier(place); }

template <class A>
inline A shuffle_xor(A value, int mask, Place place = Place::here()) {
  static_assert(std::is_arithmetic_v<A> && (sizeof(A) == 4 || sizeof(A) == 8));
  simt::shuffle_xor(&value, sizeof value, mask, place);
  return value;
}

// ---- global memory ----

// V consecutive elements, moved by one instruction.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T element[V];
};

template <class T>
constexpr int kVector = 16 / int(sizeof(T));

template <class T, int V>
constexpr bool kOneInstruction = sizeof(T) * V == 16 || sizeof(T) * V == 8 || sizeof(T) * V == 4 ||
                                 sizeof(T) * V == 2 || sizeof(T) * V == 1;

template <class T, int V>
inline Vector<Accumulator<T>, V> widen(const Vector<T, V>& v) {
  Vector<Accumulator<T>, V> wide;
  for (int i = 0; i < V; ++i) wide.element[i] = widen(v.element[i]);
  return wide;
}

template <class T, int V>
inline Vector<T, V> narrow(const Vector<Accumulator<T>, V>& wide) {
  Vector<T, V> v;
  for (int i = 0; i < V; ++i) v.element[i] = narrow<T>(wide.element[i]);
  return v;
}

template <class T, int V>
inline void forget(Vector<T, V>&) {}

inline int hidden(int value) { return value; }

template <class T>
inline T* pinned(T* address) {
  return address;
}

constexpr bool kShortOfRegisters = false;

inline int log2_of(int power) { return __builtin_ctz(unsigned(power)); }

inline void check_aligned(const void* address, int bytes, Place place) {
  if (reinterpret_cast<uintptr_t>(address) % uintptr_t(bytes) != 0) simt::misaligned(bytes, place);
}

template <int V, class T>
inline Vector<T, V> load(const T* from, Place place = Place::here()) {
  static_assert(kOneInstruction<T, V>);
  check_aligned(from, sizeof(T) * V, place);
  if (simt::counting) simt::count_access(from, sizeof(T) * V, simt::Direction::kLoad, true, place);
  Vector<T, V> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <int V, class T>
inline Vector<T, V> load_if_below(const T* from, int i, int end, Place place = Place::here()) {
  if (i < end) return load<V>(from, place);
  Vector<T, V> undefined;
  std::memset(&undefined, 0xff, sizeof undefined);
  return undefined;
}

template <class T, int V>
struct Packed {
  Vector<T, V> elements;
  Accumulator<T> wide(int e) const { return widen(elements.element[e]); }
  template <int P>
  void put(int e, const Vector<T, P>& some) {
    for (int i = 0; i < P; ++i) elements.element[e + i] = some.element[i];
  }
  void keep(uint32_t bits) {
    for (int e = 0; e < V; ++e)
      if (!(bits >> e & 1)) elements.element[e] = T{};
  }
  Vector<T, V> vector() const { return elements; }
};

template <class T, int V>
inline void forget(Packed<T, V>&) {}

template <int V, class T>
inline Packed<T, V> load_if(bool there, const T* from, Place place = Place::here()) {
  if (there) return {load<V>(from, place)};
  return {};
}

inline uint32_t load_byte_if(bool there, const uint8_t* from, Place place = Place::here()) {
  return there ? load<1>(from, place).element[0] : 0;
}

template <class T>
inline int place_in_line(const T* address) {
  return int(reinterpret_cast<uintptr_t>(address) % 16 / sizeof(T));
}

// It reads no more than the elements, so that all others may be someone else's.
template <int V, class T>
inline Vector<T, V> load_across(const T* from, Place place = Place::here()) {
  if (place_in_line(from) == 0) simt::fault("aligned access", place, "two lines read for one");
  if (simt::counting)
    for (const T* line : {from - place_in_line(from), from - place_in_line(from) + V})
      simt::count_access(line, 16, simt::Direction::kLoad, true, place);
  uint32_t words[8];
  std::memset(words, 0xff, sizeof words);
  const auto skip = uint32_t(reinterpret_cast<uintptr_t>(from)) % 16;
  std::memcpy(reinterpret_cast<char*>(words) + skip, from, 16);
  take_from(skip, words);
  Vector<T, V> v;
  std::memcpy(&v, words, sizeof v);
  return v;
}

template <int V, class T>
inline Vector<T, V> load_anywhere(const T* from, Place place = Place::here()) {
  if (V == 1 || place_in_line(from) == 0) return load<V>(from, place);
  return load_across<V>(from, place);
}

template <int V, class T>
inline void store(T* to, const Vector<T, V>& v, Place place = Place::here()) {
  static_assert(kOneInstruction<T, V>);
  check_aligned(to, sizeof(T) * V, place);
  if (simt::counting) simt::count_access(to, sizeof(T) * V, simt::Direction::kStore, true, place);
  std::memcpy(to, &v, sizeof v);
}

// Others run before and after it, which shows what a kernel does too late or too early.
inline Vector<float, 4> load_from_other_block(const float* from, Place place = Place::here()) {
  check_aligned(from, 16, place);
  if (simt::counting) simt::count_access(from, 16, simt::Direction::kLoad, true, place);
  Vector<float, 4> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline uint32_t fetch_add(uint32_t* counter, uint32_t value, Place place = Place::here()) {
  check_aligned(counter, sizeof *counter, place);
  if (simt::counting) {
    simt::count_access(counter, sizeof *counter, simt::Direction::kLoad, false, place);
    simt::count_access(counter, sizeof *counter, simt::Direction::kStore, false, place);
  }
  simt::let_others_run(value == 0, place);
  const uint32_t before = *counter;
  *counter += value;
  simt::let_others_run(value == 0, place);
  return before;
}

inline uint32_t fetch_add_alone(uint32_t* counter, uint32_t value, Place place = Place::here()) {
  return fetch_add(counter, value, place);
}

inline uint32_t load_acquire(const uint32_t* counter, Place place = Place::here()) {
  check_aligned(counter, sizeof *counter, place);
  if (simt::counting)
    simt::count_access(counter, sizeof *counter, simt::Direction::kLoad, false, place);
  simt::let_others_run(true, place);
  return *counter;
}

inline void pause(Place place = Place::here()) { simt::let_others_run(true, place); }

// ---- shared memory ----

template <class T>
class Shared {
 public:
  Shared(T* data, int count) : data_(data), count_(count) {}

  // It keeps the bounds of the whole array.
  Shared from(int i) const { return Shared(data_ + i, first_ - i, count_ - i); }

  T get(int i, Place place = Place::here()) const {
    check(i, 1, false, place);
    return data_[i];
  }

  void set(int i, T value, Place place = Place::here()) const {
    check(i, 1, true, place);
    data_[i] = value;
  }

  template <int V>
  Vector<T, V> load(int i, Place place = Place::here()) const {
    static_assert(kOneInstruction<T, V>);
    check(i, V, false, place);
    check_aligned(data_ + i, sizeof(T) * V, place);
    Vector<T, V> v;
    std::memcpy(&v, data_ + i, sizeof v);
    return v;
  }

  template <int V>
  void store(int i, const Vector<T, V>& v, Place place = Place::here()) const {
    check(i, V, true, place);
    check_aligned(data_ + i, sizeof(T) * V, place);
    std::memcpy(data_ + i, &v, sizeof v);
  }

  template <int V>
  void fetch(int i, const T* from, Place place = Place::here()) const {
    constexpr int kBytes = int(sizeof(T)) * V;
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
    check_index(i, V, place);
    check_aligned(data_ + i, kBytes, place);
    check_aligned(from, kBytes, place);
    if (simt::counting)
      simt::count_access(from, kBytes, simt::Direction::kLoad, kBytes == 16, place);
    simt::fetch(data_ + i, from, kBytes, place);
  }

 private:
  Shared(T* data, int first, int count) : data_(data), first_(first), count_(count) {}

  void check_index(int64_t i, int64_t n, Place place) const {
    if (i < first_ || i + n > count_) simt::out_of_array(i - first_, n, count_ - first_, place);
  }

  void check(int i, int n, bool write, Place place) const {
    check_index(i, n, place);
    simt::check_shared(data_ + i, int(sizeof(T)) * n, write, place);
  }

  T* data_;
  int first_ = 0, count_;
};

template <class T>
inline Shared<T> shared_array(int first_byte, int count, Place place = Place::here()) {
  std::byte* memory = simt::shared_memory(first_byte, int64_t(count) * int64_t(sizeof(T)), place);
  if (count > 0) check_aligned(memory, alignof(T), place);
  return Shared<T>(reinterpret_cast<T*>(memory), count);
}

inline void finish_fetches(Place place = Place::here()) { simt::finish_fetches(place); }

// ---- launches ----

using Stream = void*;

inline void fill_with_zeros(void* memory, size_t bytes, Stream) { std::memset(memory, 0, bytes); }

struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  Stream stream;
  bool in_order = false;  // blocks start in order, as on all GPUs; else in any
  Place place = Place::here();
};

template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...));
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call{kernel, {Parameters(arguments)...}};
  simt::run({how.blocks, how.threads, how.shared_bytes, how.in_order, how.place,
             [](const void* all) {
               const Call& call = *static_cast<const Call*>(all);
               std::apply(call.kernel, call.parameters);
             },
             &call});
}

}  // namespace eca::cuda
