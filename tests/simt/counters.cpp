// SPDX-License-Identifier: MIT
// The hooks of -fsanitize=thread, and what the requests of warps cost.
//
// Shared memory has 32 banks of 4 bytes. A request of up to 4 bytes a lane is served for 32 lanes at a time, of 8 bytes
// for 16, of 16 bytes for 8 ("phases"); a phase takes as many wavefronts as the busiest bank has different words.
// Global memory is moved in sectors of 32 bytes. The ideal is one wavefront a phase, and no sector that is used in
// part.
#include "counters.h"

#include <algorithm>
#include <map>
#include <set>
#include <unordered_map>
#include <utility>

#include "state.h"

namespace simt {
namespace {

struct Access {
  std::vector<const void*> calls;
  const char* kernel;
  unsigned bytes;
  bool shared, write;
  auto operator<=>(const Access&) const = default;
};
struct Cost {
  uint64_t requests = 0, cost = 0, ideal = 0;
};
std::map<Access, Cost> costs;

struct Request {
  uint32_t lanes = 0;
  uint64_t address[32];
};
// What one place in the code has accessed since the warp last met.
struct Place {
  unsigned seen[32] = {};  // accesses of each lane
  std::vector<Request> requests;
};

struct Memory {
  uint64_t begin, end;
};
std::vector<Memory> counted;

std::unordered_map<const Warp*, std::map<Access, Place>> open;
std::unordered_map<const Thread*, std::vector<const void*>> calls;
std::set<const Thread*> paused_threads;
bool inside = false;  // a hook: the library's own code is not instrumented, but inline functions of it may be

Cost shared_cost(const Request& request, unsigned bytes) {
  Cost cost{1, 0, 0};
  const unsigned lanes = bytes <= 4 ? 32 : 128 / bytes;
  for (unsigned first = 0; first < 32; first += lanes) {
    std::set<uint64_t> words[32];
    bool any = false;
    for (unsigned lane = first; lane < first + lanes; ++lane) {
      if ((request.lanes >> lane & 1) == 0) continue;
      any = true;
      for (uint64_t word = request.address[lane] / 4; word <= (request.address[lane] + bytes - 1) / 4; ++word) {
        words[word % 32].insert(word);
      }
    }
    size_t most = 0;
    for (const auto& bank : words) most = std::max(most, bank.size());
    cost.cost += most;
    cost.ideal += any ? 1 : 0;
  }
  return cost;
}

Cost global_cost(const Request& request, unsigned bytes) {
  std::set<uint64_t> sectors, used;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((request.lanes >> lane & 1) == 0) continue;
    for (uint64_t byte = request.address[lane]; byte < request.address[lane] + bytes; ++byte) {
      sectors.insert(byte / 32);
      used.insert(byte);
    }
  }
  return {1, sectors.size(), (used.size() + 31) / 32};
}

void count(const void* address, unsigned bytes, bool write, const void* code) {
  if (running == nullptr || inside || paused_threads.count(running) != 0) return;
  inside = true;
  const auto at = reinterpret_cast<uint64_t>(address);
  uint32_t offset = 0;
  const bool shared = running->block->window.contains(address, &offset);
  const bool global = std::any_of(counted.begin(), counted.end(),
                                  [&](const Memory& memory) { return at >= memory.begin && at < memory.end; });
  if (shared || global) {
    Access access{{code}, kernel_name(), bytes, shared, write};
    const auto& stack = calls[running];
    access.calls.insert(access.calls.end(), stack.rbegin(), stack.rend());
    Place& place = open[running->warp][access];
    const unsigned k = place.seen[running->lane]++;
    if (k >= place.requests.size()) place.requests.resize(k + 1);
    place.requests[k].lanes |= 1u << running->lane;
    place.requests[k].address[running->lane] = shared ? offset : at;
  }
  inside = false;
}

}  // namespace

