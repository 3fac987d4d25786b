// Which build of the CPU kernels runs here.
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"

namespace eca::cpu {

const Kernels& kernels() {
  static const Kernels& best = []() -> const Kernels& {
#if defined(__x86_64__) && defined(__GNUC__)
    const char* variable = std::getenv("ECA_FUSED_CPU_CAPABILITY");
    const std::string wish = variable && *variable ? variable : "avx512";
    if (wish != "avx512" && wish != "avx2" && wish != "baseline")
      throw std::runtime_error(
          "expected ECA_FUSED_CPU_CAPABILITY as one of baseline, avx2, avx512, got '" + wish + "'");
    // Every processor with AVX2 also has F16C, for which not every compiler can ask.
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (has_avx512 && wish == "avx512") return avx512::kernels;
    if (has_avx2 && wish != "baseline") return avx2::kernels;
#endif
    return baseline::kernels;
  }();
  return best;
}

std::vector<std::string> compiled_capabilities() {
#if defined(__x86_64__) && defined(__GNUC__)
  return {avx512::kernels.name, avx2::kernels.name, baseline::kernels.name};
#else
  return {baseline::kernels.name};
#endif
}

namespace {

// A number from a file of the system's about the first processor's index-th cache, such as "32768K";
// -1 if there is none.
int64_t read_cache(int index, const char* name) {
  const std::string path = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
  std::ifstream file(path + name);
  int64_t number = -1;
  char unit = 0;
  if (!(file >> number)) return -1;
  file >> unit;
  return number * (unit == 'K' ? 1024 : unit == 'M' ? 1024 * 1024 : 1);
}

// The size of a cache as a core sees it.
int64_t cache_bytes(int level, int64_t otherwise) {
  int64_t size = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  size = sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
#endif
  // The C library multiplies a cache that some cores share by their groups: 320 MB for 32 MB.
  for (int index = 0; index < 8; ++index)
    if (read_cache(index, "level") == level) {
      const int64_t found = read_cache(index, "size");
      if (found > 0 && (size <= 0 || found < size)) size = found;
    }
  return size > 0 ? size : otherwise;
}

}  // namespace

int64_t core_cache_bytes() {
  static const int64_t bytes = cache_bytes(2, int64_t(1) << 20);
  return bytes;
}

int64_t last_level_cache_bytes() {
  static const int64_t bytes = []() {
    const char* variable = std::getenv("ECA_FUSED_CPU_CACHE_BYTES");
    if (!variable || !*variable) return cache_bytes(3, int64_t(32) << 20);
    char* end = nullptr;
    const long long wish = std::strtoll(variable, &end, 10);
    if (*end || wish < 0)
      throw std::runtime_error("expected ECA_FUSED_CPU_CACHE_BYTES as a number from 0 up, got '" +
                               std::string(variable) + "'");
    return int64_t(wish);
  }();
  return bytes;
}

}  // namespace eca::cpu
