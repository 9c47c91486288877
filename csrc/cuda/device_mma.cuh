// SPDX-License-Identifier: MIT
// Part of device.cuh: tensor cores, and the 8x8 matrices that they work on.
//
// Fragment layouts are those of the PTX ISA, "Matrix fragments for mma.m16n8k16" and its neighbours. With g = lane / 4,
// t = lane % 4, and e elements in a 32-bit register (2 of 16 bits, 1 of tf32, 4 of 8 bits), K = 8 e in halves of 4 e:
//   A [16, K]  a[0]: row g, first half, elements e t ...   a[1]: row g + 8   a[2], a[3]: the same of the second half
//   B [K, 8]   b0: column g, first half, elements e t ...  b1: second half
//   D [16, 8]  d[0], d[1]: row g, columns 2 t, 2 t + 1     d[2], d[3]: row g + 8
#pragma once

#include "cuda/device.cuh"

namespace repvgg::cuda {

// Lane 8 i + j holds the address of row j of the i-th 8x8 matrix of 16-bit elements; lane l gets elements 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4 of each. Transposed: of column l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t& r0, uint32_t& r1, SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r0), "=r"(r1) : "r"(row) : "memory");
}
__device__ __forceinline__ void ldmatrix_x1(uint32_t& r0, SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r0) : "r"(row) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t& r0, uint32_t& r1, SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r0), "=r"(r1)
               : "r"(row)
               : "memory");
}

// Transposes an 8x8 matrix of 16-bit elements that lies in the warp as ldmatrix leaves it.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t matrix) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(matrix));
  return r;
}

enum class MmaType { kFloat16, kBFloat16, kTF32, kInt8 };

// Whether the tensor cores of the GPU that this is compiled for multiply the type: a kernel begins by asking, so that
// no code is made for GPUs on which its row refuses. kFloat16 runs from sm_75 on, the others from sm_80 on.
template <MmaType kType>
__device__ __forceinline__ bool can_multiply() {
#if __CUDA_ARCH__ >= 800
  return true;
#else
  return kType == MmaType::kFloat16;
#endif
}

// D += A B. Accumulators are float, int32_t for kInt8. Does nothing where the type cannot be multiplied.
template <MmaType kType>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(kType != MmaType::kInt8, "8-bit products are summed in int32_t");
#if __CUDA_ARCH__ >= 800
#define RVG_MMA(shape_and_types)                                 \
  asm volatile("mma.sync.aligned." shape_and_types               \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
               "{%0, %1, %2, %3};"                               \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (kType == MmaType::kFloat16) RVG_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  if constexpr (kType == MmaType::kBFloat16) RVG_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  if constexpr (kType == MmaType::kTF32) RVG_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
#undef RVG_MMA
#elif __CUDA_ARCH__ >= 750
#define RVG_MMA(a0, a1, b)                                                                                            \
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                       \
               : "r"(a0), "r"(a1), "r"(b))
  if constexpr (kType == MmaType::kFloat16) {
    RVG_MMA(a[0], a[1], b0);
    RVG_MMA(a[2], a[3], b1);
  }
#undef RVG_MMA
#endif
}
__device__ __forceinline__ void mma_int8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Two floats rounded to nearest even into one register, `low` in the lower half.
template <MmaType kType>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  static_assert(kType == MmaType::kFloat16 || kType == MmaType::kBFloat16, "a 16-bit type");
  uint32_t bits;
  if constexpr (kType == MmaType::kFloat16) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

// A float rounded to tf32: to nearest, ties away from zero; the lower 13 bits are 0.
__device__ __forceinline__ uint32_t round_tf32(float value) {
  uint32_t bits = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#endif
  return bits;
}

}  // namespace repvgg::cuda