void close_requests(Warp& warp) {
  const auto found = open.find(&warp);
  if (found == open.end()) return;
  inside = true;
  for (const auto& [access, place] : found->second) {
    Cost& sum = costs[access];
    for (const Request& request : place.requests) {
      const Cost cost = access.shared ? shared_cost(request, access.bytes) : global_cost(request, access.bytes);
      sum.requests += cost.requests;
      sum.cost += cost.cost;
      sum.ideal += cost.ideal;
    }
  }
  open.erase(found);
  inside = false;
}

void pause_counting(bool paused) {
  if (paused) {
    paused_threads.insert(running);
  } else {
    paused_threads.erase(running);
  }
}

void count_memory(const void* begin, uint64_t bytes) {
  counted.push_back({reinterpret_cast<uint64_t>(begin), reinterpret_cast<uint64_t>(begin) + bytes});
}
void forget_memory() { counted.clear(); }

std::string take_counts() {
  std::string text = "[";
  for (const auto& [access, cost] : costs) {
    if (text.size() > 1) text += ", ";
    text += std::string("{\"kernel\": \"") + access.kernel + "\", \"space\": \"" +
            (access.shared ? "shared" : "global") + "\", \"operation\": \"" + (access.write ? "write" : "read") +
            "\", \"bytes\": " + std::to_string(access.bytes) + ", \"requests\": " + std::to_string(cost.requests) +
            ", \"cost\": " + std::to_string(cost.cost) + ", \"ideal\": " + std::to_string(cost.ideal) +
            ", \"calls\": [";
    for (size_t i = 0; i < access.calls.size(); ++i) {
      text += (i == 0 ? "" : ", ") + std::to_string(reinterpret_cast<uint64_t>(access.calls[i]));
    }
    text += "]}";
  }
  costs.clear();
  return text + "]";
}

}  // namespace simt

// --------------------------------------------------------------------------------------------------------------- hooks

using simt::count;

#define SIMT_HOOKS(bytes)                                                                             \
  void __tsan_read##bytes(void* p) { count(p, bytes, false, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* p) { count(p, bytes, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##bytes(void* p) { count(p, bytes, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* p) { count(p, bytes, true, __builtin_return_address(0)); } \
  void __tsan_volatile_read##bytes(void* p) { count(p, bytes, false, __builtin_return_address(0)); }  \
  void __tsan_volatile_write##bytes(void* p) { count(p, bytes, true, __builtin_return_address(0)); }

#define SIMT_ATOMIC_HOOKS(bits, type)                                                                      \
  type __tsan_atomic##bits##_load(const type* p, int) { return *p; }                                       \
  void __tsan_atomic##bits##_store(type* p, type value, int) { *p = value; }                               \
  type __tsan_atomic##bits##_exchange(type* p, type value, int) { return std::exchange(*p, value); }       \
  type __tsan_atomic##bits##_fetch_add(type* p, type value, int) { return std::exchange(*p, *p + value); } \
  int __tsan_atomic##bits##_compare_exchange_strong(type* p, type* expected, type value, int, int) {       \
    const bool equal = *p == *expected;                                                                    \
    if (equal) {                                                                                           \
      *p = value;                                                                                          \
    } else {                                                                                               \
      *expected = *p;                                                                                      \
    }                                                                                                      \
    return equal;                                                                                          \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void* call) {
  if (simt::running != nullptr) simt::calls[simt::running].push_back(call);
}
void __tsan_func_exit() {
  if (simt::running != nullptr && !simt::calls[simt::running].empty()) simt::calls[simt::running].pop_back();
}
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
void __tsan_read_range(void* p, unsigned long bytes) { count(p, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, unsigned long bytes) { count(p, bytes, true, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
SIMT_ATOMIC_HOOKS(8, uint8_t)
SIMT_ATOMIC_HOOKS(32, uint32_t)
SIMT_ATOMIC_HOOKS(64, uint64_t)
}
