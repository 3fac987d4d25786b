// Shared memory, byte by byte: what orders two accesses, and copies on their way. Part of
// runtime.cpp.
//
// Two accesses of one block are in order if a block barrier lies in between, which changes the
// block's epoch, or a cluster barrier. Those of two blocks are in order if a cluster barrier lies
// in between: the first thread had arrived at fewer than the second one has waited for.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>

#include "blocks.h"

namespace eca::simt {
namespace {

// In place of a thread's number.
constexpr uint16_t kNobody = 0, kSeveral = 0xffff, kInFlight = 0xfffe, kCopied = 0xfffd,
                   kReserved = 0xfffc;

struct DeferredCopy {
  Block* block;
  size_t number;
};
std::vector<DeferredCopy> deferred;  // those that land at some moment before their wait

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

std::string thread_called(const Block& b, uint16_t number) {
  if (number == kSeveral) return "several threads";
  if (number == kInFlight || number == kCopied) return "a copy";
  const int threads = int(b.threads.size()), i = number - 1;
  return "thread " + std::to_string(i % threads) + " of block " +
         std::to_string(b.index - b.rank + i / threads);
}

[[noreturn]] void race(const Block& b, int64_t byte, const char* what, uint16_t other,
                       const char* then, Place place) {
  fault("data race in shared memory", place,
        "byte %d of block %d is %s, and was %s by %s with no barrier in between", int(byte),
        int(b.index), what, then, thread_called(b, other).c_str());
}

[[noreturn]] void never_written(const Block& b, int64_t byte, Place place) {
  fault("uninitialised shared memory", place, "byte %d of block %d was never written", int(byte),
        int(b.index));
}

[[noreturn]] void not_for_threads(const Block& b, int64_t byte, uint16_t writer, Place place) {
  if (writer == kReserved)
    fault("reserved shared memory", place, "byte %d of block %d belongs to the barrier of copies",
          int(byte), int(b.index));
  fault("copy in flight", place, "byte %d of block %d is the target of a copy not waited for",
        int(byte), int(b.index));
}

[[gnu::always_inline]] inline bool reserved(uint16_t writer) {
  return writer == kInFlight || writer == kReserved;
}

// Whether a barrier lies between another thread's recorded access, if there is one, and now.
[[gnu::always_inline]] inline bool write_is_past(const Cell& c, const Block& b, const Thread& t) {
  return c.writer == kNobody || c.write_epoch != b.epoch || c.write_arrivals < t.waits;
}

[[gnu::always_inline]] inline bool read_is_past(const Cell& c, const Block& b, const Thread& t) {
  return c.reader == kNobody || c.read_epoch != b.epoch || c.read_arrivals < t.waits;
}

[[gnu::always_inline]] inline bool peer_is_past(const Cell& c, const Thread& t) {
  return c.peer == kNobody || c.peer_arrivals < t.waits;
}

[[gnu::no_sanitize_address, gnu::no_sanitize_undefined]] void check_read(Block& b, const Thread& t,
                                                                         int64_t first, int bytes,
                                                                         Place place) {
  const auto me = uint16_t(number_of(t));
  Cell* const cells = b.first_cell;
  for (int64_t i = first; i < first + bytes; ++i) {
    Cell& c = cells[i];
    if (c.writer != me) {
      if (c.writer == kNobody && settings.check_unwritten) never_written(b, i, place);
      if (reserved(c.writer)) not_for_threads(b, i, c.writer, place);
      if (!write_is_past(c, b, t)) race(b, i, "read", c.writer, "written", place);
    }
    if (c.reader == me || read_is_past(c, b, t)) {
      c.reader = me;
      c.read_epoch = b.epoch;
      c.read_arrivals = t.arrivals;
    } else {
      c.reader = kSeveral;
      if (t.arrivals > c.read_arrivals) c.read_arrivals = t.arrivals;
    }
  }
}

// `writer` is a thread's number, or kInFlight for a copy, which equals no thread's.
[[gnu::no_sanitize_address, gnu::no_sanitize_undefined]] void check_write(
    Block& b, const Thread& t, int64_t first, int64_t bytes, uint16_t writer, Place place) {
  Cell* const cells = b.first_cell;
  for (int64_t i = first; i < first + bytes; ++i) {
    Cell& c = cells[i];
    if (reserved(c.writer)) not_for_threads(b, i, c.writer, place);
    if (c.writer != writer && !write_is_past(c, b, t))
      race(b, i, "written", c.writer, "written", place);
    if (c.reader != writer && !read_is_past(c, b, t))
      race(b, i, "written", c.reader, "read", place);
    if (!peer_is_past(c, t)) race(b, i, "written", c.peer, "read", place);
    c = {writer, b.epoch, t.arrivals, kNobody, 0, 0, kNobody, 0};
  }
}

// The first byte of an access, which must lie in the block's shared memory.
int64_t place_in(const Block& b, const void* address, int64_t bytes, Place place) {
  const auto first =
      int64_t(reinterpret_cast<intptr_t>(address) - reinterpret_cast<intptr_t>(b.shared));
  if (!b.shared || first < 0 || first + bytes > b.shared_bytes)
    fault("out of bounds in shared memory", place, "%lld bytes from byte %lld of %d",
          (long long)bytes, (long long)first, int(b.shared_bytes));
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

// ---- copies ----

void land(Copy& copy) {
  if (copy.landed) return;
  const Rows& r = copy.what;
  for (int64_t i = 0; i < r.rows; ++i)
    std::memcpy(r.to + i * r.pitch, r.from + i * r.stride, size_t(r.bytes));
  copy.landed = true;
}

// Some copies land as soon as they can, some at any time, some only when they must.
void defer(Block& b, size_t number) {
  if (b.copies[number].landed) return;
  const int when = random_source.below(3);
  if (when == 0) land(b.copies[number]);
  if (when == 1) deferred.push_back({&b, number});
}

void maybe_land_copies() {
  if (deferred.empty() || random_source.below(32) != 0) return;
  const size_t i = size_t(random_source.below(int64_t(deferred.size())));
  land(deferred[i].block->copies[deferred[i].number]);
  deferred[i] = deferred.back();
  deferred.pop_back();
}

void forget_deferred(const Block& b) {
  deferred.erase(std::remove_if(deferred.begin(), deferred.end(),
                                [&](const DeferredCopy& d) { return d.block == &b; }),
                 deferred.end());
}

// All threads wait for them.
void land_copies(Block& b) {
  CopyObject& object = b.copy_objects[size_t(self->waits_for_copies)];
  object.waited = true;
  forget_deferred(b);
  for (Copy& copy : b.copies) {
    if (copy.object != self->waits_for_copies) continue;
    land(copy);
    if (!settings.check_shared) continue;
    for (int64_t row = 0; row < copy.what.rows; ++row) {
      const int64_t first = copy.what.to + row * copy.what.pitch - b.shared;
      for (int64_t i = first; i < first + copy.what.bytes; ++i)
        b.cells[size_t(i)] = {kCopied, b.epoch, self->arrivals, kNobody, 0, 0, kNobody, 0};
    }
  }
}

void start_wait_for_copies(Block& b, int object, Place place) {
  if (b.copy_objects[size_t(object)].waited)
    fault("bad copy", place, "a second wait for the same copies");
  self->waits_for_copies = object;
}

void end_shared_memory(Block& b) {
  for (const auto& of_thread : b.fetches)
    if (!of_thread.empty())
      fault("copy never waited for", of_thread.front().place, "the block has ended");
  for (const Copy& copy : b.copies)
    if (!b.copy_objects[size_t(copy.object)].waited)
      fault("copy never waited for", copy.place, "the block has ended");
  uint16_t waits = 0;
  for (const Thread& t : b.threads) waits = std::max(waits, t.waits);
  if (b.peer != 0 && b.peer_arrivals >= waits)
    fault("block has ended", self->place, "%s may still read the shared memory of block %d",
          thread_called(b, uint16_t(b.peer)).c_str(), int(b.index));
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
  if (write) check_write(b, *self, first, bytes, uint16_t(number_of(*self)), place);
  else check_read(b, *self, first, bytes, place);
}

const void* shared_of_rank(const void* address, int bytes, int rank, Place place) {
  const Thread& t = *self;
  const int64_t first = place_in(*t.in, address, bytes, place);
  const auto& blocks = t.in->cluster->blocks;
  if (rank < 0 || rank >= int(blocks.size()))
    fault("bad rank", place, "%d in a cluster of %d blocks", rank, int(blocks.size()));
  Block& b = *blocks[size_t(rank)];
  if (b.ended)
    fault("block has ended", place, "and so has the shared memory of block %d", int(b.index));
  if (!settings.check_shared) return b.shared + first;
  if (&b == t.in) {
    check_read(b, t, first, bytes, place);
    return b.shared + first;
  }
  for (int64_t i = first; i < first + bytes; ++i) {
    Cell& c = b.cells[size_t(i)];
    if (c.writer == kNobody) {
      // Nobody knows yet whether the writer is late or missing.
      if (settings.check_unwritten) never_written(b, i, place);
    } else if (reserved(c.writer)) {
      not_for_threads(b, i, c.writer, place);
    } else if (c.write_arrivals >= t.waits) {
      race(b, i, "read", c.writer, "written", place);
    }
    c.peer_arrivals = c.peer == kNobody ? t.arrivals : std::max(c.peer_arrivals, t.arrivals);
    c.peer = uint16_t(number_of(t));
  }
  b.peer_arrivals = b.peer == 0 ? t.arrivals : std::max(b.peer_arrivals, t.arrivals);
  b.peer = number_of(t);
  return b.shared + first;
}

// The copy lands when the thread waits for it; until then nobody may touch its target.
void fetch(void* to, const void* from, int bytes, Place place) {
  Block& b = *self->in;
  const int64_t first = place_in(b, to, bytes, place);
  if (settings.check_shared) check_write(b, *self, first, bytes, kInFlight, place);
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
    const auto me = uint16_t(number_of(*self));
    for (int64_t i = f.to - b.shared; i < f.to - b.shared + f.bytes; ++i)
      b.cells[size_t(i)] = {me, b.epoch, self->arrivals, kNobody, 0, 0, kNobody, 0};
  }
  mine.clear();
}

int new_copies(const void* barrier, Place place) {
  Thread& t = *self;
  Block& b = *t.in;
  const int number = t.copy_objects++;
  if (number < int(b.copy_objects.size())) {
    if (b.copy_objects[size_t(number)].barrier != barrier)
      fault("bad copy", place, "threads of a block disagree on the barrier");
    return number;
  }
  const int64_t first = place_in(b, barrier, 8, place);
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) misaligned(8, place);
  if (settings.check_shared) check_write(b, t, first, 8, kReserved, place);
  b.copy_objects.push_back({barrier, false});
  return number;
}

void copy(int object, const Rows& what, Place place) {
  Thread& t = *self;
  Block& b = *t.in;
  const auto number = size_t(t.copies++);
  if (number < b.copies.size()) {
    const Copy& c = b.copies[number];
    const auto all = [](const Rows& r) {
      return std::tie(r.to, r.from, r.pitch, r.stride, r.rows, r.bytes);
    };
    if (c.object != object || all(c.what) != all(what))
      fault("bad copy", place, "threads of a block disagree on its arguments");
    return;
  }
  if (b.copy_objects[size_t(object)].waited)
    fault("bad copy", place, "after the wait for these copies");
  const bool alike =
      reinterpret_cast<uintptr_t>(what.to) % 16 == reinterpret_cast<uintptr_t>(what.from) % 16;
  for (int64_t row = 0; row < what.rows && what.bytes > 0; ++row) {
    const int64_t first = place_in(b, what.to + row * what.pitch, what.bytes, place);
    if (settings.check_shared) check_write(b, t, first, what.bytes, kInFlight, place);
    if (counting)
      count_run(what.from + row * what.stride, what.bytes,
                alike ? Direction::kBulk : Direction::kLoad, place);
  }
  b.copies.push_back({object, what, place, what.rows * what.bytes == 0});
  if (b.copies.back().landed) return;
#if defined(__SANITIZE_ADDRESS__)
  // At once, so that the report names the kernel's line.
  for (int64_t row = 0; row < what.rows; ++row)
    if (__asan_region_is_poisoned(const_cast<std::byte*>(what.from) + row * what.stride,
                                  size_t(what.bytes)))
      land(b.copies.back());
#endif
  defer(b, number);
}

}  // namespace eca::simt
