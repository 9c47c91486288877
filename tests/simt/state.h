// SPDX-License-Identifier: MIT
// The executor's own state, shared by its files.
#pragma once

#include <memory>
#include <vector>

#include "builtins.h"
#include "executor.h"
#include "fiber.h"

namespace simt {

struct Block;
struct Warp;

struct Thread {
  explicit Thread(void (*entry)()) : context(entry) {}
  Context context;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned index = 0, lane = 0;  // in the block, in the warp
  bool waits_at_barrier = false;
  Where where;  // what it waits for, or waited for last
  std::vector<Copy> copies;
  uint64_t group = 0;  // of the copies started now
};

// A warp collective that some lanes have reached.
struct Gathering {
  const Collective* what;
  Where where;
  uint32_t mask, arrived;
  void* lanes[32];
};

// The objects that lanes of a mask release and acquire, in turn: see Block::order.
struct LaneOrder {
  uint32_t mask = 0;
  unsigned turn = 0;
  void* objects[2] = {};
};

struct Warp {
  Block* block;
  uint32_t alive, runnable;  // lanes
  Thread* threads[32];
  // Those before `open` wait for lanes; each lane is in one of them at most. Fibers do not allocate here, nor copy
  // structures: ThreadSanitizer would take malloc and memcpy for accesses of theirs.
  Gathering* gatherings[32];
  unsigned open = 0;
  Gathering pool[32];
  LaneOrder orders[8];
};

struct Allocation {
  const void* site;  // nullptr: dynamic
  const char* name;
  uint32_t begin, bytes;
};

// A block's shared memory. Address 0 belongs to nobody; neither does what lies between the arrays.
class Window {
 public:
  Window();
  void begin_block(unsigned dynamic_bytes);
  void end_block(Where where);
  void* array(const void* site, const char* name, size_t bytes, Where where);
  char* dynamic(Where where);
  uint32_t offset(const void* pointer, Where where) const;
  char* pointer(uint32_t address, unsigned bytes, Where where) const;
  size_t bytes() const;  // of all arrays
  bool contains(const void* pointer, uint32_t* offset) const;
  // "byte 1028 of tile_x (1024 bytes)"
  void describe(uint32_t address, char* text, size_t size) const;

 private:
  Allocation& allocate(const void* site, const char* name, size_t bytes, size_t align);
  char* base_;
  uint32_t used_ = 0;
  std::vector<Allocation> allocations_;
};

// A slot for blocks of the grid, one after another.
struct Block {
  bool busy = false;
  bool waited = false;  // some thread has, for the launch before
  unsigned index = 0, alive = 0, waiting = 0;
  uint64_t barriers = 0;
  void* fence = nullptr;  // released and acquired by its threads' fences
  void* order[2] = {};  // of even and odd barriers: a fast thread's next release must not reach a slow thread's acquire
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  Window window;
};

extern Thread* running;  // nullptr: the driver
const char* kernel_name();

// Lets others run until this thread is runnable again.
void wait_for_turn();

}  // namespace simt
