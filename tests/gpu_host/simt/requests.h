// Requests on stdin and answers on stdout, for the programs that run kernels on the host.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "../../../csrc/eca.h"
#include "runtime.h"

namespace eca {
namespace {

// A map of the request: `elements` of memory; the first `offset` lie before the map.
struct MapRequest {
  int64_t elements, offset, sample_stride, row_stride;
};

void read_all(void* to, size_t bytes) {
  if (bytes > 0 && std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);  // the end of requests
}

void write_all(const void* from, size_t bytes) {
  if (bytes > 0) std::fwrite(from, 1, bytes, stdout);
}

void write_text(const std::string& text) {
  const int64_t bytes = int64_t(text.size());
  write_all(&bytes, sizeof bytes);
  write_all(text.data(), text.size());
}

// Memory of exactly this size, poisoned.
class Buffer {
 public:
  Buffer(const char* name, int64_t bytes, int64_t before = 0)
      : bytes_(bytes), before_(before), data_(allocate(size_t(bytes))) {
    std::memset(data_, 0xff, size_t(bytes));
    simt::register_buffer(name, data_, size_t(bytes));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    guard(false);
    std::free(data_);
  }

  void read() { read_all(data_, size_t(bytes_)); }
  void write() const { write_all(data_, size_t(bytes_)); }
  void clear() { std::memset(data_, 0, size_t(bytes_)); }
  bool is_clear() const {
    for (int64_t i = 0; i < bytes_; ++i)
      if (data_[i] != 0) return false;
    return true;
  }

  // The bytes before the map must not be touched while kernels run.
  void guard(bool on) {
#if defined(__SANITIZE_ADDRESS__)
    if (on) ASAN_POISON_MEMORY_REGION(data_, before_);
    else ASAN_UNPOISON_MEMORY_REGION(data_, before_);
#else
    (void)on;
#endif
  }

  char* data() const { return data_; }

 private:
  // At a multiple of 256 bytes, as PyTorch's allocator on a GPU does.
  static char* allocate(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, bytes) != 0) throw std::bad_alloc();
    return static_cast<char*>(memory);
  }

  int64_t bytes_, before_;
  char* data_;
};

struct MapBuffer {
  Buffer memory;
  Map map;

  MapBuffer(const char* name, const MapRequest& r, int64_t size)
      : memory(name, r.elements * size, r.offset * size),
        map{memory.data() + r.offset * size, r.sample_stride, r.row_stride} {}
};

const char* name_of(simt::Direction direction) {
  return direction == simt::Direction::kLoad ? "load" : "store";
}

std::string describe(const std::vector<simt::LaunchTraffic>& launches) {
  std::string text = "[";
  for (const auto& launch : launches) {
    text += text.size() > 1 ? ", {\"sites\": [" : "{\"sites\": [";
    bool first = true;
    for (const auto& s : launch.sites) {
      text += std::string(first ? "" : ", ") + "{\"file\": \"" + std::string(s.file) +
              "\", \"line\": " + std::to_string(s.line) + ", \"direction\": \"" +
              name_of(s.direction) + "\", \"bytes\": " + std::to_string(s.bytes) +
              ", \"sectors\": " + std::to_string(s.sectors) + "}";
      first = false;
    }
    text += "], \"buffers\": {";
    first = true;
    for (const auto& b : launch.buffers) {
      text += std::string(first ? "" : ", ") + "\"" + b.name + "\": [" +
              std::to_string(b.sectors_read) + ", " + std::to_string(b.sectors_written) + "]";
      first = false;
    }
    text += "}}";
  }
  return text + "]";
}

}  // namespace
}  // namespace eca
