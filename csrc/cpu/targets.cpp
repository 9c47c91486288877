// SPDX-License-Identifier: MIT
// The same source once per instruction set, each in its own namespace; which one runs is decided at run time.
#include "cpu/conv3x3_direct.h"

namespace repvgg::cpu {
namespace {

namespace baseline {  // SSE2 on x86-64, NEON on aarch64
#define RVG_VECTOR_BYTES 16
#define RVG_BLOCK_VECTORS 2
#include "cpu/simd.inl"
// The order matters: vectors before what is written over them.
#include "cpu/conv3x3_direct.inl"
#undef RVG_VECTOR_BYTES
#undef RVG_BLOCK_VECTORS
bool supported() { return true; }
}  // namespace baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define RVG_VECTOR_BYTES 32
#define RVG_BLOCK_VECTORS 2
#include "cpu/simd.inl"
// The order matters: vectors before what is written over them.
#include "cpu/conv3x3_direct.inl"
#undef RVG_VECTOR_BYTES
#undef RVG_BLOCK_VECTORS
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif
namespace avx512 {
#define RVG_VECTOR_BYTES 64
#define RVG_BLOCK_VECTORS 4
#include "cpu/simd.inl"
// The order matters: vectors before what is written over them.
#include "cpu/conv3x3_direct.inl"
#undef RVG_VECTOR_BYTES
#undef RVG_BLOCK_VECTORS
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

bool avx2_supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool avx512_supported() { return __builtin_cpu_supports("avx512f"); }
#endif  // __x86_64__

constexpr DirectTarget kTargets[] = {
    {"baseline", baseline::supported, baseline::kBlockVectors * baseline::kLanes, baseline::direct_run},
#if defined(__x86_64__)
    {"avx2", avx2_supported, avx2::kBlockVectors * avx2::kLanes, avx2::direct_run},
    {"avx512", avx512_supported, avx512::kBlockVectors * avx512::kLanes, avx512::direct_run},
#endif
};

}  // namespace

DirectTargets direct_targets() { return {kTargets, static_cast<int>(sizeof kTargets / sizeof *kTargets)}; }

}  // namespace repvgg::cpu
