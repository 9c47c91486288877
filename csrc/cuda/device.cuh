// SPDX-License-Identifier: MIT
// THE SEAM: the only file of this folder with CUDA headers, launches or error codes. Kernels use the built-in
// variables,
// __shared__, __syncthreads() and what is declared here, so that a stand-in of this one header can run them on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace repvgg::cuda {

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

// Launches and reports a bad configuration at once; errors of the kernel itself surface at the next synchronisation.
template <class... Params, class... Args>
void launch_kernel(const char* name, void (*kernel)(Params...), unsigned grid, unsigned block, void* stream,
                   const Args&... args) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError(), name);
}

// Whether this binary holds code that the current device can run.
template <class... Params>
bool has_code(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return true;
  cudaGetLastError();  // a failed query must not be found by the next check
  return false;
}

}  // namespace repvgg::cuda
