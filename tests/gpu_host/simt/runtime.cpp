// Turns, barriers and launches. One translation unit with what it includes.
#include "runtime.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <stdexcept>

#include "blocks.h"
#include "fibers.h"
#include "traffic.h"
#include "shared_memory.h"

namespace eca::simt {

Settings settings;
const Coordinates* here = nullptr;
Thread* self = nullptr;

namespace {

Kernel kernel;
int launches = 0;

}  // namespace

void fault(const char* kind, Place place, const char* details, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "simt fault: %s: launch %d at %s:%d", kind, launches, kernel.place.file,
               kernel.place.line);
  if (self) std::fprintf(stderr, ", block %d, thread %d", int(self->block), self->thread);
  std::fprintf(stderr, ", at %s:%d: ", place.file, place.line);
  va_list arguments;
  va_start(arguments, details);
  std::vfprintf(stderr, details, arguments);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::_Exit(3);
}

void misaligned(int bytes, Place place) {
  fault("misaligned access", place, "%d bytes at an address that is not a multiple of it", bytes);
}

void out_of_array(int64_t i, int n, int count, Place place) {
  fault("out of bounds in shared memory", place, "elements %lld to %lld of an array of %d",
        (long long)i, (long long)(i + n - 1), count);
}

namespace {

// ---- turns ----

std::vector<std::unique_ptr<Block>> resident, spare;
std::vector<int64_t> order;  // of blocks
size_t next_in_order;
Block** ready;  // those with runnable threads
int ready_count;
Block* favourite;
int loyalty;  // of 64 turns, how many stay with the block of the turn before
// Turns since any thread did more than wait, and since one changed what others may wait for: blocks
// can wait in loops with barriers, too.
int64_t idle_turns, idle_turns_in_all;
std::vector<Thread*> asleep;  // they could run, but are left behind for a while
int asleep_count;
fibers::Pool pool;

// Every switch passes through these, so they avoid the cost of sanitizers and vectors.
[[gnu::no_sanitize_address, gnu::no_sanitize_undefined]] void make_runnable(Thread& t) {
  Block& b = *t.in;
  t.at = At::kRunnable;
  b.runnable[b.runnable_count++] = uint16_t(t.thread);
  if (b.runnable_count > 1) return;
  b.ready_slot = ready_count;
  ready[ready_count++] = &b;
}

void wake_one() {
  Thread*& t = asleep[size_t(random_source.below(int64_t(asleep.size())))];
  make_runnable(*t);
  t = asleep.back();
  asleep.pop_back();
  --asleep_count;
}

// Takes out a thread that can run; null if there is none.
[[gnu::no_sanitize_address, gnu::no_sanitize_undefined]] Thread* pick(bool elsewhere) {
  if (asleep_count > 0 && (ready_count == 0 || random_source.below(256) == 0)) wake_one();
  if (ready_count == 0) return nullptr;
  Block* b = favourite;
  if (!b || elsewhere || b->runnable_count == 0 || random_source.below(64) >= loyalty)
    b = favourite = ready[random_source.below(ready_count)];
  uint16_t& slot = b->runnable[random_source.below(b->runnable_count)];
  Thread* t = b->first_thread + slot;
  slot = b->runnable[--b->runnable_count];
  if (b->runnable_count == 0) {
    Block* last = ready[--ready_count];
    ready[b->ready_slot] = last;
    last->ready_slot = b->ready_slot;
  }
  return t;
}

const char* name_of(At at) {
  switch (at) {
    case At::kRunnable: return "runs";
    case At::kBarrier: return "waits at block_barrier";
    case At::kShuffle: return "waits at shuffle_xor";
    case At::kExit: return "has exited";
  }
  return "";
}

std::string describe(const Thread& t) {
  char text[1000];
  const bool waits = t.at != At::kExit && t.at != At::kRunnable;
  std::snprintf(text, sizeof text,
                waits ? "thread %d of block %d %s %s:%d" : "thread %d of block %d %s", t.thread,
                int(t.block), name_of(t.at), t.place.file, t.place.line);
  return text;
}

const char* fault_at(At at) {
  return at == At::kShuffle ? "shuffle not reached by all lanes"
                            : "barrier not reached by all threads";
}

// Two threads of which each needs the other to go on.
[[noreturn]] void stuck(const Thread& waiting, const Thread& other) {
  fault(fault_at(waiting.at), waiting.place, "%s, %s", describe(waiting).c_str(),
        describe(other).c_str());
}

template <class Condition>
const Thread* find(const Block& b, Condition condition) {
  for (const Thread& t : b.threads)
    if (condition(t)) return &t;
  return nullptr;
}

[[noreturn]] void nothing_runs() {
  for (const At at : {At::kShuffle, At::kBarrier})
    for (const auto& block : resident) {
      const Thread* waiting = find(*block, [&](const Thread& t) { return t.at == at; });
      if (!waiting) continue;
      self = &block->threads[size_t(waiting->thread)];
      const Thread* other = find(*block, [&](const Thread& t) {
        return t.at != at && (at != At::kShuffle || t.thread / kLanes == waiting->thread / kLanes);
      });
      if (other) stuck(*waiting, *other);
    }
  fault("deadlock", {}, "no thread can run");
}

void thread_main();

// Goes on with a thread that was picked, in its own fiber.
void go_on(Thread& t) {
  if (!t.fiber) {
    t.fiber = pool.take(thread_main, settings.stack_bytes);
    self = &t;
  }
  fibers::switch_to(*t.fiber);
}

// Gives the turn to another thread; returns when it is the caller's again.
void yield(bool elsewhere = false) {
  Thread* me = self;
  Thread* next = pick(elsewhere);
  if (!next) nothing_runs();
  if (next != me) go_on(*next);
  here = self = me;
}

void start_block(int64_t index) {
  if (spare.empty()) spare.push_back(std::make_unique<Block>());
  Block& b = *resident.emplace_back(std::move(spare.back()));
  spare.pop_back();
  b.index = index;
  b.threads.resize(kernel.threads);
  b.warps.assign(size_t(kernel.threads + kLanes - 1) / kLanes, Warp{});
  b.exited = b.at_barrier = 0;
  b.epoch = 1;
  b.fetches.clear();
  start_shared_memory(b, kernel.shared_bytes);
  b.runnable_count = 0;
  b.first_thread = b.threads.data();
  for (int i = 0; i < kernel.threads; ++i) {
    Thread& t = b.threads[i];
    t = Thread{};
    static_cast<Coordinates&>(t) = {i, kernel.threads, index, kernel.blocks};
    t.in = &b;
    make_runnable(t);
  }
}

void end_block(Block& b) {
  end_shared_memory(b);
  if (settings.count) warps_passed(b);
  if (favourite == &b) favourite = nullptr;
  const auto at = std::find_if(resident.begin(), resident.end(),
                               [&](const auto& other) { return other.get() == &b; });
  spare.push_back(std::move(*at));
  resident.erase(at);
  if (next_in_order < order.size()) start_block(order[next_in_order++]);
}

void end_thread(Thread& t) {
  Block& b = *t.in;
  t.at = At::kExit;
  idle_turns = idle_turns_in_all = 0;
  ++b.exited;
  Warp& warp = b.warps[size_t(t.thread / kLanes)];
  ++warp.stopped;
  if (warp.shuffling > 0) stuck(b.threads[size_t(warp.first)], t);
  if (b.at_barrier > 0) stuck(b.threads[size_t(b.first_at_barrier)], t);
  if (b.exited == t.threads) end_block(b);
}

// The function of every fiber. A new thread runs in the fiber of one that has ended.
void thread_main() {
  fibers::arrive(*fibers::running, fibers::host.stack ? nullptr : &fibers::host);
  Fiber* fiber = fibers::running;
  for (;;) {
    here = self;
    kernel.call(kernel.arguments);
    end_thread(*self);
    Thread* next = pick(false);
    if (!next && !resident.empty()) nothing_runs();
    if (next && !next->fiber) {
      next->fiber = fiber;
      self = next;
      continue;
    }
    pool.give_back(fiber);
    fibers::switch_to(next ? *next->fiber : fibers::host);
  }
}

// ---- barriers ----

[[gnu::no_sanitize_address, gnu::no_sanitize_undefined]] void release(Block& b) {
  Thread* const threads = b.first_thread;
  for (int i = 0; i < kernel.threads; ++i) make_runnable(threads[i]);
}

}  // namespace

