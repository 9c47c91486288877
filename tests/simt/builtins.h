// SPDX-License-Identifier: MIT
// What CUDA C++ has without a header: keywords, built-in variables, functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "executor.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// Of the running thread; the executor sets them at every switch.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define SIMT_MIN_MAX(type)                                  \
  inline type min(type a, type b) { return b < a ? b : a; } \
  inline type max(type a, type b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
T __ldg(const T* p) {
  return *p;
}

inline void __syncthreads(simt::Where where = simt::Where::current()) { simt::block_barrier(where); }
inline void __threadfence() { simt::fence(simt::Scope::kDevice); }
inline void __threadfence_block() { simt::fence(simt::Scope::kBlock); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, simt::Where where = simt::Where::current()) {
  simt::collective(simt::kSyncWarp, mask, nullptr, where);
}

namespace simt {

template <class T>
T shuffle(uint32_t mask, T value, unsigned source, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  ShuffleLane lane = {0, 0, source};
  std::memcpy(&lane.value, &value, sizeof value);
  collective(kShuffle, mask, &lane, where);
  std::memcpy(&value, &lane.result, sizeof value);
  return value;
}

inline uint32_t vote(const Collective& what, uint32_t mask, bool predicate, Where where) {
  VoteLane lane = {predicate, 0};
  collective(what, mask, &lane, where);
  return lane.result;
}

template <class T>
T* atomic(T* address, Where where) {
  check_aligned(address, sizeof *address, where);
  before_atomic(address, where);
  return address;
}

}  // namespace simt

// Segments of `width` lanes; a source outside of its segment is the lane itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Where where = simt::Where::current()) {
  const unsigned lane = simt::lane_index(), segment = lane & ~static_cast<unsigned>(width - 1);
  return simt::shuffle(mask, value, segment + (static_cast<unsigned>(source) & static_cast<unsigned>(width - 1)),
                       where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Where where = simt::Where::current()) {
  const unsigned lane = simt::lane_index(), place = lane & static_cast<unsigned>(width - 1);
  return simt::shuffle(mask, value, delta > place ? lane : lane - delta, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Where where = simt::Where::current()) {
  const unsigned lane = simt::lane_index(), place = lane & static_cast<unsigned>(width - 1);
  return simt::shuffle(mask, value, place + delta >= static_cast<unsigned>(width) ? lane : lane + delta, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, simt::Where where = simt::Where::current()) {
  const unsigned lane = simt::lane_index(), source = lane ^ static_cast<unsigned>(bits);
  const unsigned end = (lane & ~static_cast<unsigned>(width - 1)) + static_cast<unsigned>(width);
  return simt::shuffle(mask, value, source >= end ? lane : source, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return simt::vote(simt::kBallot, mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return static_cast<int>(simt::vote(simt::kAny, mask, predicate != 0, where));
}
inline int __all_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  return static_cast<int>(simt::vote(simt::kAll, mask, predicate != 0, where));
}

#define SIMT_ATOMIC_ADD(type)                                                                    \
  inline type atomicAdd(type* address, type value, simt::Where where = simt::Where::current()) { \
    return __atomic_fetch_add(simt::atomic(address, where), value, __ATOMIC_RELAXED);            \
  }
SIMT_ATOMIC_ADD(int)
SIMT_ATOMIC_ADD(unsigned)
SIMT_ATOMIC_ADD(unsigned long long)
#undef SIMT_ATOMIC_ADD
inline float atomicAdd(float* address, float value, simt::Where where = simt::Where::current()) {
  auto* word = reinterpret_cast<unsigned*>(simt::atomic(address, where));
  const unsigned old = __atomic_load_n(word, __ATOMIC_RELAXED);
  __atomic_store_n(word, __float_as_uint(__uint_as_float(old) + value), __ATOMIC_RELAXED);
  return __uint_as_float(old);
}
// Wraps to 0 after `most`.
inline unsigned atomicInc(unsigned* address, unsigned most, simt::Where where = simt::Where::current()) {
  unsigned* word = simt::atomic(address, where);
  const unsigned old = __atomic_load_n(word, __ATOMIC_RELAXED);
  __atomic_store_n(word, old >= most ? 0 : old + 1, __ATOMIC_RELAXED);
  return old;
}
inline unsigned atomicExch(unsigned* address, unsigned value, simt::Where where = simt::Where::current()) {
  return __atomic_exchange_n(simt::atomic(address, where), value, __ATOMIC_RELAXED);
}
inline unsigned atomicCAS(unsigned* address, unsigned expected, unsigned value,
                          simt::Where where = simt::Where::current()) {
  __atomic_compare_exchange_n(simt::atomic(address, where), &expected, value, false, __ATOMIC_RELAXED,
                              __ATOMIC_RELAXED);
  return expected;
}
