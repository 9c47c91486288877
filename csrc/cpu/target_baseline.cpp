// SPDX-License-Identifier: MIT
// What every machine has: SSE2 on x86-64, NEON on aarch64.
#include "core/winograd_points.h"
#include "cpu/target.h"

#define RVG_INLINE __attribute__((always_inline)) inline
#define RVG_VECTOR_BYTES 16
#if defined(__aarch64__)
#define RVG_VECTOR_REGISTERS 32
#else
#define RVG_VECTOR_REGISTERS 16
#endif
#define RVG_BLOCK_VECTORS 2

namespace repvgg::cpu::baseline {
namespace {
#include "cpu/target.inl"
}  // namespace

static bool supported() { return true; }

extern const Target kTarget = make_target("baseline", supported);
}  // namespace repvgg::cpu::baseline
