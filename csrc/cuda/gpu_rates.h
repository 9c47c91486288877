// SPDX-License-Identifier: MIT
// What the closed-form model of a kernel's time needs to know of a GPU, from data sheets and published microbenchmarks.
// No number here was measured with this code.
#pragma once

#include "core/conv_algo.h"

namespace repvgg::cuda {

struct GpuRates {
  int capability;       // and what follows it up to the next one
  int multiprocessors;  // which tells the GPUs of a capability apart
  double hertz;
  double mma_products;   // 16-bit products a clock and multiprocessor by mma.sync, summed in float32
  double gemm_products;  // the same as library kernels reach them: by wgmma on 9.0, tcgen05 on 10.0
  double memory_bytes;   // a second
  double l2_bytes;       // a clock and multiprocessor
  int shared_kib;        // of a multiprocessor
};

// A GPU with as many multiprocessors as no row of its capability is taken for the first of them. One pair of numbers is
// that of two GPUs: an H200 has the memory of an H100 here, which is 0.7 of its own; an RTX 4080 for laptops is an L4.
constexpr GpuRates kGpuRates[] = {
    {75, 40, 1.59e9, 512, 512, 320e9, 32, 64},        // T4
    {75, 68, 1.635e9, 256, 256, 616e9, 32, 64},       // RTX 2080 Ti: a GeForce sums in float32 at half the rate
    {80, 108, 1.41e9, 1024, 1024, 1555e9, 40, 164},   // A100
    {86, 72, 1.695e9, 512, 512, 600e9, 24, 100},      // A10
    {86, 82, 1.695e9, 256, 256, 936e9, 24, 100},      // RTX 3090
    {86, 84, 1.74e9, 512, 512, 696e9, 24, 100},       // A40
    {87, 16, 1.30e9, 512, 512, 205e9, 24, 164},       // Orin
    {89, 128, 2.52e9, 256, 256, 1008e9, 24, 100},     // RTX 4090
    {89, 58, 2.04e9, 512, 512, 300e9, 32, 100},       // L4
    {89, 142, 2.52e9, 512, 512, 864e9, 24, 100},      // L40S
    {90, 132, 1.755e9, 1290, 1900, 3350e9, 28, 228},  // H100 SXM
    {90, 114, 1.755e9, 1290, 1900, 2000e9, 28, 228},  // H100 PCIe
    {100, 148, 1.85e9, 1024, 4096, 8000e9, 28, 228},  // B200
    {120, 170, 2.40e9, 256, 256, 1792e9, 24, 100},    // RTX 5090
};

constexpr double kLaunchSeconds = 2.2e-6;  // of a kernel in a CUDA graph

inline GpuRates rates_of(const Device& device) {
  const GpuRates* found = device.capability > 0 ? &kGpuRates[0] : &kGpuRates[2];  // unknown: A100
  for (const GpuRates& each : kGpuRates) {
    const bool later = each.capability <= device.capability && each.capability > found->capability;
    if (later || (each.capability == found->capability && each.multiprocessors == device.multiprocessors)) {
      found = &each;
    }
  }
  GpuRates rates = *found;
  if (device.multiprocessors > 0) rates.multiprocessors = device.multiprocessors;
  return rates;
}

// float32 multiply-adds a clock and multiprocessor.
inline double float32_lanes(const Device& device) {
  return device.capability == 75 || device.capability == 80 || device.capability == 0 ? 64 : 128;
}

}  // namespace repvgg::cuda
