// What the runtime computes and counts, printed for tests/gpu_host/test_simt_runtime.py to check.
//   checks widen|narrow half|bfloat16   binary, from stdin if it needs something, to stdout
//   checks order SEED                   the order in which blocks run, one at a time
//   checks traffic                      counts of kernels whose traffic is known
//   checks speed                        nanoseconds per switch
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "simt.h"

using namespace eca::cuda;
namespace simt = eca::simt;

namespace {

template <class T>
void widen_all() {
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const float x = widen(T{uint16_t(bits)});
    std::fwrite(&x, sizeof x, 1, stdout);
  }
}

template <class T>
void narrow_all() {
  for (float x; std::fread(&x, sizeof x, 1, stdin) == 1;) {
    const T y = narrow<T>(x);
    std::fwrite(&y, sizeof y, 1, stdout);
  }
}

__global__ void note_order(uint32_t* counter, int* order) {
  if (thread_index() == 0) order[fetch_add(counter, 1)] = int(block_index());
}

void print_order() {
  simt::settings.resident = 1;
  uint32_t counter = 0;
  int order[20];
  launch({20, 32, 0, nullptr}, note_order, &counter, order);
  for (const int block : order) std::printf("%d ", block);
}

// ---- traffic ----

constexpr int kThreads = 64;  // two warps

__global__ void vectors(const float* x, float* y) {
  store(y + 4 * thread_index(), load<4>(x + 4 * thread_index()));
}

__global__ void strided(const float* x, float*) { load<1>(x + 16 * thread_index()); }

__global__ void misaligned(const float* x, float*) { load<1>(x + 1 + thread_index()); }

__global__ void same_element(const float* x, float*) { load<1>(x); }

// The lanes make 1, 2 or 3 passes: an access is what they ask for in the same one.
__global__ void passes(const half* x, float*) {
  const auto* from = reinterpret_cast<const half*>(x);
  for (int i = 0; i < thread_index() % 32 / 11 + 1; ++i)
    load<1>(from + i * kThreads + thread_index());
}

// A barrier makes the lanes' next accesses the same pass again.
__global__ void resumed(const float* x, float*) {
  for (int i = 0; i < 2; ++i) {
    if (i == 1 || thread_index() % 32 < 8) load<1>(x + thread_index());
    block_barrier();
  }
}

__global__ void between_blocks(const uint32_t* x, float*) { load_acquire(x + thread_index()); }

template <class X>
void count(const char* name, void (*kernel)(const X*, float*)) {
  alignas(32) static float x[1024], y[256];
  simt::forget_buffers();
  simt::register_buffer("x", x, sizeof x);
  simt::register_buffer("y", y, sizeof y);
  simt::reset_traffic();
  launch({1, kThreads, 0, nullptr}, kernel, reinterpret_cast<const X*>(x), y);
  const simt::LaunchTraffic& traffic = simt::traffic().back();
  const char* const directions[] = {"load", "store"};
  std::printf("%s", name);
  for (const simt::SiteTraffic& s : traffic.sites)
    std::printf(" %s:%lld:%lld:%lld", directions[int(s.direction)], (long long)s.accesses,
                (long long)s.bytes, (long long)s.sectors);
  for (const simt::BufferTraffic& b : traffic.buffers)
    std::printf(" %s:%lld:%lld", b.name.c_str(), (long long)b.sectors_read,
                (long long)b.sectors_written);
  std::printf("\n");
}

void count_all() {
  simt::settings.count = true;
  count("vectors", vectors);
  count("strided", strided);
  count("misaligned", misaligned);
  count("same_element", same_element);
  count("passes", passes);
  count("resumed", resumed);
  count("between_blocks", between_blocks);
}

// ---- speed ----

__global__ void barriers() {
  for (int i = 0; i < 100; ++i) block_barrier();
}

__global__ void shuffles() {
  float x = 1;
  for (int i = 0; i < 100; ++i) x = shuffle_xor(x, 1);
}

void print_speed() {
  for (void (*const kernel)() : {barriers, shuffles})
    for (const int threads : {32, 512}) {
      constexpr int kBlocks = 20;
      const auto start = std::chrono::steady_clock::now();
      launch({kBlocks, threads, 0, nullptr}, kernel);
      const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
      std::printf("%s, %d threads: %.0f ns\n", kernel == barriers ? "barriers" : "shuffles",
                  threads, time.count() / (100.0 * kBlocks * threads) * 1e9);
    }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "", how = argc > 2 ? argv[2] : "";
  const bool is_half = how == "half";
  if (what == "widen") is_half ? widen_all<half>() : widen_all<bfloat16>();
  else if (what == "narrow") is_half ? narrow_all<half>() : narrow_all<bfloat16>();
  else if (what == "order") simt::settings.seed = std::stoull(how), print_order();
  else if (what == "traffic") count_all();
  else if (what == "speed") print_speed();
  else return 1;
  return 0;
}
