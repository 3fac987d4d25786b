// Kernels with one fault each, and the same without it.
//   faults NAME SEED    runs the kernel with the fault
//   faults right SEEDS  runs every kernel without its fault, under that many seeds
// What a GPU would not forgive ends the program with status 3; a wrong result with status 4.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "simt.h"

using namespace eca::cuda;
namespace simt = eca::simt;

namespace {

constexpr int kThreads = 64;

// Exactly as many elements as asked for, for AddressSanitizer to watch. Poisoned with NaN.
template <class T>
struct Buffer {
  std::unique_ptr<T, decltype(&std::free)> memory;
  int count;

  explicit Buffer(int count)
      : memory(static_cast<T*>(std::malloc(sizeof(T) * size_t(count))), std::free), count(count) {
    std::memset(static_cast<void*>(memory.get()), 0xff, sizeof(T) * size_t(count));
  }
  Buffer(int count, T value) : Buffer(count) {
    for (int i = 0; i < count; ++i) memory.get()[i] = value;
  }
  T* get() { return memory.get(); }
};

void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "wrong result: %s\n", what);
  std::exit(4);
}

template <class T>
void expect_all(Buffer<T>& buffer, T value, const char* what) {
  for (int i = 0; i < buffer.count; ++i) expect(buffer.get()[i] == value, what);
}

// ---- memory ----

template <bool kFault>
__global__ void global_bounds(const float* x, float* y) {
  const int i = thread_index() + (kFault ? 1 : 0);
  store<1>(y + thread_index(), load<1>(x + i));
}

template <bool kFault>
void run_global_bounds() {
  Buffer<float> x(kThreads, 1), y(kThreads);
  launch({1, kThreads, 0, nullptr}, global_bounds<kFault>, x.get(), y.get());
  expect_all(y, 1.0f, "copied");
}

template <bool kFault>
__global__ void misaligned_load(const float* x, float* y) {
  if (thread_index() == 0) store(y, load<4>(x + (kFault ? 2 : 0)));
}

template <bool kFault>
void run_misaligned_load() {
  Buffer<float> x(8, 1), y(4);
  launch({1, kThreads, 0, nullptr}, misaligned_load<kFault>, x.get(), y.get());
}

template <bool kFault>
__global__ void misaligned_store(const float* x, float* y) {
  if (thread_index() == 0) store(y + (kFault ? 1 : 2), load<2>(x));
}

template <bool kFault>
void run_misaligned_store() {
  Buffer<float> x(4, 1), y(4);
  launch({1, kThreads, 0, nullptr}, misaligned_store<kFault>, x.get(), y.get());
}

template <bool kFault>
__global__ void misaligned_shared(float* y) {
  const auto a = shared_array<float>(0, kThreads);
  a.set(thread_index(), 1);
  block_barrier();
  if (thread_index() < 8) store(y + 4 * thread_index(), a.load<4>(thread_index() * 4 + kFault));
}

template <bool kFault>
void run_misaligned_shared() {
  Buffer<float> y(32);
  launch({1, kThreads, 4 * kThreads, nullptr}, misaligned_shared<kFault>, y.get());
  expect_all(y, 1.0f, "copied");
}

template <bool kFault>
__global__ void shared_bounds() {
  const auto a = shared_array<float>(0, kThreads), b = shared_array<float>(4 * kThreads, kThreads);
  b.set(thread_index(), 1);
  a.set(thread_index() + (kFault ? 1 : 0), 1);
}

template <bool kFault>
void run_shared_bounds() {
  launch({1, kThreads, 8 * kThreads, nullptr}, shared_bounds<kFault>);
}

template <bool kFault>
__global__ void shared_size() {
  shared_array<double>(8, kThreads).set(thread_index(), 1);
}

template <bool kFault>
void run_shared_size() {
  launch({1, kThreads, 8 * kThreads + (kFault ? 0 : 8), nullptr}, shared_size<kFault>);
}

template <bool kFault>
__global__ void unwritten(float* y) {
  const auto a = shared_array<float>(0, kThreads);
  if (!kFault || thread_index() != 5) a.set(thread_index(), 1);
  block_barrier();
  y[thread_index()] = a.get(kThreads - 1 - thread_index());
}

template <bool kFault>
void run_unwritten() {
  Buffer<float> y(kThreads);
  launch({1, kThreads, 4 * kThreads, nullptr}, unwritten<kFault>, y.get());
  expect_all(y, 1.0f, "copied");
}