void block_barrier(Place place) {
  Thread& t = *self;
  Block& b = *t.in;
  idle_turns = 0;
  t.at = At::kBarrier;
  t.place = place;
  if (b.exited > 0) stuck(t, *find(b, [](const Thread& o) { return o.at == At::kExit; }));
  Warp& warp = b.warps[size_t(t.thread / kLanes)];
  ++warp.stopped;
  if (warp.shuffling > 0) stuck(b.threads[size_t(warp.first)], t);
  if (b.at_barrier > 0) {
    const Thread& first = b.threads[size_t(b.first_at_barrier)];
    if (!same(first.place, place)) stuck(t, first);
  } else {
    b.first_at_barrier = t.thread;
  }
  if (++b.at_barrier == t.threads) {
    b.at_barrier = 0;
    for (Warp& w : b.warps) w.stopped = 0;
    next_epoch(b);
    if (settings.count) warps_passed(b);
    release(b);
  }
  yield();
}

void shuffle_xor(void* value, int bytes, int mask, Place place) {
  Thread& t = *self;
  Block& b = *t.in;
  const int first = t.thread / kLanes * kLanes;
  Warp& warp = b.warps[size_t(t.thread / kLanes)];
  idle_turns = 0;
  t.at = At::kShuffle;
  t.place = place;
  t.mask = mask;
  t.exchange_bytes = bytes;
  std::memcpy(&t.exchange, value, bytes);
  if (mask < 0 || mask >= kLanes) fault("bad shuffle", place, "a mask that is not of 5 bits");
  if (first + kLanes > t.threads)
    fault(fault_at(At::kShuffle), place, "the last warp has fewer than 32 lanes");
  if (warp.stopped > 0)
    stuck(t, *find(b, [&](const Thread& o) {
            return o.thread / kLanes == t.thread / kLanes &&
                   (o.at == At::kExit || o.at == At::kBarrier);
          }));
  if (warp.shuffling > 0) {
    const Thread& o = b.threads[size_t(warp.first)];
    if (o.exchange_bytes != bytes || !same(o.place, place)) stuck(t, o);
  } else {
    warp.first = t.thread;
  }
  if (++warp.shuffling == kLanes) {
    warp.shuffling = 0;
    uint64_t sent[kLanes];
    for (int i = 0; i < kLanes; ++i) sent[i] = b.threads[first + i].exchange;
    if (settings.count) warp_passed(b, t.thread / kLanes);
    for (int i = 0; i < kLanes; ++i) {
      Thread& o = b.threads[first + i];
      o.exchange = sent[i ^ o.mask];
      make_runnable(o);
    }
  }
  yield();
  std::memcpy(value, &t.exchange, bytes);
}

