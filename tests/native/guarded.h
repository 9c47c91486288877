// SPDX-License-Identifier: MIT
// Memory that ends, or begins, at a page nobody may touch: a stray read is a report instead of luck.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace native {

enum class Guard { kAfter, kBefore };  // where the forbidden page touches the data

constexpr int kSegfaultExit = 3;
// What runs now, and which buffers exist, for the report.
inline char running[512] = "nothing yet";
struct LiveBuffer {
  const char* name;
  const char* data;
  size_t bytes;
  const char *begin, *end;  // with the forbidden pages
};
inline LiveBuffer live[4096] = {};

inline void report_segfault(int, siginfo_t* info, void*) {
  const auto* address = static_cast<const char*>(info->si_addr);
  char text[1024];
  int size = std::snprintf(text, sizeof text, "access outside every buffer at %p", info->si_addr);
  for (const LiveBuffer& buffer : live) {
    if (buffer.name == nullptr || address < buffer.begin || address >= buffer.end) continue;
    size = std::snprintf(text, sizeof text, "access outside %s (%zu bytes) at byte %td", buffer.name, buffer.bytes,
                         address - buffer.data);
  }
  size += std::snprintf(text + size, sizeof text - size, "\n  in %s\n", running);
  if (write(STDERR_FILENO, text, static_cast<size_t>(size)) < 0) _exit(kSegfaultExit + 1);
  _exit(kSegfaultExit);
}

inline void catch_segfaults() {
  struct sigaction action = {};
  action.sa_sigaction = report_segfault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

// Made and freed by the main thread alone.
class Guarded {
 public:
  Guarded(const char* name, int64_t size, size_t align, Guard guard) : bytes_(static_cast<size_t>(size)) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t room = (bytes_ + align + page - 1) / page * page;
    total_ = room + 2 * page;
    void* memory = mmap(nullptr, total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap");
    base_ = static_cast<char*>(memory);
    if (mprotect(base_ + page, room, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
    const size_t offset = guard == Guard::kAfter ? (room - bytes_) / align * align : 0;
    data_ = base_ + page + offset;
    for (LiveBuffer& slot : live) {
      if (slot.name != nullptr) continue;
      slot = {name, data_, bytes_, base_, base_ + total_};
      slot_ = &slot;
      return;
    }
    std::fputs("guarded.h: more buffers than `live` has slots for\n", stderr);
    std::exit(1);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    slot_->name = nullptr;
    munmap(base_, total_);
  }

  float* floats() const { return reinterpret_cast<float*>(data_); }
  int64_t count() const { return static_cast<int64_t>(bytes_ / 4); }
  size_t bytes() const { return bytes_; }
  void* data() const { return data_; }
  void fill(float value) const { std::fill(floats(), floats() + count(), value); }

 private:
  static void fail(const char* call) {
    std::perror(call);
    std::exit(1);
  }

  size_t bytes_, total_;
  char *base_, *data_;
  LiveBuffer* slot_;
};

}  // namespace native
