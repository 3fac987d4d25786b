#include "call.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../stable_abi.h"
#include "cuda.h"

namespace eca::cuda_call {
namespace {

using torch::stable::Tensor;

Tensor bytes_on(int32_t device, int64_t bytes) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  ECA_TORCH_CHECK(aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(),
                                           aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

cuda::StreamHandle current_stream(int32_t device) {
  void* stream = nullptr;
  ECA_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// ---- counters: words through which blocks meet; zero before and after each launch ----

// Launches on one stream run one after the other, so they share a slot of the slab. So do those
// that are captured from one stream into one graph. A graph may be replayed on any stream, beside
// anything but itself, so its words are never another graph's. The slab is not from PyTorch's
// allocator: memory kept from call to call would be alive in the private pools of CUDA graphs,
// which is an error there. When the slab is full, a call allocates its own words and zeroes them
// first. cudaStreamPerThread, one handle for the streams of all threads, is not supported:
// PyTorch's allocator cannot tell these streams apart either.
uint32_t* counters(int32_t device, cuda::StreamHandle stream, int64_t words, Tensor* keep) {
  constexpr int64_t kSlot = 4096, kSlots = 16;  // the other half is for captured launches
  static_assert(kSlot * kSlots <= cuda::kSlabWords / 2);
  struct Slot {
    int64_t first, words;
  };
  struct Slab {
    uint32_t* words = nullptr;
    int64_t captured = kSlot * kSlots;  // the next free word
    std::map<cuda::StreamHandle, Slot> streams;
    std::map<std::pair<uint64_t, cuda::StreamHandle>, Slot> graphs;  // by graph and stream
  };
  if (words == 0) return nullptr;
  const uint64_t graph = cuda::capture_id(stream);
  {
    static std::mutex mutex;
    static auto& slabs = *new std::map<int32_t, Slab>;  // never destroyed: streams may outlive it
    const std::lock_guard<std::mutex> lock(mutex);
    Slab& slab = slabs[device];
    if (!slab.words) slab.words = cuda::counter_slab();
    if (graph) {
      Slot& slot = slab.graphs[{graph, stream}];
      if (slot.words >= words) return slab.words + slot.first;
      if (slab.captured + words <= cuda::kSlabWords) {
        slot = {slab.captured, words};
        slab.captured += words;
        return slab.words + slot.first;
      }
    } else if (words <= kSlot) {
      const auto slot = slab.streams.find(stream);
      if (slot != slab.streams.end()) return slab.words + slot->second.first;
      const auto next = int64_t(slab.streams.size());
      if (next < kSlots) {
        slab.streams[stream] = {next * kSlot, kSlot};
        return slab.words + next * kSlot;
      }
    }
  }
  *keep = bytes_on(device, 4 * words);
  cuda::set_to_zero(keep->data_ptr(), 4 * words, stream);
  return static_cast<uint32_t*>(keep->data_ptr());
}

// ---- plans ----

struct Key {
  Problem problem;
  Pass pass;
  Access access;
  int32_t device;

  bool operator==(const Key& o) const {
    const Problem &a = problem, &b = o.problem;
    return a.dtype == b.dtype && a.layout == b.layout && a.samples == b.samples &&
           a.channels == b.channels && a.pixels == b.pixels && a.taps_dtype == b.taps_dtype &&
           a.kernel_size == b.kernel_size && a.taps_per_channel == b.taps_per_channel &&
           a.circular == b.circular && pass == o.pass && access.width == o.access.width &&
           access.dense == o.access.dense && access.samples_aligned == o.access.samples_aligned &&
           access.sources_aligned == o.access.sources_aligned &&
           access.in_place == o.access.in_place && device == o.device;
  }
};

// The flag saves the lock in processes that never force a plan.
std::atomic<bool> forcing{false};
std::mutex force_mutex;
Forced forced_plan;

// Plans are kept: a network's layers come again in every step, and finding one beats making it.
const Plan& plan_for(const Problem& problem, Pass pass, const Access& access, int32_t device) {
  // A plan is forced upon ECA alone: a tail's kernels are others.
  if (!is_tail(pass) && forcing.load(std::memory_order_acquire)) {
    static thread_local Plan plan;
    const std::lock_guard<std::mutex> lock(force_mutex);
    plan = make_plan(problem, pass, access, description(device), &forced_plan);
    return plan;
  }
  constexpr size_t kMost = 64;
  static thread_local std::vector<std::pair<Key, Plan>> known;
  static thread_local size_t next = 0;
  const Key key{problem, pass, access, device};
  for (const auto& [k, plan] : known)
    if (k == key) return plan;
  std::pair<Key, Plan> made{key, make_plan(problem, pass, access, description(device))};
  if (known.size() < kMost) {
    known.push_back(made);
    return known.back().second;
  }
  known[next] = made;
  const Plan& plan = known[next].second;
  next = (next + 1) % kMost;
  return plan;
}

template <class Call, class Run>
void run(const Call& call, const Plan& plan, int32_t device, Run kernels) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cuda::StreamHandle stream = current_stream(device);
  Tensor keep_counters, keep_workspace;
  cuda::Memory memory{nullptr, nullptr, stream};
  memory.counters = counters(device, stream, plan.counters, &keep_counters);
  if (plan.workspace > 0) {
    keep_workspace = bytes_on(device, plan.workspace);
    memory.workspace = keep_workspace.data_ptr();
  }
  kernels(call, plan, memory);
}

template <class Call, class Run>
void run(const Call& call, Pass pass, int32_t device, Run kernels) {
  run(call, plan_for(call.problem, pass, cuda::access_of(call), device), device, kernels);
}

int64_t workspace_of(const cuda::TailPlan&) { return 0; }
template <class SomePlan>
int64_t workspace_of(const SomePlan& plan) {
  return plan.workspace;
}

template <class Kernels>
void with_workspace(int64_t bytes, int32_t device, Kernels kernels) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor keep_workspace;
  cuda::Memory memory{nullptr, nullptr, current_stream(device)};
  if (bytes > 0) {
    keep_workspace = bytes_on(device, bytes);
    memory.workspace = keep_workspace.data_ptr();
  }
  kernels(memory);
}

// Pooling or rescaling alone, or a pass of a block. Their plans are made without a search, so they
// are not kept.
template <class Call, class Run>
void run_apart(const Call& call, int32_t device, Run kernels) {
  const auto plan = cuda::plan_of(call, description(device));
  with_workspace(workspace_of(plan), device,
                 [&](const cuda::Memory& memory) { kernels(call, plan, memory); });
}

// The tail of a block: on chip where a plan has it there, else in passes.
template <class Call, class Run>
void run_tail(const Call& call, const Problem& problem, Pass pass, int32_t device, Run kernels) {
  if (cuda::fits_on_chip(call)) {
    const Plan& plan = plan_for(problem, pass, cuda::access_of(call), device);
    if (plan.strategy != 'C') return run(call, plan, device, kernels);
  }
  const cuda::TailPasses passes = cuda::passes_of(call, description(device));
  with_workspace(passes.workspace, device,
                 [&](const cuda::Memory& memory) { kernels(call, passes, memory); });
}

}  // namespace

void force_plan(const Forced* forced) {
  const std::lock_guard<std::mutex> lock(force_mutex);
  if (forced) forced_plan = *forced;
  forcing.store(forced != nullptr, std::memory_order_release);
}

const Gpu& description(int32_t device) {
  static auto& known = *new std::map<int32_t, Gpu>;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const torch::stable::accelerator::DeviceGuard guard(device);
  return known[device] = cuda::current_gpu();
}

void forward(const Forward& f, int32_t device) { run(f, Pass::kForward, device, cuda::forward); }

void backward(const Backward& b, int32_t device) {
  run(b, Pass::kBackward, device, cuda::backward);
}

void reduce(const Reduce& r, int32_t device) { run_apart(r, device, cuda::reduce); }

void scale(const Scale& s, int32_t device) { run_apart(s, device, cuda::scale); }

void block_tail(const BlockTail& b, int32_t device) {
  run_tail(b, b.problem, Pass::kTailForward, device,
           [](const BlockTail& call, const auto& plan, const cuda::Memory& memory) {
             cuda::block_tail(call, plan, memory);
           });
}

void block_tail_backward(const BlockTailBackward& b, int32_t device) {
  run_tail(b, b.forward.problem, Pass::kTailBackward, device,
           [](const BlockTailBackward& call, const auto& plan, const cuda::Memory& memory) {
             cuda::block_tail_backward(call, plan, memory);
           });
}

void moments(const Moments& t, int32_t device) { run_apart(t, device, cuda::moments); }

void tail(const Tail& t, int32_t device) { run_apart(t, device, cuda::tail); }

void tail_sums(const TailSums& t, int32_t device) { run_apart(t, device, cuda::tail_sums); }

void tail_gradients(const TailGradients& t, int32_t device) {
  run_apart(t, device, cuda::tail_gradients);
}

void activated_sums(const ActivatedSums& t, int32_t device) {
  run_apart(t, device, cuda::activated_sums);
}

void gated(const Gated& t, int32_t device) { run_apart(t, device, cuda::gated); }

void gated_gradients(const GatedGradients& t, int32_t device) {
  run_apart(t, device, cuda::gated_gradients);
}

void batch_statistics(const BatchStatistics& t, int32_t device) {
  with_workspace(0, device, [&](const auto& memory) { cuda::batch_statistics(t, memory); });
}

void coefficients(const Coefficients& t, int32_t device) {
  with_workspace(0, device, [&](const auto& memory) { cuda::coefficients(t, memory); });
}

void totals(const Totals& t, int32_t device) {
  with_workspace(cuda::workspace_of(t), device,
                 [&](const auto& memory) { cuda::totals(t, memory); });
}

void gradient_coefficients(const GradientCoefficients& t, int32_t device) {
  with_workspace(0, device, [&](const auto& memory) { cuda::gradient_coefficients(t, memory); });
}

void set_to_zero(void* memory, int64_t bytes, int32_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  cuda::set_to_zero(memory, bytes, current_stream(device));
}

}  // namespace eca::cuda_call
