// SPDX-License-Identifier: MIT
// Runs CUDA kernels on the CPU: one fiber per CUDA thread, on one OS thread. What kernels see of it is in
// cuda/device.cuh and builtins.h; a driver configures it here.
//
// A thread runs until it must wait for others (barrier, warp collective); then the schedule says who is next. So
// between two waits threads are as far apart as the program allows: what lacks a barrier reads NaN, not last year's
// luck.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <source_location>
#include <vector>

namespace simt {

using Where = std::source_location;  // of the kernel's line

// -------------------------------------------------------------------------------------------------------------- driver

enum class Order { kForward, kBackward, kRandom };

struct Schedule {
  Order order = Order::kForward;
  uint64_t seed = 0;            // of kRandom
  unsigned blocks_at_once = 1;  // of a grid; the others start as these end
};

struct Gpu {
  int capability = 80, multiprocessors = 108;
};

inline Schedule schedule;
inline Gpu gpu;

// What was done, for the driver's report.
struct Totals {
  uint64_t launches = 0, blocks = 0, threads = 0, barriers = 0, collectives = 0, switches = 0;
};
inline Totals totals;

struct LaunchRecord {
  const char* name;
  unsigned grid, block;
  size_t shared;  // bytes of a block, static and dynamic
};
inline std::vector<LaunchRecord> launches;  // the driver empties it

// Results of launches may be read, and their inputs overwritten, only after this.
void synchronize();

// Exit status of a diagnosis: a program that CUDA leaves undefined.
constexpr int kDiagnosed = 4;

// ------------------------------------------------------------------------------------------------------------- kernels

// Says which thread of which kernel did what where, and ends the process.
[[noreturn]] void diagnose(Where where, const char* format, ...) __attribute__((format(printf, 2, 3)));

struct Shape {
  unsigned grid, block, dynamic_shared;
  bool overlap;
};
// Runs body(context) in every thread; the context lives until the next synchronize. The text of the CUDA error, or
// nullptr.
const char* launch(const char* name, Shape shape, void (*body)(void*), std::shared_ptr<void> context);
// griddepcontrol.wait and .launch_dependents
void wait_for_previous();
void let_next_start();

void block_barrier(Where where);

enum class Scope { kBlock, kDevice };
void fence(Scope scope);
// Just before an atomic operation.
void before_atomic(Where where);

// The block's own array for this `site`, made on first use. A site is one RVG_SHARED in one instance of a template.
void* shared_array(const void* site, const char* name, size_t bytes, Where where);
char* dynamic_shared(Where where);
uint32_t shared_offset(const void* pointer, Where where);
// `bytes` bytes of the block's shared memory, of which the address must be a multiple.
char* shared_pointer(uint32_t address, unsigned bytes, Where where);
void check_aligned(const void* pointer, unsigned bytes, Where where);

// An asynchronous copy into shared memory, to be done by the thread that started it, when it waits for it.
struct Copy {
  char* to;
  const char* from;
  int bytes;  // the rest of `width` is zero
  int width;  // 4 or 16
  uint64_t group;
};
bool copies_are_asynchronous();
void start_copy(char* to, const void* from, int bytes, int width, Where where);
void commit_copies();
// Takes the next copy that a wait for all but the newest `pending` groups covers. False: there is none.
bool next_covered_copy(int pending, Copy* copy);

// One operation of a warp. The last thread to arrive does it for all, with what each one passed.
struct Collective {
  const char* name;
  void (*run)(void* const* lanes, uint32_t mask, Where where);
  bool aligned;  // all 32 lanes must execute the same instruction
  bool orders;   // memory accesses of the lanes, as __syncwarp does
};
extern const Collective kSyncWarp, kShuffle, kBallot, kAny, kAll, kLoadMatrix, kLoadMatrixTransposed, kMoveMatrix,
    kMmaFloat16, kMmaBFloat16, kMmaTF32, kMmaInt8;
void collective(const Collective& what, uint32_t mask, void* lane, Where where);

unsigned lane_index();

struct ShuffleLane {
  uint64_t value, result;
  unsigned source;  // lane
};
struct VoteLane {
  bool predicate;
  uint32_t result;
};
struct LoadMatrixLane {
  int matrices;
  uint16_t row[8];  // what the lane's address points to
  uint32_t* result;
};
struct MoveMatrixLane {
  uint32_t value, result;
};
struct MmaLane {
  void* d;  // 4 float or int32_t, in and out
  const uint32_t* a;
  uint32_t b[2];
};

}  // namespace simt
