// Operators without tensors: what this library was built for, the limits of a GPU, forced plans.
#include <string>
#include <vector>

#include "cpu/cpu.h"
#include "cuda/call.h"
#include "plan.h"
#include "stable_abi.h"

namespace eca {
namespace {

// Only setup.py says these. kernel-builder chooses the architectures by itself.
#if defined(ECA_FUSED_WITH_CUDA) && !defined(ECA_FUSED_CUDA_ARCHITECTURES)
#define ECA_FUSED_CUDA_ARCHITECTURES "unknown"
#define ECA_FUSED_CUDA_TOOLKIT "unknown"
#endif

#if defined(ECA_FUSED_WITH_CUDA)
constexpr const char* kArchitectures = ECA_FUSED_CUDA_ARCHITECTURES;
constexpr const char* kToolkit = ECA_FUSED_CUDA_TOOLKIT;
#else
constexpr const char *kArchitectures = "", *kToolkit = "";
#endif

#if defined(__clang__)
constexpr const char* kCompiler = "clang++ " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

// The oldest torch whose stable ABI has all that this library calls: two bytes of the number.
std::string torch_abi() {
  constexpr uint64_t version = TORCH_TARGET_VERSION;
  return std::to_string(version >> 56) + "." + std::to_string(version >> 48 & 0xff);
}

// As JSON.
std::string build_info() {
  std::string text, separator = "{\"cpu_capabilities\": [";
  for (const std::string& name : cpu::compiled_capabilities())
    text += separator + '"' + name + '"', separator = ", ";
  text += ']';
  const auto add = [&](const std::string& name, const std::string& value) {
    text += ", \"" + name + "\": \"" + value + '"';
  };
  add("cpu_capability", cpu::kernels().name);
  add("cuda_architectures", kArchitectures);
  add("cuda_toolkit", kToolkit);
  add("torch_abi", torch_abi());
  add("compiler", kCompiler);
  return text + '}';
}

#if defined(ECA_FUSED_WITH_CUDA)
std::vector<int64_t> gpu_of_device(int64_t index) {
  const Gpu& g = cuda_call::description(int32_t(index));
  return {
      g.capability, g.multiprocessors,           g.shared_per_block, g.shared_per_multiprocessor,
      g.l2,         g.threads_per_multiprocessor};
}

void force_plan(std::string strategy, int64_t tile, int64_t threads, int64_t depth) {
  if (strategy.empty()) return cuda_call::force_plan(nullptr);
  const Forced forced{strategy_by_name(strategy), int32_t(tile), int32_t(threads), int32_t(depth)};
  cuda_call::force_plan(&forced);
}
#endif

}  // namespace
}  // namespace eca

ECA_LIBRARY_FRAGMENT(m) {
  // JSON. The compute capabilities are as in TORCH_CUDA_ARCH_LIST, and empty without CUDA.
  m.def("build_info() -> str");
#if defined(ECA_FUSED_WITH_CUDA)
  // The members of Gpu in their order, for a CUDA device of this machine.
  m.def("gpu_of_device(int index) -> int[]");
  // Every later call of the CUDA kernels in this process uses this plan instead of the planner's
  // choice, until the strategy is "".
  m.def("force_plan(str strategy, int tile, int threads, int depth) -> ()");
#endif
}

ECA_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&eca::build_info));
#if defined(ECA_FUSED_WITH_CUDA)
  m.impl("gpu_of_device", TORCH_BOX(&eca::gpu_of_device));
  m.impl("force_plan", TORCH_BOX(&eca::force_plan));
#endif
}
