// Shared memory, byte by byte: what orders two accesses, and copies on their way. Part of
// runtime.cpp.
//
// Two accesses of a block are in order if a block barrier lies in between, which changes the
// block's epoch.
#pragma once

#include <cstdlib>
#include <cstring>
#include <string>

#include "blocks.h"

namespace eca::simt {
namespace {

// In place of a thread's number.
constexpr uint16_t kNobody = 0, kSeveral = 0xffff, kInFlight = 0xfffe;

[[gnu::no_sanitize_address, gnu::no_sanitize_undefined]] uint16_t number_of(const Thread& t) {
  return uint16_t(t.thread + 1);
}

void start_shared_memory(Block& b, int64_t bytes) {
  b.shared_bytes = bytes;
  if (bytes == 0) return;
  b.shared = static_cast<std::byte*>(std::malloc(size_t(bytes)));
  std::memset(b.shared, 0xff, size_t(bytes));
  if (!settings.check_shared) return;
  if (b.cells_size < bytes) {
    b.cells.reset(new Cell[size_t(bytes)]);
    b.first_cell = b.cells.get();
    b.cells_size = bytes;
  }
  std::memset(b.cells.get(), 0, size_t(bytes) * sizeof(Cell));
}

[[noreturn]] void race(const Block& b, int64_t byte, const char* what, uint16_t other,
                       const char* then, Place place) {
  const std::string by =
      other == kSeveral ? "several threads" : "thread " + std::to_string(other - 1);
  fault("data race in shared memory", place,
        "byte %d of block %d is %s, and was %s by %s with no barrier in between", int(byte),
        int(b.index), what, then, by.c_str());
}

[[noreturn]] void never_written(const Block& b, int64_t byte, Place place) {
  fault("uninitialised shared memory", place, "byte %d of block %d was never written", int(byte),
        int(b.index));
}

[[noreturn]] void in_flight(const Block& b, int64_t byte, Place place) {
  fault("copy in flight", place, "byte %d of block %d is the target of a copy not waited for",
        int(byte), int(b.index));
}

[[gnu::no_sanitize_address, gnu::no_sanitize_undefined]] void check_read(Block& b, const Thread& t,
                                                                         int64_t first, int bytes,
                                                                         Place place) {
  const uint16_t me = number_of(t);
  Cell* const cells = b.first_cell;
  for (int64_t i = first; i < first + bytes; ++i) {
    Cell& c = cells[i];
    if (c.writer != me) {
      if (c.writer == kNobody && settings.check_unwritten) never_written(b, i, place);
      if (c.writer == kInFlight) in_flight(b, i, place);
      if (c.write_epoch == b.epoch) race(b, i, "read", c.writer, "written", place);
    }
    c.reader = c.reader == me || c.read_epoch != b.epoch ? me : kSeveral;
    c.read_epoch = b.epoch;
  }
}

// `writer` is a thread's number, or kInFlight for a copy, which equals no thread's.
[[gnu::no_sanitize_address, gnu::no_sanitize_undefined]] void check_write(Block& b, int64_t first,
                                                                          int bytes,
                                                                          uint16_t writer,
                                                                          Place place) {
  Cell* const cells = b.first_cell;
  for (int64_t i = first; i < first + bytes; ++i) {
    Cell& c = cells[i];
    if (c.writer == kInFlight) in_flight(b, i, place);
    if (c.writer != writer && c.write_epoch == b.epoch)
      race(b, i, "written", c.writer, "written", place);
    if (c.reader != writer && c.read_epoch == b.epoch)
      race(b, i, "written", c.reader, "read", place);
    c = {writer, b.epoch, kNobody, 0};
  }
}

// The first byte of an access, which must lie in the block's shared memory.
int64_t place_in(const Block& b, const void* address, int bytes, Place place) {
  const auto first =
      int64_t(reinterpret_cast<intptr_t>(address) - reinterpret_cast<intptr_t>(b.shared));
  if (!b.shared || first < 0 || first + bytes > b.shared_bytes)
    fault("out of bounds in shared memory", place, "%d bytes from byte %lld of %d", bytes,
          (long long)first, int(b.shared_bytes));
  return first;
}

void next_epoch(Block& b) {
  if (++b.epoch != 0 || b.shared_bytes == 0) return;
  // All epochs are used up: everything so far is now as old as the first one.
  b.epoch = 2;
  if (!settings.check_shared) return;
  for (int64_t i = 0; i < b.shared_bytes; ++i)
    b.cells[size_t(i)].write_epoch = b.cells[size_t(i)].read_epoch = 1;
}

void end_shared_memory(Block& b) {
  for (const auto& of_thread : b.fetches)
    if (!of_thread.empty())
      fault("copy never waited for", of_thread.front().place, "the block has ended");
  std::free(b.shared);
  b.shared = nullptr;
}

}  // namespace

std::byte* shared_memory(int64_t first_byte, int64_t bytes, Place place) {
  const Block& b = *self->in;
  if (first_byte < 0 || bytes < 0 || first_byte + bytes > b.shared_bytes)
    fault("out of bounds in shared memory", place, "an array of %lld bytes from byte %lld of %d",
          (long long)bytes, (long long)first_byte, int(b.shared_bytes));
  return b.shared + first_byte;
}

void check_shared(const void* address, int bytes, bool write, Place place) {
  Block& b = *self->in;
  const int64_t first = place_in(b, address, bytes, place);
  if (!settings.check_shared) return;
  if (write) check_write(b, first, bytes, number_of(*self), place);
  else check_read(b, *self, first, bytes, place);
}

// The copy lands when the thread waits for it; until then nobody may touch its target.
void fetch(void* to, const void* from, int bytes, Place place) {
  Block& b = *self->in;
  const int64_t first = place_in(b, to, bytes, place);
  if (settings.check_shared) check_write(b, first, bytes, kInFlight, place);
#if defined(__SANITIZE_ADDRESS__)
  // At once, so that the report names the kernel's line.
  if (__asan_region_is_poisoned(const_cast<void*>(from), size_t(bytes)))
    std::memcpy(to, from, size_t(bytes));
#endif
  b.fetches.resize(b.threads.size());
  b.fetches[size_t(self->thread)].push_back(
      {static_cast<std::byte*>(to), static_cast<const std::byte*>(from), bytes, place});
}

void finish_fetches(Place) {
  Block& b = *self->in;
  if (b.fetches.empty()) return;
  auto& mine = b.fetches[size_t(self->thread)];
  for (const Fetch& f : mine) {
    std::memcpy(f.to, f.from, size_t(f.bytes));
    if (!settings.check_shared) continue;
    for (int64_t i = f.to - b.shared; i < f.to - b.shared + f.bytes; ++i)
      b.cells[size_t(i)] = {number_of(*self), b.epoch, kNobody, 0};
  }
  mine.clear();
}

}  // namespace eca::simt
