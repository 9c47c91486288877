// SPDX-License-Identifier: MIT
// THE SEAM: the only file of this folder with CUDA headers, launches, error codes or PTX. A kernel uses the built-in
// variables and functions (threadIdx, __syncthreads, __syncwarp, __shfl_*_sync, __ballot_sync, __threadfence,
// atomicAdd, fmaf, min, max) and what is declared here, so that a stand-in of this one header can run it on a CPU.
//
// Fragment layouts are those of the PTX ISA, "Matrix fragments for mma.m16n8k16" and its neighbours. With g = lane / 4,
// t = lane % 4, and e elements in a 32-bit register (2 of 16 bits, 1 of tf32, 4 of 8 bits), K = 8 e in halves of 4 e:
//   A [16, K]  a[0]: row g, first half, elements e t ...   a[1]: row g + 8   a[2], a[3]: the same of the second half
//   B [K, 8]   b0: column g, first half, elements e t ...  b1: second half
//   D [16, 8]  d[0], d[1]: row g, columns 2 t, 2 t + 1     d[2], d[3]: row g + 8
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/dtype.h"

namespace repvgg::cuda {

// ---------------------------------------------------------------------------------------------------- host: launches

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string message = std::string(what) + ": CUDA error: " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    message +=
        "; repvgg_cuda was built without code for this GPU: rebuild it with TORCH_CUDA_ARCH_LIST set to its "
        "compute capability";
  }
  throw std::runtime_error(message);
}

// What a kernel's parameters may take together.
constexpr int kMaxParameterBytes = CUDART_VERSION >= 12010 ? 32764 : 4096;

struct LaunchShape {
  unsigned grid, block;
  unsigned dynamic_shared = 0;  // bytes
  bool overlap =
      false;  // sm_90: may start before the launch before it has ended; the kernel calls wait_for_previous_kernel
};

// Launches and reports a bad configuration at once; errors of the kernel itself surface at the next synchronisation.
template <class... Params, class... Args>
void launch_kernel(const char* name, void (*kernel)(Params...), LaunchShape shape, void* stream, const Args&... args) {
  constexpr unsigned kSharedWithoutAsking = 48 * 1024;
  if (shape.dynamic_shared > kSharedWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.dynamic_shared), name);
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.grid);
  config.blockDim = dim3(shape.block);
  config.dynamicSmemBytes = shape.dynamic_shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = shape.overlap ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
}

// Fills memory of the device with zeros, in the order of the stream.
inline void fill_zero(void* memory, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)), "fill_zero");
}

// Whether this binary holds code that the current device can run.
template <class... Params>
bool has_code(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return true;
  cudaGetLastError();  // a failed query must not be found by the next check
  return false;
}

inline void synchronize_stream(void* stream) {
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "synchronize_stream");
}

// Compute capability of a GPU, as 10 * major + minor, and its number of multiprocessors.
inline void describe_gpu(int index, int* capability, int* multiprocessors) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "describe_gpu");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "describe_gpu");
  check(cudaDeviceGetAttribute(multiprocessors, cudaDevAttrMultiProcessorCount, index), "describe_gpu");
  *capability = 10 * major + minor;
}

// ------------------------------------------------------------------------------------------- device: shared memory

// An array in the block's shared memory: RVG_SHARED(float, tile, [64][32]); in place of the keyword, so that each block
// of a stand-in has its own.
#define RVG_SHARED(type, name, extents) __shared__ __align__(16) type name extents

// A byte of the block's shared memory. Cheaper to compute with than a pointer, and what the PTX below takes.
using SharedAddress = uint32_t;

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
__device__ __forceinline__ SharedAddress shared_address(const void* shared) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(shared));
}

// 16 bytes, of which the address must be a multiple.
__device__ __forceinline__ void load_shared_16(uint32_t (&r)[4], SharedAddress address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void store_shared_16(SharedAddress address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// ------------------------------------------------------------------------------------------- device: global memory

__device__ __forceinline__ void load_global_16(uint32_t (&r)[4], const void* p) {
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(p));
}
__device__ __forceinline__ void load_global_8(uint32_t& a, uint32_t& b, const void* p) {
  asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "l"(p));
}
// Of memory that this kernel writes: what a fence orders before it is seen.
__device__ __forceinline__ void load_global_16_written(uint32_t (&r)[4], const void* p) {
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(p)
               : "memory");
}
__device__ __forceinline__ void store_global_16(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void store_global_8(void* p, uint32_t a, uint32_t b) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void store_global_4(void* p, uint32_t a) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(a) : "memory");
}

// The same value. The compiler does not see that, so what is derived from it is computed again instead of being kept in
// registers through a loop.
__device__ __forceinline__ int computed_again(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Starts copying 16 bytes into shared memory; the bytes are there for the calling thread after the wait that covers
// their group, for the others after a barrier behind it. sm_75 has no asynchronous copy: there it is done at once.
__device__ __forceinline__ void copy_async_16(SharedAddress to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
  uint32_t r[4];
  load_global_16(r, from);
  store_shared_16(to, r[0], r[1], r[2], r[3]);
#endif
}
// The same with 4 bytes, of which both addresses must be a multiple; nothing where `wanted` is false. A condition that
// is the instruction's own leaves no branch around it.
__device__ __forceinline__ void copy_async_4_if(bool wanted, SharedAddress to, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %0, 0; @p cp.async.ca.shared.global [%1], [%2], 4; }" ::"r"(
                   static_cast<int>(wanted)),
               "r"(to), "l"(from)
               : "memory");
#else
  if (wanted) {
    const uint32_t value = __ldg(static_cast<const uint32_t*>(from));
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
  }
#endif
}
// Copies the first `bytes` (0 to 16) and fills the rest with zeros. Nothing is read where bytes is 0.
__device__ __forceinline__ void copy_async_16_or_zero(SharedAddress to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#else
  uint32_t r[4] = {0, 0, 0, 0};
  for (int i = 0; i < 4; ++i) {
    if (4 * i < bytes) r[i] = static_cast<const uint32_t*>(from)[i];
    if (4 * i + 2 == bytes) r[i] &= 0xFFFFu;
  }
  store_shared_16(to, r[0], r[1], r[2], r[3]);
#endif
}
// Ends the group of the copies that this thread has started since the last group.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until all but the newest kPending groups of this thread are complete.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Programmatic dependent launch (LaunchShape::overlap): what the launches before this one wrote may be read, and what
// they read may be overwritten, only after this.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel's blocks may start from here on (once every block of this one has called it or ended).
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ------------------------------------------------------------------------------------------- device: tensor cores

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

// D += A B. Accumulators are float, int32_t for kInt8. kFloat16 runs from sm_75 on, the others from sm_80 on: code for
// older GPUs compiles and does nothing, rows refuse them.
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

// Element i of an array of float32, float16 or bfloat16 as a float, exactly.
__device__ __forceinline__ float load_float(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == DType::kFloat16 ? __half2float(__ushort_as_half(bits))
                                  : __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ __forceinline__ uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }

}  // namespace repvgg::cuda
