// SPDX-License-Identifier: MIT
// Fibers on one OS thread, known to AddressSanitizer and ThreadSanitizer. Everything under tests/simt that is not a
// header of the kernels is compiled without -fsanitize, with SIMT_ASAN or SIMT_TSAN: its own accesses are neither races
// nor order anything.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace simt {

// An execution context with a stack of its own, or (default) the one that the process started with.
class Context {
 public:
  Context();
  // Runs `entry` when it is resumed first; `entry` must not return.
  explicit Context(void (*entry)());
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // Leaves this context, which must be running, for another. Returns when this one is resumed.
  void switch_to(Context& next);
  // First thing in `entry`.
  static void entered();

 private:
#ifdef __x86_64__
  void* stack_pointer_ = nullptr;
#else
  ucontext_t machine_;
#endif
  char* stack_ = nullptr;  // lowest address; a page that nobody may touch lies below
  size_t stack_size_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* tsan_fiber_ = nullptr;
};

// What ThreadSanitizer is told. `object` is any address; nothing is read or written there.
void acquire(void* object);
void release(void* object);
// An address that was never an object before.
void* new_object();
// What was acquired into `from` (an object) is released to `to`, past the running fiber's own clock.
void forward(void* from, void* to);
// Forgets all earlier accesses to these whole pages. True: they are zero now.
bool forget_accesses(void* pages, size_t bytes);

// What AddressSanitizer is told.
void forbid(const void* begin, size_t bytes);
void allow(const void* begin, size_t bytes);

char* map_pages(size_t bytes);                  // readable and writable, zero
void protect_pages(void* begin, size_t bytes);  // nobody may touch them

}  // namespace simt
