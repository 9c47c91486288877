// SPDX-License-Identifier: MIT
// Memory that lasts for one call, and huge pages.
#pragma once

#include <cstdint>

namespace repvgg::ops {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kWorthHugePages = 1 << 20;  // below it an allocation is not aligned to huge pages

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Asks for huge pages under [data, data + bytes), before it is first written. Does nothing where there are none.
void advise_huge_pages(void* data, int64_t bytes);

// Workspace of one call on a CPU, uninitialised, aligned to a cache line (to a huge page where it is large). The
// calling thread keeps the memory for its next call, at most kKeptBytes of it: fresh pages would cost a page fault
// each. Threads share nothing.
class Scratch {
 public:
  static constexpr int64_t kKeptBytes = 256 << 20;

  // Throws std::runtime_error if there is not so much memory.
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  int64_t own_bytes_ = 0;  // more than 0: data_ is this call's own; else it is the thread's, or there is none
};

}  // namespace repvgg::ops
