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

__global__ void probe() {}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current GPU failed");
  return device;
}

// 1 without clusters. A GPU with clusters cannot use them if it runs PTX for an older GPU.
int largest_cluster(int capability) {
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, probe), "there is no code for this GPU in the extension");
  if (capability < 90 || code.ptxVersion < 90) return 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(8);
  config.blockDim = dim3(kMostThreads);
  int blocks = 0;
  if (cudaOccupancyMaxPotentialClusterSize(&blocks, probe, &config) == cudaSuccess)
    return blocks < 8 ? blocks : 8;  // 8 is what a kernel may use on any full GPU
  cudaGetLastError();
  return 1;
}

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
  gpu.largest_cluster = largest_cluster(gpu.capability);
  return gpu;
}

int active_clusters(int blocks, int threads, int64_t shared_bytes) {
  allow_all_shared_memory(reinterpret_cast<const void*>(probe), true);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, probe, &config),
        "asking how many clusters have room failed");
  return clusters;
}

uint32_t* counter_slab() {
  void* address = nullptr;
  check(cudaGetSymbolAddress(&address, slab), "finding the counters failed");
  return static_cast<uint32_t*>(address);
}

void allow_all_shared_memory(const void* kernel, bool reserve) {
  static std::mutex mutex;
  static auto& done = *new std::set<std::pair<const void*, int>>;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({kernel, device})) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
        "the GPU does not give its shared memory");
  if (reserve)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          "the GPU does not give its shared memory");
  done.insert({kernel, device});
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
