// SPDX-License-Identifier: MIT
// AVX-512. With RVG_SPLIT_AVX512, for tests on machines that do not have it: the same source for whatever the compiler
// was told to compile for, which splits the vectors.
#include "core/winograd_points.h"
#include "cpu/target.h"

#if defined(__x86_64__)
// Everything below is compiled for it, so nothing below may run before supported() said yes.
#if defined(RVG_SPLIT_AVX512)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif
#define RVG_INLINE __attribute__((always_inline)) inline
#define RVG_VECTOR_BYTES 64
#define RVG_VECTOR_REGISTERS 32
#define RVG_BLOCK_VECTORS 4

namespace repvgg::cpu::avx512 {
namespace {
#include "cpu/target.inl"
}  // namespace

}  // namespace repvgg::cpu::avx512

#if defined(RVG_SPLIT_AVX512)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace repvgg::cpu::avx512 {
#if defined(RVG_SPLIT_AVX512)
static bool supported() { return true; }
#else
static bool supported() { return __builtin_cpu_supports("avx512f"); }
#endif

extern const Target kTarget = make_target("avx512", supported);
}  // namespace repvgg::cpu::avx512
#endif  // __x86_64__