// ---- races ----

template <bool kFault>
__global__ void read_too_early(half* y) {
  const auto a = shared_array<half>(0, kThreads);
  a.set(thread_index(), narrow<half>(1));
  if (!kFault) block_barrier();
  y[thread_index()] = a.get(thread_index() ^ 1);
}

template <bool kFault>
void run_read_too_early() {
  Buffer<half> y(kThreads);
  launch({1, kThreads, 2 * kThreads, nullptr}, read_too_early<kFault>, y.get());
}

template <bool kFault>
__global__ void written_too_early(double* y) {
  const auto a = shared_array<double>(0, kThreads);
  a.set(thread_index(), 1);
  block_barrier();
  y[thread_index()] = a.get(kThreads - 1 - thread_index());
  if (!kFault) block_barrier();
  a.set(thread_index(), 2);
}

template <bool kFault>
void run_written_too_early() {
  Buffer<double> y(kThreads);
  launch({1, kThreads, 8 * kThreads, nullptr}, written_too_early<kFault>, y.get());
  expect_all(y, 1.0, "first values");
}

template <bool kFault>
__global__ void written_twice() {
  const auto a = shared_array<float>(0, kThreads);
  a.set(kFault ? thread_index() / 2 : thread_index(), 1);
}

template <bool kFault>
void run_written_twice() {
  launch({1, kThreads, 4 * kThreads, nullptr}, written_twice<kFault>);
}

// A read by several threads, of which the writer is one.
template <bool kFault>
__global__ void read_by_all() {
  const auto a = shared_array<float>(0, 1);
  if (thread_index() == 0) a.set(0, 1);
  block_barrier();
  const float value = a.get(0);
  if (!kFault) block_barrier();
  if (thread_index() == 0) a.set(0, value + 1);
}

template <bool kFault>
void run_read_by_all() {
  launch({1, kThreads, 4, nullptr}, read_by_all<kFault>);
}

template <bool kFault>
__global__ void ordered_by_shuffle(float* y) {
  const auto a = shared_array<float>(0, kThreads);
  a.set(thread_index(), 1);
  float sum = shuffle_xor(float(thread_index()), 1);
  if (!kFault) block_barrier();
  y[thread_index()] = a.get(thread_index() ^ 1) + 0 * sum;
}

template <bool kFault>
void run_ordered_by_shuffle() {
  Buffer<float> y(kThreads);
  launch({1, kThreads, 4 * kThreads, nullptr}, ordered_by_shuffle<kFault>, y.get());
  expect_all(y, 1.0f, "copied");
}

// ---- barriers and shuffles ----

template <bool kFault>
__global__ void barrier_after_exit() {
  if (kFault && thread_index() == 5) return;
  block_barrier();
}

template <bool kFault>
void run_barrier_after_exit() {
  launch({2, kThreads, 0, nullptr}, barrier_after_exit<kFault>);
}

template <bool kFault>
__global__ void two_barriers() {
  if (kFault && thread_index() < 32) block_barrier();
  else block_barrier();
}

// A branch that all threads take together.
template <>
__global__ void two_barriers<false>() {
  if (block_index() == 0) block_barrier();
  else block_barrier();
}

template <bool kFault>
void run_two_barriers() {
  launch({2, kThreads, 0, nullptr}, two_barriers<kFault>);
}

template <bool kFault>
__global__ void barrier_for_some(float* y) {
  if (!kFault || thread_index() % 2 == 0) block_barrier();
  y[thread_index()] = shuffle_xor(1.0f, 1);
}

template <bool kFault>
void run_barrier_for_some() {
  Buffer<float> y(kThreads);
  launch({1, kThreads, 0, nullptr}, barrier_for_some<kFault>, y.get());
}

template <bool kFault>
__global__ void shuffle_after_exit(double* y) {
  if (kFault && thread_index() == 33) return;
  y[thread_index()] = shuffle_xor(double(thread_index()), 16) - (thread_index() ^ 16);
}

template <bool kFault>
void run_shuffle_after_exit() {
  Buffer<double> y(kThreads);
  launch({1, kThreads, 0, nullptr}, shuffle_after_exit<kFault>, y.get());
  expect_all(y, 0.0, "the other lane's value");
}

