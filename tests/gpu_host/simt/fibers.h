// Fibers with reused stacks, for one host thread. Part of runtime.cpp.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace eca::simt {

struct Fiber {
  void* registers[5];  // of __builtin_setjmp
  void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  ucontext_t context;
  bool started = false;
};

namespace fibers {

Fiber host;  // what launched the kernel
Fiber* running = &host;

inline void leave(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#else
  (void)from, (void)to;
#endif
}

inline void arrive(Fiber& to, Fiber* first_from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(to.fake_stack, &stack, &bytes);
  if (first_from == &host) host.stack = const_cast<void*>(stack), host.stack_bytes = bytes;
#else
  (void)to, (void)first_from;
#endif
}

// In another function than its __builtin_setjmp, as the compiler demands.
[[gnu::noinline, gnu::no_sanitize_address, noreturn]] inline void resume(Fiber& to) {
  __builtin_longjmp(to.registers, 1);
}

// Only a fiber's first switch goes through the C library, whose switches cost system calls.
// Not instrumented: AddressSanitizer would take the jump for one out of the functions on the stack.
[[gnu::noinline, gnu::no_sanitize_address]] void switch_to(Fiber& to) {
  Fiber& from = *running;
  running = &to;
  leave(from, to);
  if (__builtin_setjmp(from.registers) == 0) {
    if (&to == &host || to.started) resume(to);
    to.started = true;
    setcontext(&to.context);
  }
  arrive(*running, nullptr);
}

// From a pool. `entry` never returns; it calls arrive() first.
class Pool {
 public:
  Fiber* take(void (*entry)(), size_t stack_bytes) {
    if (free_.empty()) return make(entry, stack_bytes);
    Fiber* fiber = free_.back();
    free_.pop_back();
    return fiber;
  }

  void give_back(Fiber* fiber) { free_.push_back(fiber); }

 private:
  Fiber* make(void (*entry)(), size_t stack_bytes) {
    Fiber& fiber = all_.emplace_back();
    void* stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // The lowest page stays without access: a stack that grows too large ends there.
    if (stack == MAP_FAILED || mprotect(stack, 4096, PROT_NONE) != 0) {
      std::perror("simt: no memory for the stack of a fiber");
      std::exit(4);
    }
    fiber.stack = stack;
    fiber.stack_bytes = stack_bytes;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
    return &fiber;
  }

  std::deque<Fiber> all_;
  std::vector<Fiber*> free_;
};

}  // namespace fibers
}  // namespace eca::simt
