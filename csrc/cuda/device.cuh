// SPDX-License-Identifier: MIT
// THE SEAM: the only file of this folder with CUDA headers, launches, error codes or PTX. A kernel uses the built-in
// variables and functions (threadIdx, __syncthreads, __syncwarp, __shfl_*_sync, __ballot_sync, __threadfence,
// atomicAdd, fmaf, min, max) and what is declared here, so that a stand-in of this one header can run it on a CPU.
//
// In three files, of which a kernel includes this one: launches and memory here, copies into shared memory in
// device_copies.cuh, tensor cores in device_mma.cuh.
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

#include "cuda/device_copies.cuh"
#include "cuda/device_mma.cuh"
