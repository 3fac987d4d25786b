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
  launch({1, kThreads, 1, 0, nullptr}, global_bounds<kFault>, x.get(), y.get());
  expect_all(y, 1.0f, "copied");
}

template <bool kFault>
__global__ void misaligned_load(const float* x, float* y) {
  if (thread_index() == 0) store(y, load<4>(x + (kFault ? 2 : 0)));
}

template <bool kFault>
void run_misaligned_load() {
  Buffer<float> x(8, 1), y(4);
  launch({1, kThreads, 1, 0, nullptr}, misaligned_load<kFault>, x.get(), y.get());
}

template <bool kFault>
__global__ void misaligned_store(const float* x, float* y) {
  if (thread_index() == 0) store(y + (kFault ? 1 : 2), load<2>(x));
}

template <bool kFault>
void run_misaligned_store() {
  Buffer<float> x(4, 1), y(4);
  launch({1, kThreads, 1, 0, nullptr}, misaligned_store<kFault>, x.get(), y.get());
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
  launch({1, kThreads, 1, 4 * kThreads, nullptr}, misaligned_shared<kFault>, y.get());
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
  launch({1, kThreads, 1, 8 * kThreads, nullptr}, shared_bounds<kFault>);
}

template <bool kFault>
__global__ void shared_size() {
  shared_array<double>(8, kThreads).set(thread_index(), 1);
}

template <bool kFault>
void run_shared_size() {
  launch({1, kThreads, 1, 8 * kThreads + (kFault ? 0 : 8), nullptr}, shared_size<kFault>);
}

// The runtime does not see this access.
template <bool kFault>
__global__ void shared_pointer(float* y) {
  const auto a = shared_array<float>(0, 3);
  if (thread_index() < 3) a.set(thread_index(), 1);
  block_barrier();
  if (thread_index() == 0) *y = a.data()[kFault ? 3 : 2];
}

template <bool kFault>
void run_shared_pointer() {
  Buffer<float> y(1);
  launch({1, kThreads, 1, 12, nullptr}, shared_pointer<kFault>, y.get());
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
  launch({1, kThreads, 1, 4 * kThreads, nullptr}, unwritten<kFault>, y.get());
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
  launch({1, kThreads, 1, 2 * kThreads, nullptr}, read_too_early<kFault>, y.get());
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
  launch({1, kThreads, 1, 8 * kThreads, nullptr}, written_too_early<kFault>, y.get());
  expect_all(y, 1.0, "first values");
}

template <bool kFault>
__global__ void written_twice() {
  const auto a = shared_array<float>(0, kThreads);
  a.set(kFault ? thread_index() / 2 : thread_index(), 1);
}

template <bool kFault>
void run_written_twice() {
  launch({1, kThreads, 1, 4 * kThreads, nullptr}, written_twice<kFault>);
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
  launch({1, kThreads, 1, 4, nullptr}, read_by_all<kFault>);
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
  launch({1, kThreads, 1, 4 * kThreads, nullptr}, ordered_by_shuffle<kFault>, y.get());
  expect_all(y, 1.0f, "copied");
}

// ---- clusters ----

template <bool kFault>
__global__ void peer_read_too_early(float* y) {
  const auto a = shared_array<float>(0, kThreads);
  a.set(thread_index(), 1);
  if (kFault) block_barrier();
  cluster_arrive();
  if (!kFault) cluster_wait();
  y[block_index() * kThreads + thread_index()] =
      a.get_from_rank(cluster_rank() ^ 1, kThreads - 1 - thread_index());
  if (kFault) cluster_wait();
  cluster_arrive();
  cluster_wait();
}

template <bool kFault>
void run_peer_read_too_early() {
  Buffer<float> y(4 * kThreads);
  launch({4, kThreads, 2, 4 * kThreads, nullptr}, peer_read_too_early<kFault>, y.get());
  expect_all(y, 1.0f, "the peer's values");
}

template <bool kFault>
__global__ void peer_overwritten(float* y) {
  const auto a = shared_array<float>(0, kThreads);
  a.set(thread_index(), 1);
  cluster_arrive();
  cluster_wait();
  y[block_index() * kThreads + thread_index()] =
      a.get_from_rank(cluster_rank() ^ 1, thread_index());
  cluster_arrive();
  if (!kFault) cluster_wait();
  a.set(thread_index(), 2);
  if (kFault) cluster_wait();
}