void let_others_run(bool waits, Place place) {
  if (!waits) idle_turns = idle_turns_in_all = 0;
  if (++idle_turns > settings.patience || ++idle_turns_in_all > 100 * settings.patience)
    fault("deadlock", place, "blocks wait for one another, or for one that does not run");
  // Where blocks meet, some are late.
  if (random_source.below(64) < (waits ? 1 : 16)) asleep.push_back(self), ++asleep_count;
  else make_runnable(*self);
  yield(true);
}

// ---- launches ----

void run(const Kernel& how) {
  if (self) throw std::runtime_error("simt: a launch within a kernel");
  ++launches;
  kernel = how;
  const auto refuse = [](const char* why, int64_t number) {
    throw std::runtime_error("simt: a kernel did not start: " + std::to_string(number) + why);
  };
  if (how.blocks < 1 || how.blocks > INT32_MAX) refuse(" blocks", how.blocks);
  if (how.threads < 1 || how.threads > kMostThreads) refuse(" threads in a block", how.threads);
  if (how.shared_bytes < 0 || how.shared_bytes > settings.shared_limit)
    refuse(" bytes of shared memory in a block", how.shared_bytes);

  random_source = {settings.seed};
  order.resize(size_t(how.blocks));
  std::iota(order.begin(), order.end(), int64_t(0));
  for (size_t i = how.in_order ? 0 : order.size(); i > 1; --i)
    std::swap(order[i - 1], order[random_source.below(i)]);
  constexpr int kLoyalties[] = {0, 32, 60, 63};
  loyalty = kLoyalties[random_source.below(4)];
  favourite = nullptr;
  idle_turns = idle_turns_in_all = 0;
  counting = settings.count;
  if (counting) start_traffic(how.place);
  static std::vector<Block*> places;
  places.resize(size_t(std::max(settings.resident, 1)));
  ready = places.data();
  next_in_order = 0;
  while (next_in_order < order.size() && resident.size() < places.size())
    start_block(order[next_in_order++]);
  go_on(*pick(false));
  here = self = nullptr;
  if (counting) end_traffic();
  counting = false;
}

}  // namespace eca::simt
