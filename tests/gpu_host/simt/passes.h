// Passes over maps on the host, for the programs that run the kernels of tails and of attention
// after an activation.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "../../../csrc/cuda/cuda.h"
#include "requests.h"

namespace eca {
namespace {

// Rows of coefficients of `count` numbers each, which begin `misplaced` numbers later.
struct Rows {
  Buffer memory;
  int64_t bytes, skip;

  Rows(const char* name, int64_t rows, int64_t count, int64_t size, int64_t misplaced)
      : memory(name, (rows * count + misplaced) * size), bytes(count * size),
        skip(misplaced * size) {
    memory.read();
  }
  const void* row(int64_t i) const { return memory.data() + skip + i * bytes; }
};

// Runs a pass with its plan while the bytes before the maps are guarded.
class Passes {
 public:
  Passes(int64_t multiprocessors, std::initializer_list<Buffer*> guarded) : guarded_(guarded) {
    gpu_.multiprocessors = int32_t(multiprocessors);
  }

  template <class Call, class Plan>
  using Kernels = void (*)(const Call&, const Plan&, const cuda::Memory&);

  template <class Call>
  void write(const Call& call, Kernels<Call, cuda::TailPlan> kernels) {
    run(call, cuda::plan_of(call, gpu_), 0, kernels);
  }
  template <class Call>
  void sum(const Call& call, Kernels<Call, cuda::TailSumPlan> kernels) {
    const cuda::TailSumPlan plan = cuda::plan_of(call, gpu_);
    run(call, plan, plan.workspace, kernels);
  }

  const std::string& plan() const { return plan_; }

 private:
  template <class Call, class Plan>
  void run(const Call& call, const Plan& plan, int64_t bytes, Kernels<Call, Plan> kernels) {
    const char* const ways[] = {"rows", "columns", "small"};
    plan_ = "{\"way\": \"" + std::string(ways[int(plan.way)]) +
            "\", \"vectors\": " + (plan.vectors ? "true" : "false") +
            ", \"blocks\": " + std::to_string(plan.blocks) +
            ", \"parts\": " + std::to_string(plan.grid.parts) + "}";
    Buffer workspace("workspace", bytes);
    for (Buffer* b : guarded_) b->guard(true);
    kernels(call, plan, cuda::Memory{workspace.data(), nullptr, nullptr});
    for (Buffer* b : guarded_) b->guard(false);
  }

  Gpu gpu_{};
  std::vector<Buffer*> guarded_;
  std::string plan_;
};

}  // namespace
}  // namespace eca