template <bool kFault>
void run_peer_overwritten() {
  Buffer<float> y(4 * kThreads);
  launch({4, kThreads, 2, 4 * kThreads, nullptr}, peer_overwritten<kFault>, y.get());
  expect_all(y, 1.0f, "the peer's values");
}

template <bool kFault>
__global__ void peer_ended(float* y) {
  const auto a = shared_array<float>(0, kThreads);
  a.set(thread_index(), 1);
  cluster_arrive();
  cluster_wait();
  if (!kFault || cluster_rank() == 0)
    y[block_index() * kThreads + thread_index()] =
        a.get_from_rank(cluster_rank() ^ 1, thread_index());
  if (kFault) return;
  cluster_arrive();
  cluster_wait();
}

template <bool kFault>
void run_peer_ended() {
  Buffer<float> y(4 * kThreads);
  launch({4, kThreads, 2, 4 * kThreads, nullptr}, peer_ended<kFault>, y.get());
}

template <bool kFault>
__global__ void cluster_barrier_missed() {
  if (kFault && cluster_rank() == 1 && thread_index() == 3) return;
  cluster_arrive();
  cluster_wait();
}

template <bool kFault>
void run_cluster_barrier_missed() {
  launch({4, kThreads, 2, 0, nullptr}, cluster_barrier_missed<kFault>);
}

template <bool kFault>
__global__ void cluster_wait_alone() {
  if (!kFault) cluster_arrive();
  cluster_wait();
}

template <bool kFault>
void run_cluster_wait_alone() {
  launch({4, kThreads, 2, 0, nullptr}, cluster_wait_alone<kFault>);
}

template <bool kFault>
__global__ void cluster_arrive_alone() {
  cluster_arrive();
  if (!kFault) cluster_wait();
}

template <bool kFault>
void run_cluster_arrive_alone() {
  launch({4, kThreads, 2, 0, nullptr}, cluster_arrive_alone<kFault>);
}

// ---- barriers and shuffles ----

template <bool kFault>
__global__ void barrier_after_exit() {
  if (kFault && thread_index() == 5) return;
  block_barrier();
}

template <bool kFault>
void run_barrier_after_exit() {
  launch({2, kThreads, 1, 0, nullptr}, barrier_after_exit<kFault>);
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
  launch({2, kThreads, 1, 0, nullptr}, two_barriers<kFault>);
}

template <bool kFault>
__global__ void barrier_for_some(float* y) {
  if (!kFault || thread_index() % 2 == 0) block_barrier();
  y[thread_index()] = shuffle_xor(1.0f, 1);
}

template <bool kFault>
void run_barrier_for_some() {
  Buffer<float> y(kThreads);
  launch({1, kThreads, 1, 0, nullptr}, barrier_for_some<kFault>, y.get());
}

template <bool kFault>
__global__ void different_waits() {
  if (kFault ? thread_index() < 32 : block_index() < 2) {
    block_barrier();
  } else {
    cluster_arrive();
    cluster_wait();
  }
}

template <bool kFault>
void run_different_waits() {
  launch({4, kThreads, 2, 0, nullptr}, different_waits<kFault>);
}

template <bool kFault>
__global__ void shuffle_after_exit(double* y) {
  if (kFault && thread_index() == 33) return;
  y[thread_index()] = shuffle_xor(double(thread_index()), 16) - (thread_index() ^ 16);
}

template <bool kFault>
void run_shuffle_after_exit() {
  Buffer<double> y(kThreads);
  launch({1, kThreads, 1, 0, nullptr}, shuffle_after_exit<kFault>, y.get());
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
  launch({1, kThreads, 1, 0, nullptr}, shuffle_in_branch<kFault>, y.get());
  expect_all(y, 1, "the other lane's value");
}

template <bool kFault>
__global__ void short_warp(float* y) {
  y[thread_index()] = shuffle_xor(1.0f, 1);
}

template <bool kFault>
void run_short_warp() {
  Buffer<float> y(kThreads);
  launch({1, kFault ? 40 : 64, 1, 0, nullptr}, short_warp<kFault>, y.get());
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
  launch({16, 32, 1, 4, nullptr}, wait_for_others<kFault>, counters.get(), counters.get() + 1,
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
    *y = load_from_other_block(data);
  }
}

template <bool kFault>
void run_published_too_early() {
  Buffer<uint32_t> counters(2, 0);
  Buffer<float> data(1), y(1);
  launch({2, 32, 1, 0, nullptr}, published_too_early<kFault>, counters.get(), counters.get() + 1,
         data.get(), y.get());
  expect_all(y, 1.0f, "what the other block has published");
}

