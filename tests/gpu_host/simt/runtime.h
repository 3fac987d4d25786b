// A GPU of one host thread: it runs the threads of a kernel's blocks as fibers, in random order.
// What a GPU would not forgive ends the program with exit status 3 and one line on stderr. Settings
// and counters are for the driver of a test; the rest serves simt.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace eca::simt {

// ---- for drivers ----

struct Settings {
  uint64_t seed = 1;                 // of the order of blocks and of fibers
  int resident = 2;                  // blocks that run at a time
  int64_t shared_limit = 227 << 10;  // bytes of a block
  bool check_shared = true;          // races and missing waits
  bool check_unwritten = true;       // reads of shared memory that nobody wrote
  bool count = false;                // memory traffic
  int64_t patience = 100'000;        // turns that may pass with all threads in waiting loops
  size_t stack_bytes = 64 << 10;     // of a fiber; of use before the first launch only
};

extern Settings settings;

// A line of source, from the default argument of what it calls.
struct Place {
  const char* file = "";
  int line = 0;

  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Names global memory for the counters; where ranges overlap, the first one counts.
void register_buffer(const std::string& name, const void* address, size_t bytes);
void forget_buffers();

enum class Direction { kLoad, kStore };

// What warps asked of the memory from one line of source. An access is what the lanes of a warp ask
// for in the same pass. Bytes count once, however many lanes ask for them.
struct SiteTraffic {
  const char* file;
  int line;
  Direction direction;
  int64_t accesses, bytes, sectors;  // sectors of 32 bytes
  double efficiency() const { return sectors ? double(bytes) / double(32 * sectors) : 1; }
};

// Distinct sectors in a launch: what a perfect cache would leave.
struct BufferTraffic {
  std::string name;  // "other" for memory that is not registered
  int64_t sectors_read, sectors_written;
};

struct LaunchTraffic {
  Place place;  // of its struct Launch
  std::vector<SiteTraffic> sites;
  std::vector<BufferTraffic> buffers;
  SiteTraffic total(Direction direction) const;  // of all sites
};

// One entry for each launch with settings.count since the last reset.
const std::vector<LaunchTraffic>& traffic();
void reset_traffic();

// ---- for simt.h ----

struct Coordinates {
  int thread, threads;
  int64_t block, blocks;
};

extern const Coordinates* here;  // of the running thread

// The details are for printf.
[[noreturn, gnu::format(printf, 3, 4)]] void fault(const char* kind, Place place,
                                                   const char* details, ...);
[[noreturn]] void misaligned(int bytes, Place place);
[[noreturn]] void out_of_array(int64_t i, int n, int count, Place place);

struct Kernel {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  bool in_order;  // blocks start in the order of their numbers
  Place place;
  void (*call)(const void*);  // each thread calls it with the next one
  const void* arguments;
};

// Throws std::runtime_error where a GPU would not start the kernel.
void run(const Kernel& kernel);

void block_barrier(Place place);
void shuffle_xor(void* value, int bytes, int mask, Place place);

// Another thread may run here. Turns in which all threads only wait are counted.
void let_others_run(bool waits, Place place);

std::byte* shared_memory(int64_t first_byte, int64_t bytes, Place place);
void check_shared(const void* address, int bytes, bool write, Place place);

// A copy that this thread alone reads, after finish_fetches().
void fetch(void* to, const void* from, int bytes, Place place);
void finish_fetches(Place place);

extern bool counting;
// By one lane of a warp. Accesses that are not `streamed` only count for the distinct sectors.
void count_access(const void* address, int bytes, Direction direction, bool streamed, Place place);

}  // namespace eca::simt
