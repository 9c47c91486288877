// SPDX-License-Identifier: MIT
// Counts what accesses cost: wavefronts of shared memory, sectors of global memory. Only in programs built with
// SIMT_COUNT: there the kernels' accesses call the hooks of -fsanitize=thread, which counters.cpp has instead of
// ThreadSanitizer's library.
#pragma once

#include <cstdint>
#include <string>

namespace simt {

struct Block;
struct Warp;

#ifdef SIMT_COUNT

// Global memory whose accesses count.
void count_memory(const void* begin, uint64_t bytes);
void forget_memory();
// A JSON array: an object for every place in a kernel that has accessed memory since the last call. "calls": addresses
// of the code, the access first, then whence its function was called, and so on.
std::string take_counts();

// The executor's part. Lanes of a warp that meet have left the accesses before behind: accesses of the same code, the
// k-th of each lane, were one request.
void close_requests(Warp& warp);
void pause_counting(bool paused);  // of the running thread: what it does now was counted before

#else

inline void count_memory(const void*, uint64_t) {}
inline void forget_memory() {}
inline std::string take_counts() { return "[]"; }
inline void close_requests(Warp&) {}
inline void pause_counting(bool) {}

#endif

}  // namespace simt