// Two shuffles, one in each branch: lanes of different branches must not exchange values.
template <bool kFault>
__global__ void shuffle_in_branch(int* y) {
  if (kFault ? thread_index() % 2 == 0 : thread_index() < 32) y[thread_index()] = shuffle_xor(1, 1);
  else y[thread_index()] = shuffle_xor(1, 2);
}

template <bool kFault>
void run_shuffle_in_branch() {
  Buffer<int> y(kThreads);
  launch({1, kThreads, 0, nullptr}, shuffle_in_branch<kFault>, y.get());
  expect_all(y, 1, "the other lane's value");
}

template <bool kFault>
__global__ void short_warp(float* y) {
  y[thread_index()] = shuffle_xor(1.0f, 1);
}

template <bool kFault>
void run_short_warp() {
  Buffer<float> y(kThreads);
  launch({1, kFault ? 40 : 64, 0, nullptr}, short_warp<kFault>, y.get());
}

// ---- blocks that wait for blocks ----

// Every block waits for those that have started before it; with the fault, for those of lower
// number, which may not have started.
template <bool kFault>
__global__ void wait_for_others(uint32_t* ticket, uint32_t* done, int* y) {
  const auto flag = shared_array<uint32_t>(0, 1);
  if (thread_index() == 0) flag.set(0, kFault ? uint32_t(block_index()) : fetch_add(ticket, 1));
  block_barrier();
  const uint32_t order = flag.get(0);
  if (thread_index() == 0) {
    while (load_acquire(done) < order) pause();
    store<1>(y + order, {int(order)});
    fetch_add(done, 1);
  }
}

template <bool kFault>
void run_wait_for_others() {
  Buffer<uint32_t> counters(2, 0);
  Buffer<int> y(16);
  launch({16, 32, 4, nullptr}, wait_for_others<kFault>, counters.get(), counters.get() + 1,
         y.get());
  for (int i = 0; i < y.count; ++i) expect(y.get()[i] == i, "written by all blocks");
}

// With the fault, the data comes after the flag that says it is there.
template <bool kFault>
__global__ void published_too_early(uint32_t* ticket, uint32_t* flag, float* data, float* y) {
  if (thread_index() != 0) return;
  if (fetch_add(ticket, 1) == 0) {
    if (!kFault) *data = 1;
    fetch_add(flag, 1);
    if (kFault) *data = 1;
  } else {
    while (load_acquire(flag) == 0) pause();
    *y = load_from_other_block(data).element[0];
  }
}

template <bool kFault>
void run_published_too_early() {
  Buffer<uint32_t> counters(2, 0);
  Buffer<float> data(4), y(1);
  launch({2, 32, 0, nullptr}, published_too_early<kFault>, counters.get(), counters.get() + 1,
         data.get(), y.get());
  expect_all(y, 1.0f, "what the other block has published");
}

// ---- what a thread fetches for itself ----

template <bool kFault>
__global__ void fetch_read_too_early(const float* x, float* y) {
  const auto a = shared_array<float>(0, 4 * kThreads);
  a.fetch<4>(4 * thread_index(), x + 4 * thread_index());
  if (!kFault) finish_fetches();
  store<4>(y + 4 * thread_index(), a.load<4>(4 * thread_index()));
  finish_fetches();
}

template <bool kFault>
__global__ void fetch_bounds(const float* x, float* y) {
  const auto a = shared_array<float>(0, 4 * kThreads);
  a.fetch<4>(4 * thread_index(), x + 4 * (thread_index() + (kFault ? 1 : 0)));
  finish_fetches();
  store<4>(y + 4 * thread_index(), a.load<4>(4 * thread_index()));
}

template <bool kFault>
__global__ void fetch_never_finished(const float* x, float* y) {
  const auto a = shared_array<float>(0, 4 * kThreads);
  a.fetch<4>(4 * thread_index(), x + 4 * thread_index());
  if (!kFault) finish_fetches();
  store<4>(y + 4 * thread_index(), load<4>(x + 4 * thread_index()));
}

// With the fault, other threads may still read what was there before.
template <bool kFault>
__global__ void fetch_over_use(const float* x, float* y) {
  const auto a = shared_array<float>(0, 4 * kThreads);
  const int mine = 4 * thread_index(), other = 4 * (kThreads - 1) - mine;
  a.store<4>(mine, load<4>(x + mine));
  block_barrier();
  store<4>(y + mine, a.load<4>(other));
  if (!kFault) block_barrier();
  a.fetch<4>(mine, x + mine);
  finish_fetches();
}