// ---- copies ----

template <bool kFault>
__global__ void copy_read_too_early(const float* x, float* y) {
  const auto a = shared_array<float>(16, kThreads);
  Copies copies(shared_array<uint64_t>(0, 1));
  copies.copy(a, 0, x, kThreads);
  if (kFault) block_barrier();
  else copies.wait();
  y[thread_index()] = a.get(thread_index());
  if (kFault) copies.wait();
}

template <bool kFault>
void run_copy_read_too_early() {
  Buffer<float> x(kThreads, 1), y(kThreads);
  launch({2, kThreads, 1, 16 + 4 * kThreads, nullptr}, copy_read_too_early<kFault>, x.get(),
         y.get());
  expect_all(y, 1.0f, "copied");
}

template <bool kFault>
__global__ void copy_never_waited(const float* x) {
  const auto a = shared_array<float>(16, kThreads);
  Copies copies(shared_array<uint64_t>(0, 1));
  copies.copy(a, 0, x, kThreads);
  if (!kFault) copies.wait();
}

template <bool kFault>
void run_copy_never_waited() {
  Buffer<float> x(kThreads, 1);
  launch({2, kThreads, 1, 16 + 4 * kThreads, nullptr}, copy_never_waited<kFault>, x.get());
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

template <class Kernel>
void run_fetches(Kernel kernel) {
  Buffer<float> x(4 * kThreads, 1), y(4 * kThreads);
  launch({2, kThreads, 1, 16 * kThreads, nullptr}, kernel, x.get(), y.get());
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
__global__ void copy_over_use(const float* x, float* y) {
  const auto a = shared_array<float>(16, kThreads);
  Copies copies(shared_array<uint64_t>(0, 1));
  a.set(thread_index(), 2);
  block_barrier();
  y[thread_index()] = a.get(kThreads - 1 - thread_index());
  if (!kFault) block_barrier();
  copies.copy(a, 0, x, kThreads);
  copies.wait();
}

template <bool kFault>
void run_copy_over_use() {
  Buffer<float> x(kThreads, 1), y(kThreads);
  launch({1, kThreads, 1, 16 + 4 * kThreads, nullptr}, copy_over_use<kFault>, x.get(), y.get());
  expect_all(y, 2.0f, "what was there before");
}

template <bool kFault>
__global__ void copy_bounds(const bfloat16* x, int count) {
  const auto a = shared_array<bfloat16>(16, 80);
  Copies copies(shared_array<uint64_t>(0, 1));
  copies.copy(a, 0, x, count + (kFault ? 1 : 0));
  copies.wait();
}

template <bool kFault>
void run_copy_bounds() {
  Buffer<bfloat16> x(73);
  launch({1, kThreads, 1, 16 + 160, nullptr}, copy_bounds<kFault>, x.get(), 73);
}

// With the fault, threads write x while the copy may still read it.
template <bool kFault>
__global__ void copy_source_changed(float* x, float* y) {
  const auto a = shared_array<float>(16, kThreads);
  Copies copies(shared_array<uint64_t>(0, 1));
  copies.copy(a, 0, x, kThreads);
  if (!kFault) copies.wait();
  else block_barrier();
  x[thread_index()] = 2;
  if (kFault) copies.wait();
  y[thread_index()] = a.get(thread_index());
}

template <bool kFault>
void run_copy_source_changed() {
  Buffer<float> x(kThreads, 1), y(kThreads);
  launch({1, kThreads, 1, 16 + 4 * kThreads, nullptr}, copy_source_changed<kFault>, x.get(),
         y.get());
  expect_all(y, 1.0f, "what was there before");
}

template <bool kFault>
__global__ void copy_by_some(const float* x) {
  const auto a = shared_array<float>(16, kThreads);
  Copies copies(shared_array<uint64_t>(0, 1));
  copies.copy(a, 0, x, kFault ? thread_index() + 1 : kThreads);
  copies.wait();
}

template <bool kFault>
void run_copy_by_some() {
  Buffer<float> x(kThreads, 1);
  launch({1, kThreads, 1, 16 + 4 * kThreads, nullptr}, copy_by_some<kFault>, x.get());
}

template <bool kFault>
__global__ void copy_waited_twice(const float* x) {
  const auto a = shared_array<float>(16, kThreads);
  Copies copies(shared_array<uint64_t>(0, 1));
  copies.copy(a, 0, x, kThreads);
  copies.wait();
  if (kFault) copies.wait();
}

template <bool kFault>
void run_copy_waited_twice() {
  Buffer<float> x(kThreads, 1);
  launch({1, kThreads, 1, 16 + 4 * kThreads, nullptr}, copy_waited_twice<kFault>, x.get());
}

template <bool kFault>
__global__ void copy_of_rows(const half* x, half* y) {
  const auto a = shared_array<half>(16, 3 * 8);
  Copies copies(shared_array<uint64_t>(0, 1));
  copies.copy_rows(a, 0, 8, x, kFault ? 12 : 16, 3, 8);
  copies.wait();
  if (thread_index() < 24) y[thread_index()] = a.get(thread_index());
}

template <bool kFault>
void run_copy_of_rows() {
  Buffer<half> x(40), y(24);
  for (int i = 0; i < x.count; ++i) x.get()[i] = narrow<half>(float(i));
  launch({1, kThreads, 1, 16 + 48, nullptr}, copy_of_rows<kFault>, x.get(), y.get());
  for (int i = 0; i < y.count; ++i)
    expect(widen(y.get()[i]) == float(i / 8 * 16 + i % 8), "every second row");
}

// ---- launches ----

__global__ void nothing() {}

template <bool kFault>
void run_too_much_shared() {
  launch({1, 32, 1, simt::settings.shared_limit + (kFault ? 1 : 0), nullptr}, nothing);
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
    {"shared_pointer", run_shared_pointer<true>, run_shared_pointer<false>},
    {"unwritten", run_unwritten<true>, run_unwritten<false>},
    {"read_too_early", run_read_too_early<true>, run_read_too_early<false>},
    {"written_too_early", run_written_too_early<true>, run_written_too_early<false>},
    {"written_twice", run_written_twice<true>, run_written_twice<false>},
    {"read_by_all", run_read_by_all<true>, run_read_by_all<false>},
    {"ordered_by_shuffle", run_ordered_by_shuffle<true>, run_ordered_by_shuffle<false>},
    {"peer_read_too_early", run_peer_read_too_early<true>, run_peer_read_too_early<false>},
    {"peer_overwritten", run_peer_overwritten<true>, run_peer_overwritten<false>},
    {"peer_ended", run_peer_ended<true>, run_peer_ended<false>},
    {"cluster_barrier_missed", run_cluster_barrier_missed<true>, run_cluster_barrier_missed<false>},
    {"cluster_wait_alone", run_cluster_wait_alone<true>, run_cluster_wait_alone<false>},
    {"cluster_arrive_alone", run_cluster_arrive_alone<true>, run_cluster_arrive_alone<false>},
    {"barrier_after_exit", run_barrier_after_exit<true>, run_barrier_after_exit<false>},
    {"two_barriers", run_two_barriers<true>, run_two_barriers<false>},
    {"barrier_for_some", run_barrier_for_some<true>, run_barrier_for_some<false>},
    {"different_waits", run_different_waits<true>, run_different_waits<false>},
    {"shuffle_after_exit", run_shuffle_after_exit<true>, run_shuffle_after_exit<false>},
    {"shuffle_in_branch", run_shuffle_in_branch<true>, run_shuffle_in_branch<false>},
    {"short_warp", run_short_warp<true>, run_short_warp<false>},
    {"wait_for_others", run_wait_for_others<true>, run_wait_for_others<false>},
    {"published_too_early", run_published_too_early<true>, run_published_too_early<false>},
    {"copy_read_too_early", run_copy_read_too_early<true>, run_copy_read_too_early<false>},
    {"copy_never_waited", run_copy_never_waited<true>, run_copy_never_waited<false>},
    {"copy_over_use", run_copy_over_use<true>, run_copy_over_use<false>},
    {"copy_bounds", run_copy_bounds<true>, run_copy_bounds<false>},
    {"copy_source_changed", run_copy_source_changed<true>, run_copy_source_changed<false>},
    {"copy_by_some", run_copy_by_some<true>, run_copy_by_some<false>},
    {"copy_waited_twice", run_copy_waited_twice<true>, run_copy_waited_twice<false>},
    {"copy_of_rows", run_copy_of_rows<true>, run_copy_of_rows<false>},
    {"fetch_read_too_early", run_fetch_read_too_early<true>, run_fetch_read_too_early<false>},
    {"fetch_bounds", run_fetch_bounds<true>, run_fetch_bounds<false>},
    {"fetch_never_finished", run_fetch_never_finished<true>, run_fetch_never_finished<false>},
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
