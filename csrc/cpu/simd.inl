// SPDX-License-Identifier: MIT
// A vector of floats for the current target, on the compiler's vector extension: no intrinsics, every architecture.
// Included inside a namespace, after RVG_VECTOR_BYTES was defined.

typedef float Vec __attribute__((vector_size(RVG_VECTOR_BYTES)));
typedef float VecUnaligned __attribute__((vector_size(RVG_VECTOR_BYTES), aligned(4), may_alias));

constexpr int kLanes = RVG_VECTOR_BYTES / 4;

static inline Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }

static inline void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
