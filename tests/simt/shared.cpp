// SPDX-License-Identifier: MIT
// Shared memory and asynchronous copies.
#include <cstdio>

#include "counters.h"
#include "state.h"

namespace simt {
namespace {

constexpr size_t kWindow = 256 * 1024, kGuardPages = 64 * 1024;
constexpr uint32_t kFirst = 1024;   // so that no array is at address 0
constexpr uint32_t kBetween = 256;  // bytes of nobody between two arrays
constexpr uint8_t kFill = 0xFF;     // NaN in every type

// Not memset: ThreadSanitizer takes that for an access of whoever runs.
void fill(char* begin, size_t bytes) {
  auto* words = reinterpret_cast<volatile uint64_t*>(begin);
  for (size_t i = 0; i < (bytes + 7) / 8; ++i) words[i] = ~uint64_t{0};
}

size_t shared_limit(int capability) {
  switch (capability) {
    case 75: return 64 * 1024;
    case 80:
    case 87: return 163 * 1024;
    case 86:
    case 89:
    case 120: return 99 * 1024;
    default: return 227 * 1024;
  }
}

}  // namespace

Window::Window() {
  char* memory = map_pages(kGuardPages + kWindow + kGuardPages);
  protect_pages(memory, kGuardPages);
  protect_pages(memory + kGuardPages + kWindow, kGuardPages);
  base_ = memory + kGuardPages;
  fill(base_, kWindow);
  forbid(base_, kWindow);
}

Allocation& Window::allocate(const void* site, const char* name, size_t bytes, size_t align) {
  const size_t begin = (used_ + align - 1) / align * align;
  used_ = static_cast<uint32_t>(begin + bytes + kBetween);
  allow(base_ + begin, bytes);
  return allocations_.emplace_back(Allocation{site, name, static_cast<uint32_t>(begin), static_cast<uint32_t>(bytes)});
}

void Window::begin_block(unsigned dynamic_bytes) {
  if (forget_accesses(base_, kWindow)) fill(base_, kWindow);
  used_ = kFirst;
  allocations_.clear();
  if (dynamic_bytes > 0) allocate(nullptr, "the dynamic shared memory", dynamic_bytes, 1024);
}

void Window::end_block(Where where) {
  uint32_t free = 0;  // where the bytes of nobody before an array begin
  const auto check = [&](uint32_t end) {
    for (uint32_t i = free; i < end; ++i) {
      if (static_cast<uint8_t>(base_[i]) == kFill) continue;
      char text[120];
      describe(i, text, sizeof text);
      diagnose(where, "something wrote outside the shared arrays: %s", text);
    }
  };
  for (const Allocation& allocation : allocations_) {
    check(allocation.begin);
    free = allocation.begin + allocation.bytes;
  }
  check(used_);
  for (const Allocation& allocation : allocations_) {
    fill(base_ + allocation.begin, allocation.bytes);  // to the next multiple of 8: nobody's
    forbid(base_ + allocation.begin, allocation.bytes);
  }
}

void* Window::array(const void* site, const char* name, size_t bytes, Where where) {
  for (const Allocation& allocation : allocations_) {
    if (allocation.site == site) return base_ + allocation.begin;
  }
  size_t fixed = bytes, dynamic = 0;
  for (const Allocation& allocation : allocations_) (allocation.site ? fixed : dynamic) += allocation.bytes;
  if (fixed > 48 * 1024) diagnose(where, "%s: more than 48 KiB of static shared memory", name);
  if (fixed + dynamic > shared_limit(gpu.capability)) {
    diagnose(where, "%s: a block uses %zu bytes of shared memory, compute capability %d.%d has %zu", name,
             fixed + dynamic, gpu.capability / 10, gpu.capability % 10, shared_limit(gpu.capability));
  }
  return base_ + allocate(site, name, bytes, 16).begin;
}

char* Window::dynamic(Where where) {
  for (const Allocation& allocation : allocations_) {
    if (allocation.site == nullptr) return base_ + allocation.begin;
  }
  diagnose(where, "dynamic shared memory, but the launch asked for none");
}

bool Window::contains(const void* pointer, uint32_t* offset) const {
  const auto* byte = static_cast<const char*>(pointer);
  *offset = static_cast<uint32_t>(byte - base_);
  return byte >= base_ && byte < base_ + kWindow;
}

uint32_t Window::offset(const void* pointer, Where where) const {
  uint32_t offset = 0;
  if (!contains(pointer, &offset)) diagnose(where, "the pointer is not into the block's shared memory");
  return offset;
}

char* Window::pointer(uint32_t address, unsigned bytes, Where where) const {
  if (address % bytes != 0) diagnose(where, "shared address %u is no multiple of %u", address, bytes);
  for (const Allocation& allocation : allocations_) {
    if (address >= allocation.begin && address + bytes <= allocation.begin + allocation.bytes) return base_ + address;
  }
  char text[120];
  describe(address, text, sizeof text);
  diagnose(where, "access outside the shared arrays: %u bytes at %s", bytes, text);
}

size_t Window::bytes() const {
  size_t sum = 0;
  for (const Allocation& allocation : allocations_) sum += allocation.bytes;
  return sum;
}

void Window::describe(uint32_t address, char* text, size_t size) const {
  const Allocation* nearest = nullptr;
  for (const Allocation& allocation : allocations_) {
    if (allocation.begin <= address) nearest = &allocation;
  }
  if (nearest != nullptr) {
    std::snprintf(text, size, "byte %u of %s (%u bytes)", address - nearest->begin, nearest->name, nearest->bytes);
  } else {
    std::snprintf(text, size, "address %u, where nothing is", address);
  }
}

void* shared_array(const void* site, const char* name, size_t bytes, Where where) {
  return running->block->window.array(site, name, bytes, where);
}
char* dynamic_shared(Where where) { return running->block->window.dynamic(where); }
uint32_t shared_offset(const void* pointer, Where where) { return running->block->window.offset(pointer, where); }
char* shared_pointer(uint32_t address, unsigned bytes, Where where) {
  return running->block->window.pointer(address, bytes, where);
}

void check_aligned(const void* pointer, unsigned bytes, Where where) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    diagnose(where, "address %p is no multiple of %u", pointer, bytes);
  }
}

bool copies_are_asynchronous() { return gpu.capability >= 80; }

void start_copy(char* to, const void* from, int bytes, int width, Where where) {
  Thread& thread = *running;
  thread.where = where;
  thread.copies.push_back({to, static_cast<const char*>(from), bytes, width, thread.group});
}

void commit_copies() { ++running->group; }

bool next_covered_copy(int pending, Copy* copy) {
  Thread& thread = *running;
  if (thread.copies.empty() || thread.copies.front().group + static_cast<uint64_t>(pending) >= thread.group) {
    pause_counting(false);
    return false;
  }
  pause_counting(true);  // the copy was counted when it was started
  *copy = thread.copies.front();
  thread.copies.erase(thread.copies.begin());
  return true;
}

}  // namespace simt
