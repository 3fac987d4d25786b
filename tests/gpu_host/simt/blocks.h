// The state of the blocks that run. Part of runtime.cpp.
#pragma once

#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "fibers.h"
#include "runtime.h"

namespace eca::simt {

constexpr int kLanes = 32, kMostThreads = 1024;

// What a thread waits at, or kRunnable.
enum class At { kRunnable, kBarrier, kShuffle, kExit };

struct Block;

struct Thread : Coordinates {
  Block* in;
  Fiber* fiber;  // null before its first turn
  At at;
  Place place;  // of what it waits at
  uint64_t exchange;
  int mask, exchange_bytes;
};

// The history of a byte of shared memory. Threads are numbered from 1 on.
struct Cell {
  uint16_t writer, write_epoch;
  uint16_t reader, read_epoch;
};

struct Fetch {
  std::byte* to;
  const std::byte* from;
  int bytes;
  Place place;
};

// What the lanes ask for in one pass through a line of source; each part lies within a sector.
struct WarpAccess {
  int sectors = 0;
  struct {
    uint64_t sector;
    uint32_t bytes;  // a bit for each
  } parts[kLanes];
};

struct Warp {
  int shuffling;
  int stopped;  // lanes that have exited or wait at a block barrier
  int first;    // thread of those that shuffle
  // While traffic is counted, by site: accesses by pass, and the passes of each lane.
  std::vector<std::vector<WarpAccess>> accesses;
  std::vector<std::array<uint32_t, kLanes>> passes;
};

struct Block {
  int64_t index;
  std::vector<Thread> threads;
  Thread* first_thread;
  std::vector<Warp> warps;
  uint16_t runnable[kMostThreads];  // threads that can run and wait for their turn
  int runnable_count;
  int ready_slot;

  int exited;
  int at_barrier, first_at_barrier;  // threads
  uint16_t epoch;                    // block barriers so far, from 1 on

  std::byte* shared = nullptr;
  int64_t shared_bytes;
  std::unique_ptr<Cell[]> cells;  // of each byte
  Cell* first_cell = nullptr;
  int64_t cells_size = 0;
  std::vector<std::vector<Fetch>> fetches;  // of each thread, that are not finished
};

extern Thread* self;  // the running one

// splitmix64
struct Random {
  uint64_t state;

  [[gnu::no_sanitize_address, gnu::no_sanitize_undefined]] uint64_t bits() {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }

  [[gnu::no_sanitize_address, gnu::no_sanitize_undefined]] int below(int64_t n) {
    return int((bits() >> 33) * uint64_t(n) >> 31);
  }
};

inline Random random_source;

// The same file name may be in memory several times.
inline bool same(Place a, Place b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

}  // namespace eca::simt
