// What only the CUDA runtime knows.
#include "cuda.h"
#include "device.h"

namespace eca::cuda {

namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "asking the GPU for its limits failed");
  return value;
}

}  // namespace

Gpu current_gpu() {
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current GPU failed");
  Gpu gpu;
  gpu.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                   attribute(cudaDevAttrComputeCapabilityMinor, device);
  gpu.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  gpu.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  gpu.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  gpu.l2 = attribute(cudaDevAttrL2CacheSize, device);
  gpu.threads_per_multiprocessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device);
  gpu.largest_cluster = gpu.capability >= 90 ? 8 : 1;  // what every such GPU can start
  return gpu;
}

bool is_capturing(StreamHandle stream) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(static_cast<Stream>(stream), &status),
        "asking whether a CUDA graph is being captured failed");
  return status != cudaStreamCaptureStatusNone;
}

void set_to_zero(void* memory, int64_t bytes, StreamHandle stream) {
  fill_with_zeros(memory, size_t(bytes), static_cast<Stream>(stream));
}

}  // namespace eca::cuda
