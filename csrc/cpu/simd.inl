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
static inline void pin([[maybe_unused]] Vec& v) {
#if defined(RVG_SPLIT_AVX512) && RVG_VECTOR_BYTES == 64
  // There is no such register.
#elif defined(__x86_64__)
  asm volatile("" : "+v"(v));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(v));
#endif
}

// Transposes a kLanes x kLanes matrix: first the 4 x 4 blocks in themselves, whose shuffles stay within 16 bytes, then
// the blocks.
static RVG_INLINE void transpose(Vec* v) {
  VecIndex low = {}, high = {}, low_pair = {}, high_pair = {};
  for (int i = 0; i < kLanes; ++i) {
    const int block = i / 4 * 4, from = i % 2 * kLanes, pair = i % 4 / 2 * kLanes;
    low[i] = block + i % 4 / 2 + from;
    high[i] = low[i] + 2;
    low_pair[i] = block + i % 2 + pair;
    high_pair[i] = low_pair[i] + 2;
  }
#pragma GCC unroll 4
  for (int q = 0; q < kLanes; q += 4) {
    const Vec low01 = __builtin_shuffle(v[q], v[q + 1], low), high01 = __builtin_shuffle(v[q], v[q + 1], high);
    const Vec low23 = __builtin_shuffle(v[q + 2], v[q + 3], low), high23 = __builtin_shuffle(v[q + 2], v[q + 3], high);
    v[q] = __builtin_shuffle(low01, low23, low_pair);
    v[q + 1] = __builtin_shuffle(low01, low23, high_pair);
    v[q + 2] = __builtin_shuffle(high01, high23, low_pair);
    v[q + 3] = __builtin_shuffle(high01, high23, high_pair);
  }
#pragma GCC unroll 4
  for (int d = 4; d < kLanes; d *= 2) {
    VecIndex first = {}, second = {};
    for (int i = 0; i < kLanes; ++i) {
      first[i] = i & d ? i - d + kLanes : i;
      second[i] = i & d ? i + kLanes : i + d;
    }
#pragma GCC unroll 4
    for (int begin = 0; begin < kLanes; begin += 2 * d) {
#pragma GCC unroll 8
      for (int i = begin; i < begin + d; ++i) {
        const Vec a = v[i], b = v[i + d];
        v[i] = __builtin_shuffle(a, b, first);
        v[i + d] = __builtin_shuffle(a, b, second);
      }
    }
  }
}