template <class Kernel>
void run_fetches(Kernel kernel) {
  Buffer<float> x(4 * kThreads, 1), y(4 * kThreads);
  launch({2, kThreads, 16 * kThreads, nullptr}, kernel, x.get(), y.get());
  expect_all(y, 1.0f, "fetched");
}

template <bool kFault>
void run_fetch_read_too_early() {
  run_fetches(fetch_read_too_early<kFault>);
}
template <bool kFault>
void run_fetch_bounds() {
  run_fetches(fetch_bounds<kFault>);
}
template <bool kFault>
void run_fetch_never_finished() {
  run_fetches(fetch_never_finished<kFault>);
}
template <bool kFault>
void run_fetch_over_use() {
  run_fetches(fetch_over_use<kFault>);
}

// ---- launches ----

__global__ void nothing() {}

template <bool kFault>
void run_too_much_shared() {
  launch({1, 32, simt::settings.shared_limit + (kFault ? 1 : 0), nullptr}, nothing);
}

struct Case {
  const char* name;
  void (*fault)();
  void (*right)();
};

const Case kCases[] = {
    {"global_bounds", run_global_bounds<true>, run_global_bounds<false>},
    {"misaligned_load", run_misaligned_load<true>, run_misaligned_load<false>},
    {"misaligned_store", run_misaligned_store<true>, run_misaligned_store<false>},
    {"misaligned_shared", run_misaligned_shared<true>, run_misaligned_shared<false>},
    {"shared_bounds", run_shared_bounds<true>, run_shared_bounds<false>},
    {"shared_size", run_shared_size<true>, run_shared_size<false>},
    {"unwritten", run_unwritten<true>, run_unwritten<false>},
    {"read_too_early", run_read_too_early<true>, run_read_too_early<false>},
    {"written_too_early", run_written_too_early<true>, run_written_too_early<false>},
    {"written_twice", run_written_twice<true>, run_written_twice<false>},
    {"read_by_all", run_read_by_all<true>, run_read_by_all<false>},
    {"ordered_by_shuffle", run_ordered_by_shuffle<true>, run_ordered_by_shuffle<false>},
    {"barrier_after_exit", run_barrier_after_exit<true>, run_barrier_after_exit<false>},
    {"two_barriers", run_two_barriers<true>, run_two_barriers<false>},
    {"barrier_for_some", run_barrier_for_some<true>, run_barrier_for_some<false>},
    {"shuffle_after_exit", run_shuffle_after_exit<true>, run_shuffle_after_exit<false>},
    {"shuffle_in_branch", run_shuffle_in_branch<true>, run_shuffle_in_branch<false>},
    {"short_warp", run_short_warp<true>, run_short_warp<false>},
    {"wait_for_others", run_wait_for_others<true>, run_wait_for_others<false>},
    {"published_too_early", run_published_too_early<true>, run_published_too_early<false>},
    {"fetch_read_too_early", run_fetch_read_too_early<true>, run_fetch_read_too_early<false>},
    {"fetch_bounds", run_fetch_bounds<true>, run_fetch_bounds<false>},
    {"fetch_never_finished", run_fetch_never_finished<true>, run_fetch_never_finished<false>},
    {"fetch_over_use", run_fetch_over_use<true>, run_fetch_over_use<false>},
    {"too_much_shared", run_too_much_shared<true>, run_too_much_shared<false>},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 1;
  const auto number = uint64_t(std::atoi(argv[2]));
  if (std::strcmp(argv[1], "right") == 0) {
    for (uint64_t seed = 1; seed <= number; ++seed)
      for (const Case& c : kCases)
        for (const int resident : {1, 3}) {
          simt::settings.seed = seed;
          simt::settings.resident = resident;
          c.right();
        }
    std::printf("%zu cases\n", std::size(kCases));
    return 0;
  }
  simt::settings.seed = number;
  for (const Case& c : kCases)
    if (std::strcmp(argv[1], c.name) == 0) {
      try {
        c.fault();
      } catch (const std::runtime_error& refused) {
        std::fprintf(stderr, "%s\n", refused.what());
        return 5;
      }
      return 0;
    }
  return 1;
}
