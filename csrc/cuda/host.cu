// What only the CUDA runtime knows.
#include <mutex>
#include <set>
#include <utility>

#include "cuda.h"
#include "device.h"

namespace eca::cuda {

namespace {

// The memory of a module starts as zeros.
__device__ uint32_t slab[kSlabWords];

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current GPU failed");
  return device;
}

// Lets calls load code while a CUDA graph is being captured, which CUDA refuses by default: a first
// call may come within a capture.
class WhileCapturing {
 public:
  WhileCapturing() { exchange(); }
  ~WhileCapturing() { exchange(); }

 private:
  void exchange() { cudaThreadExchangeStreamCaptureMode(&mode_); }

  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "asking the GPU for its limits failed");
  return value;
}

}  // namespace

Gpu current_gpu() {
  const int device = current_device();
  Gpu gpu;
  gpu.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                   attribute(cudaDevAttrComputeCapabilityMinor, device);
  gpu.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  gpu.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  gpu.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  gpu.l2 = attribute(cudaDevAttrL2CacheSize, device);
  gpu.threads_per_multiprocessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device);
  return gpu;
}

uint32_t* counter_slab() {
  const WhileCapturing allowed;
  void* address = nullptr;
  check(cudaGetSymbolAddress(&address, slab), "finding the counters failed");
  return static_cast<uint32_t*>(address);
}

void allow_all_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static auto& done = *new std::set<std::pair<const void*, int>>;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({kernel, device})) return;
  const WhileCapturing allowed;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
        "the GPU does not give its shared memory");
  done.insert({kernel, device});
}

uint64_t capture_id(StreamHandle stream) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(static_cast<Stream>(stream), &status),
        "asking whether a CUDA graph is being captured failed");
  if (status == cudaStreamCaptureStatusNone) return 0;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(static_cast<Stream>(stream), &status, &id),
        "asking which CUDA graph is being captured failed");
  return id;
}

void set_to_zero(void* memory, int64_t bytes, StreamHandle stream) {
  fill_with_zeros(memory, size_t(bytes), static_cast<Stream>(stream));
}

}  // namespace eca::cuda
