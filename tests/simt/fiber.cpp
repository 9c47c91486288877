// SPDX-License-Identifier: MIT
#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifdef SIMT_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_size);
void __asan_poison_memory_region(const volatile void* begin, size_t size);
void __asan_unpoison_memory_region(const volatile void* begin, size_t size);
}
#endif
#ifdef SIMT_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* object);
void __tsan_release(void* object);
}
#endif

#ifdef __x86_64__
// Pushes what the System V ABI lets a callee use, stores the stack pointer, takes the other one, pops.
extern "C" void simt_switch_stack(void** save, void* stack_pointer);
asm(R"(
.text
.globl simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch_stack, . - simt_switch_stack
)");
#endif

namespace simt {
namespace {

#if defined(SIMT_ASAN) || defined(SIMT_TSAN)
constexpr size_t kStackSize = 256 * 1024;
#else
constexpr size_t kStackSize = 64 * 1024;
#endif
constexpr size_t kGuard = 4096;
[[maybe_unused]] constexpr unsigned kNoSync = 1;
// A fiber knows from the start what its creator knew; this creator knows nothing of the kernels.
[[maybe_unused]] void* creator = nullptr;

}  // namespace

Context::Context() {
#ifdef SIMT_ASAN
  pthread_attr_t attributes;
  void* stack = nullptr;
  if (pthread_getattr_np(pthread_self(), &attributes) != 0 ||
      pthread_attr_getstack(&attributes, &stack, &stack_size_) != 0) {
    std::abort();
  }
  pthread_attr_destroy(&attributes);
  stack_ = static_cast<char*>(stack);
#endif
#ifdef SIMT_TSAN
  tsan_fiber_ = __tsan_get_current_fiber();
  creator = __tsan_create_fiber(0);
#endif
}

Context::Context(void (*entry)()) : stack_size_(kStackSize) {
  char* memory = map_pages(kGuard + kStackSize);
  protect_pages(memory, kGuard);
  stack_ = memory + kGuard;
#ifdef __x86_64__
  // As after a call to entry: its address for `ret` on a 16-byte boundary, six registers below.
  void** top = reinterpret_cast<void**>(stack_ + kStackSize) - 2;
  *top = reinterpret_cast<void*>(entry);
  stack_pointer_ = top - 6;
#else
  getcontext(&machine_);
  machine_.uc_stack.ss_sp = stack_;
  machine_.uc_stack.ss_size = kStackSize;
  makecontext(&machine_, entry, 0);
#endif
#ifdef SIMT_TSAN
  tsan_fiber_ = __tsan_create_fiber(0);
#endif
}

void Context::switch_to(Context& next) {
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(&fake_stack_, next.stack_, next.stack_size_);
#endif
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(next.tsan_fiber_, kNoSync);
#endif
#ifdef __x86_64__
  simt_switch_stack(&stack_pointer_, next.stack_pointer_);
#else
  swapcontext(&machine_, &next.machine_);
#endif
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Context::entered() {
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void acquire([[maybe_unused]] void* object) {
#ifdef SIMT_TSAN
  __tsan_acquire(object);
#endif
}

void release([[maybe_unused]] void* object) {
#ifdef SIMT_TSAN
  __tsan_release(object);
#endif
}

void* new_object() {
#ifdef SIMT_TSAN
  constexpr size_t kPerChunk = 4096;
  static uint64_t* chunk = nullptr;
  static size_t used = kPerChunk;
  if (used == kPerChunk) {
    chunk = static_cast<uint64_t*>(std::calloc(kPerChunk, sizeof *chunk));
    used = 0;
  }
  return chunk + used++;
#else
  return nullptr;
#endif
}

void forward([[maybe_unused]] void* from, [[maybe_unused]] void* to) {
#ifdef SIMT_TSAN
  void* running = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(creator, kNoSync);
  void* carrier = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(carrier, kNoSync);
  __tsan_acquire(from);
  __tsan_release(to);
  __tsan_switch_to_fiber(running, kNoSync);
  __tsan_destroy_fiber(carrier);
#endif
}

bool forget_accesses([[maybe_unused]] void* pages, [[maybe_unused]] size_t bytes) {
#ifdef SIMT_TSAN
  if (mmap(pages, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED) {
    std::perror("mmap");
    std::abort();
  }
  return true;
#else
  return false;
#endif
}

void forbid([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#ifdef SIMT_ASAN
  __asan_poison_memory_region(begin, bytes);
#endif
}

void allow([[maybe_unused]] const void* begin, [[maybe_unused]] size_t bytes) {
#ifdef SIMT_ASAN
  __asan_unpoison_memory_region(begin, bytes);
#endif
}

char* map_pages(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("mmap");
    std::abort();
  }
  return static_cast<char*>(memory);
}

void protect_pages(void* begin, size_t bytes) {
  if (mprotect(begin, bytes, PROT_NONE) != 0) {
    std::perror("mprotect");
    std::abort();
  }
}

}  // namespace simt
