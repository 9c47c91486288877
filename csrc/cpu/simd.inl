// SPDX-License-Identifier: MIT
// A vector of floats for the current target, on the compiler's vector extension: no intrinsics, every architecture.
// Included inside a namespace, after RVG_VECTOR_BYTES and RVG_VECTOR_REGISTERS were defined.

typedef float Vec __attribute__((vector_size(RVG_VECTOR_BYTES)));
typedef float VecUnaligned __attribute__((vector_size(RVG_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t VecIndex __attribute__((vector_size(RVG_VECTOR_BYTES)));

constexpr int kLanes = RVG_VECTOR_BYTES / 4;
constexpr int kRegisters = RVG_VECTOR_REGISTERS;

static inline Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }

static inline void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }

// All lanes v. Subtracting zero, unlike adding it, keeps -0: the compiler sees through it.
static inline Vec broadcast(float v) { return v - Vec{}; }

// The first `count` floats, then zeros. Reads no further.
static inline Vec load_first(const float* p, int64_t count) {
  Vec v = {};
  for (int64_t i = 0; i < count && i < kLanes; ++i) v[i] = p[i];
  return v;
}

// Keeps v in a register. Without it g++ loads v from memory again in each of its uses.
static inline void pin(Vec& v) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(v));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(v));
#endif
}

// Transposes a kLanes x kLanes matrix: each round interleaves the halves of the list.
static inline void transpose(Vec* v) {
  VecIndex low = {}, high = {};
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(v[i], v[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(v[i], v[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
}
