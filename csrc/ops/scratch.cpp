// SPDX-License-Identifier: MIT
#include "ops/scratch.h"

#include <new>
#include <stdexcept>
#include <string>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace repvgg::ops {
namespace {

std::align_val_t alignment(int64_t bytes) {
  return std::align_val_t{static_cast<size_t>(bytes < kWorthHugePages ? kCacheLine : kHugePage)};
}

char* allocate(int64_t bytes) {
  const int64_t size = round_up(bytes, static_cast<int64_t>(alignment(bytes)));  // whole huge pages
  void* const data = ::operator new(static_cast<size_t>(size), alignment(bytes), std::nothrow);
  if (data == nullptr) {
    throw std::runtime_error("out of memory: there are no " + std::to_string(bytes) +
                             " bytes of workspace; use a smaller batch");
  }
  if (bytes >= kWorthHugePages) advise_huge_pages(data, size);
  return static_cast<char*>(data);
}

void release(char* data, int64_t bytes) { ::operator delete(data, alignment(bytes)); }

// What a thread keeps between its calls.
struct Kept {
  char* data = nullptr;
  int64_t bytes = 0;
  bool lent = false;

  void drop() {
    if (data != nullptr) release(data, bytes);
    data = nullptr;
    bytes = 0;
  }
  ~Kept() { drop(); }
};

thread_local Kept kept;

}  // namespace

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  // Kernels may be built without huge pages: then this fails, and nothing depends on it.
  (void)madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
}

Scratch::Scratch(int64_t bytes) {
  if (bytes <= 0) return;
  if (kept.lent || bytes > kKeptBytes) {
    data_ = allocate(bytes);
    own_bytes_ = bytes;
    return;
  }
  if (kept.bytes < bytes) {
    kept.drop();
    kept.data = allocate(bytes);
    kept.bytes = bytes;
  }
  kept.lent = true;
  data_ = kept.data;
}

Scratch::~Scratch() {
  if (own_bytes_ > 0) {
    release(data_, own_bytes_);
  } else if (data_ != nullptr) {
    kept.lent = false;
  }
}

}  // namespace repvgg::ops
