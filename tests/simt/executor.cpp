// SPDX-License-Identifier: MIT
// Launches, the schedule, barriers, collectives, fences.
#include "executor.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <span>

#include "counters.h"
#include "state.h"

namespace simt {

Thread* running = nullptr;

namespace {

struct Launch {
  const char* name = "";
  Shape shape = {};
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  unsigned next_block = 0;
  void* start = nullptr;       // acquired by every thread
  std::vector<void*> before;   // ends of earlier launches, acquired at the start
  std::vector<void*> overlap;  // acquired where the kernel waits for them
  void* end = nullptr;
  // A block has ended, or let the next launch start, before it waited for the launch before this one: the next one may
  // run beside both.
  bool early = false;
} current;

// The launches since the last synchronize, oldest first: their ends, what their threads read.
std::vector<void*> unfinished;
std::vector<std::shared_ptr<void>> contexts;
void* const device_fence = new_object();
std::vector<std::unique_ptr<Block>> all_slots;  // kept from launch to launch, with their threads
std::span<const std::unique_ptr<Block>> slots;  // of this launch
std::mt19937_64 generator;
bool block_ended = false;  // then the driver is next, which starts another one
size_t last_warp = 0;      // of all warps of all slots, in their order

Context& driver() {
  static Context context;
  return context;
}

// The slot keeps the threads of the largest block it ever had.
std::span<const std::unique_ptr<Thread>> threads_of(const Block& block) {
  return std::span(block.threads).first(current.shape.block);
}

size_t warps_per_block() { return (current.shape.block + 31) / 32; }
Warp& warp_at(size_t i) { return *slots[i / warps_per_block()]->warps[i % warps_per_block()]; }

bool same_line(const Where& a, const Where& b) {
  return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

bool chance(unsigned one_in) { return generator() % one_in == 0; }

// The runnable warp whose turn it is. A warp goes on until none of its lanes can.
Warp* next_warp() {
  const size_t count = slots.size() * warps_per_block();
  if (schedule.order == Order::kRandom) {
    if (warp_at(last_warp).runnable != 0 && !chance(4)) return &warp_at(last_warp);
    last_warp = generator() % count;
  }
  const size_t step = schedule.order == Order::kBackward ? count - 1 : 1;
  for (size_t i = 0, at = last_warp; i < count; ++i, at = (at + step) % count) {
    if (warp_at(at).runnable == 0) continue;
    last_warp = at;
    return &warp_at(at);
  }
  return nullptr;
}

Thread* next_lane(const Warp& warp) {
  uint32_t lanes = warp.runnable;
  if (schedule.order == Order::kForward) return warp.threads[__builtin_ctz(lanes)];
  if (schedule.order == Order::kBackward) return warp.threads[31 - __builtin_clz(lanes)];
  for (auto skip = generator() % static_cast<unsigned>(__builtin_popcount(lanes)); skip > 0; --skip) lanes &= lanes - 1;
  return warp.threads[__builtin_ctz(lanes)];
}

[[noreturn]] void report_deadlock() {
  for (const auto& slot : slots) {
    for (size_t w = 0; slot->alive > 0 && w < warps_per_block(); ++w) {
      const Warp& warp = *slot->warps[w];
      if (warp.open == 0) continue;
      const Gathering& one = *warp.gatherings[0];
      running = warp.threads[__builtin_ctz(one.arrived)];
      if (warp.open > 1) {
        const Gathering& other = *warp.gatherings[1];
        diagnose(one.where, "the warp diverges: %s (mask %08x, lanes %08x) meets %s (mask %08x, lanes %08x) of line %u",
                 one.what->name, one.mask, one.arrived, other.what->name, other.mask, other.arrived,
                 static_cast<unsigned>(other.where.line()));
      }
      diagnose(one.where,
               "deadlock: %s of lanes %08x waits for lanes %08x; %u of the block's %u threads wait at a barrier",
               one.what->name, one.mask, one.mask & warp.alive & ~one.arrived, slot->waiting, slot->alive);
    }
  }
  diagnose({}, "deadlock: nothing can run");
}

void resume(Thread& thread) {
  running = &thread;
  threadIdx = {thread.index, 0, 0};
  blockIdx = {thread.block->index, 0, 0};
  ++totals.switches;
}

void switch_from(Context& context) {
  Warp* warp = block_ended ? nullptr : next_warp();
  if (warp == nullptr) {
    if (!block_ended) report_deadlock();
    if (&context != &driver()) {
      running = nullptr;
      context.switch_to(driver());
    }
    return;
  }
  Thread& next = *next_lane(*warp);
  resume(next);
  if (&next.context != &context) context.switch_to(next.context);
}

void make_runnable(Thread& thread) { thread.warp->runnable |= 1u << thread.lane; }

void end_barrier(Block& block) {
  const Thread* first = nullptr;
  for (const auto& thread : threads_of(block)) {
    if (!thread->waits_at_barrier) continue;
    if (first != nullptr && !same_line(first->where, thread->where)) {
      running = thread.get();
      diagnose(thread->where, "divergent barriers: thread %u waits at the one in line %u", first->index,
               static_cast<unsigned>(first->where.line()));
    }
    first = thread.get();
  }
  if (block.alive != current.shape.block) {
    running = const_cast<Thread*>(first);
    diagnose(first->where, "%u of the block's %u threads have ended before this barrier",
             current.shape.block - block.alive, current.shape.block);
  }
  for (const auto& thread : threads_of(block)) {
    thread->waits_at_barrier = false;
    make_runnable(*thread);
  }
  for (const auto& warp : block.warps) close_requests(*warp);
  block.waiting = 0;
  ++block.barriers;
  ++totals.barriers;
}

LaneOrder& order_of(Warp& warp, uint32_t mask, Where where) {
  for (LaneOrder& order : warp.orders) {
    if (order.mask == mask) return order;
    if (order.mask != 0) continue;
    order.mask = mask;
    for (void*& object : order.objects) object = new_object();
    return order;
  }
  diagnose(where, "more than 8 different masks of __syncwarp in a warp");
}

// Does what the warp has gathered for, once every lane of it that is not gone has arrived.
bool try_complete(Warp& warp, unsigned i) {
  Gathering& done = *warp.gatherings[i];
  if ((done.mask & warp.alive & ~done.arrived) != 0) return false;
  if (done.what->aligned && done.arrived != 0xFFFFFFFFu) {
    diagnose(done.where, "%s by lanes %08x only: it takes the whole warp", done.what->name, done.arrived);
  }
  std::swap(warp.gatherings[i], warp.gatherings[--warp.open]);
  if (done.what->run != nullptr) done.what->run(done.lanes, done.arrived, done.where);
  if (done.what->orders) ++order_of(warp, done.mask, done.where).turn;
  if (done.arrived == warp.alive) close_requests(warp);
  warp.runnable |= done.arrived;
  ++totals.collectives;
  return true;
}

void end_thread() {
  Thread& thread = *running;
  Warp& warp = *thread.warp;
  Block& block = *thread.block;
  if (!thread.copies.empty()) {
    diagnose(thread.where, "the thread ends with %zu asynchronous copies that it never waited for",
             thread.copies.size());
  }
  release(current.end);
  warp.alive &= ~(1u << thread.lane);
  warp.runnable &= ~(1u << thread.lane);
  --block.alive;
  block_ended = block_ended || block.alive == 0;
  if (block.alive == 0 && !block.waited) current.early = true;
  if (warp.alive == 0) close_requests(warp);
  if (block.alive > 0 && block.waiting == block.alive) end_barrier(block);
  for (unsigned i = 0; i < warp.open;) i += try_complete(warp, i) ? 0 : 1;
}

void thread_main() {
  Context::entered();
  for (;;) {
    acquire(current.start);
    for (void* end : current.before) acquire(end);
    current.body(current.context);
    end_thread();
    switch_from(running->context);
  }
}

void prepare_slot(Block& block) {
  const unsigned threads = current.shape.block;
  while (block.threads.size() < threads) block.threads.push_back(std::make_unique<Thread>(thread_main));
  block.warps.clear();
  for (unsigned i = 0; i < threads; ++i) {
    if (i % 32 == 0) {
      block.warps.push_back(std::make_unique<Warp>());
      Warp& warp = *block.warps.back();
      warp.block = &block;
      for (int lane = 0; lane < 32; ++lane) warp.gatherings[lane] = &warp.pool[lane];
    }
    Thread& thread = *block.threads[i];
    thread.block = &block;
    thread.warp = block.warps.back().get();
    thread.index = i;
    thread.lane = i % 32;
    thread.warp->threads[thread.lane] = &thread;
  }
}

void begin_block(Block& block) {
  block.window.begin_block(current.shape.dynamic_shared);
  block.busy = true;
  block.index = current.next_block++;
  block.alive = current.shape.block;
  block.waiting = 0;
  block.waited = false;
  for (void*& order : block.order) order = new_object();
  block.fence = new_object();
  for (const auto& warp : block.warps) {
    warp->alive = warp->runnable = 0;
    for (LaneOrder& order : warp->orders) order = {};
  }
  for (const auto& thread : threads_of(block)) {
    thread->warp->alive |= 1u << thread->lane;
    thread->waits_at_barrier = false;
    thread->group = 0;
    make_runnable(*thread);
  }
  ++totals.blocks;
  totals.threads += block.alive;
}

void run_grid() {
  for (;;) {
    bool busy = false;
    for (const auto& slot : slots) {
      if (slot->busy && slot->alive == 0) {
        running = slot->threads[0].get();
        launches.back().shared = std::max(launches.back().shared, slot->window.bytes());
        slot->window.end_block(running->where);
        slot->busy = false;
      }
      if (!slot->busy && current.next_block < current.shape.grid) begin_block(*slot);
      busy = busy || slot->busy;
    }
    running = nullptr;
    // The blocks' threads see what the driver did to their memory.
    release(current.start);
    if (!busy) return;
    block_ended = false;
    switch_from(driver());
  }
}

}  // namespace

const char* kernel_name() { return current.name; }

void diagnose(Where where, const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "simt: ");
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (running != nullptr) {
    std::fprintf(stderr, "\n  kernel %s, block %u, thread %u (warp %u, lane %u)", current.name, running->block->index,
                 running->index, running->index / 32, running->lane);
  }
  std::fprintf(stderr, "\n  at %s:%u (%s)\n", where.file_name(), static_cast<unsigned>(where.line()),
               where.function_name());
  std::fflush(stderr);
  std::_Exit(kDiagnosed);
}

const char* launch(const char* name, Shape shape, void (*body)(void*), std::shared_ptr<void> context) {
  if (shape.grid < 1 || shape.grid > 0x7FFFFFFF || shape.block < 1 || shape.block > 1024 ||
      shape.dynamic_shared > 227 * 1024) {
    return "invalid configuration argument";
  }
  // Without overlap everything before has ended. With it, the launch just before may still run, and what that one did
  // not wait for.
  std::vector<void*> before = unfinished, overlap;
  if (shape.overlap && gpu.capability >= 90 && !unfinished.empty()) {
    if (current.early && !current.overlap.empty()) {
      before = current.before;
    } else {
      before.pop_back();
    }
    overlap = unfinished;
  }
  current = {name, shape, body, context.get(), 0, new_object(), before, overlap, new_object(), false};
  unfinished.push_back(current.end);
  contexts.push_back(std::move(context));
  gridDim = {shape.grid, 1, 1};
  blockDim = {shape.block, 1, 1};
  launches.push_back({name, shape.grid, shape.block, 0});
  generator.seed(schedule.seed);
  last_warp = 0;
  const size_t count = std::min(std::max(schedule.blocks_at_once, 1u), shape.grid);
  while (all_slots.size() < count) all_slots.push_back(std::make_unique<Block>());
  slots = std::span(all_slots).first(count);
  for (const auto& slot : slots) prepare_slot(*slot);
  run_grid();
  ++totals.launches;
  return nullptr;
}

void synchronize() {
  for (void* end : unfinished) acquire(end);
  unfinished.clear();
  contexts.clear();
}

void wait_for_previous() {
  running->block->waited = true;
  for (void* end : current.overlap) acquire(end);
}

void let_next_start() {
  if (!running->block->waited) current.early = true;
}

unsigned lane_index() { return running->lane; }

void wait_for_turn() { switch_from(running->context); }

void block_barrier(Where where) {
  Thread& thread = *running;
  Block& block = *thread.block;
  void* order = block.order[block.barriers % 2];
  release(order);
  thread.where = where;
  thread.waits_at_barrier = true;
  thread.warp->runnable &= ~(1u << thread.lane);
  if (++block.waiting == block.alive) end_barrier(block);
  wait_for_turn();
  acquire(order);
}

void collective(const Collective& what, uint32_t mask, void* lane, Where where) {
  Thread& thread = *running;
  Warp& warp = *thread.warp;
  const uint32_t me = 1u << thread.lane;
  thread.where = where;
  if ((mask & me) == 0) diagnose(where, "%s: the mask %08x lacks the calling lane", what.name, mask);
  // Lanes meet by what they do and with whom; instructions that are "aligned" only with themselves.
  unsigned i = 0;
  for (; i < warp.open; ++i) {
    const Gathering& other = *warp.gatherings[i];
    if (other.what != &what || other.mask != mask) continue;
    if (!what.aligned || same_line(other.where, where)) break;
  }
  Gathering& mine = *warp.gatherings[i];
  if (i == warp.open) {
    ++warp.open;
    mine.what = &what;
    mine.where = where;
    mine.mask = mask;
    mine.arrived = 0;
  }
  void* object = nullptr;
  if (what.orders) {
    LaneOrder& order = order_of(warp, mask, where);
    object = order.objects[order.turn % 2];
    release(object);
  }
  mine.arrived |= me;
  mine.lanes[thread.lane] = lane;
  warp.runnable &= ~me;
  try_complete(warp, i);
  wait_for_turn();
  if (what.orders) acquire(object);
}

// PTX: fence.sc operations are ordered, and each synchronizes with those behind it (section "Memory synchronization");
// __threadfence is one. Here the order is the one in which they run.
void fence(Scope scope) {
  void* const own = running->block->fence;
  for (void* object : {own, scope == Scope::kDevice ? device_fence : own}) {
    acquire(object);
    release(object);
  }
}

void before_atomic(Where where) {
  running->where = where;
  if (slots.size() > 1) wait_for_turn();  // another block may come first
}

}  // namespace simt
