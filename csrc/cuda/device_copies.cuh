// SPDX-License-Identifier: MIT
// Part of device.cuh: copies from global into shared memory, and launches that overlap.
#pragma once

#include "cuda/device.cuh"

namespace repvgg::cuda {

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
// Copies the first `bytes` (0 to 16, even) and fills the rest with zeros. Nothing is read where bytes is 0.
__device__ __forceinline__ void copy_async_16_or_zero(SharedAddress to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#else
  uint32_t r[4] = {0, 0, 0, 0};
  for (int i = 0; i < 8; ++i) {  // by halves of words: nothing behind the last byte is read
    if (2 * i < bytes) r[i / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(from)[i]) << i % 2 * 16;
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

}  // namespace repvgg::cuda
