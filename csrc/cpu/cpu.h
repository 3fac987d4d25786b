// The contract of eca.h on the CPU.
#pragma once

#include <string>
#include <vector>

#include "../coefficients.h"
#include "../eca.h"

namespace eca::cpu {

// How a kernel runs its loop over [begin, end): the host framework's thread pool.
// `run` gives each thread one consecutive range of at least `grain` iterations.
struct ThreadPool {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  int64_t threads;
  void (*run)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
};

// One build of the kernels for one instruction set.
struct Kernels {
  const char* name;
  void (*forward)(const Forward&, const ThreadPool&);
  void (*backward)(const Backward&, const ThreadPool&);
  void (*reduce)(const Reduce&, const ThreadPool&);
  void (*scale)(const Scale&, const ThreadPool&);
  void (*moments)(const Moments&, const ThreadPool&);
  void (*tail)(const Tail&, const ThreadPool&);
  void (*tail_sums)(const TailSums&, const ThreadPool&);
  void (*tail_gradients)(const TailGradients&, const ThreadPool&);
  void (*block_tail)(const BlockTail&, const ThreadPool&);
  void (*block_tail_backward)(const BlockTailBackward&, const ThreadPool&);
  void (*batch_statistics)(const BatchStatistics&, const ThreadPool&);
  void (*coefficients)(const Coefficients&, const ThreadPool&);
  void (*totals)(const Totals&, const ThreadPool&);
  void (*gradient_coefficients)(const GradientCoefficients&, const ThreadPool&);
  void (*activated_sums)(const ActivatedSums&, const ThreadPool&);
  void (*gated)(const Gated&, const ThreadPool&);
  void (*gated_gradients)(const GatedGradients&, const ThreadPool&);
  void (*gated_block)(const GatedBlock&, const ThreadPool&);
};

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__) && defined(__GNUC__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

// The best build that this processor can run. ECA_FUSED_CPU_CAPABILITY=baseline|avx2|avx512, read
// at the first call, limits it.
const Kernels& kernels();

// The names of all builds in this module, the best first.
std::vector<std::string> compiled_capabilities();

// Sizes of the second-level cache of a core, and of the cache closest to memory; 1 MB and 32 MB
// where the system does not say. ECA_FUSED_CPU_CACHE_BYTES, read at the first call, replaces the
// latter: with 0, as in the tests, all outputs are stored around the caches.
int64_t core_cache_bytes();
int64_t last_level_cache_bytes();

}  // namespace eca::cpu
