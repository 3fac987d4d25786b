// Running the CPU kernels from an operator: torch's threads, errors of the C++ library.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <new>

#include "cpu/cpu.h"
#include "tensors.h"

namespace eca {

inline const cpu::ThreadPool& thread_pool() {
  // Per thread, because the number of threads is a setting of the calling thread.
  static thread_local cpu::ThreadPool pool;
  pool.threads = torch::stable::get_num_threads();
  pool.run = [](int64_t begin, int64_t end, int64_t grain, cpu::ThreadPool::Body body,
                void* context) {
    if (end - begin <= grain || pool.threads == 1) {
      if (begin < end) body(begin, end, context);
      return;
    }
    ECA_TORCH_CHECK(torch_parallel_for(begin, end, grain, body, context));
  };
  return pool;
}

// Runs work that the C++ library allocates memory for: the library's own error says nothing.
template <class Work>
void on_cpu(const Work& work) {
  bool enough = true;
  try {
    work();
  } catch (const std::bad_alloc&) {
    enough = false;
  }
  check(enough, "can't allocate memory for the sums and gates of x; use a smaller batch");
}

}  // namespace eca
