// SPDX-License-Identifier: MIT
// AVX2 with FMA.
#include "core/winograd_points.h"
#include "cpu/target.h"

#if defined(__x86_64__)
// Everything below is compiled for it, so nothing below may run before supported() said yes.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define RVG_INLINE __attribute__((always_inline)) inline
#define RVG_VECTOR_BYTES 32
#define RVG_VECTOR_REGISTERS 16
#define RVG_BLOCK_VECTORS 2

namespace repvgg::cpu::avx2 {
namespace {
#include "cpu/target.inl"
}  // namespace

}  // namespace repvgg::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace repvgg::cpu::avx2 {
static bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

extern const Target kTarget = make_target("avx2", supported);
}  // namespace repvgg::cpu::avx2
#endif  // __x86_64__
