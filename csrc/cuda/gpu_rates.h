// SPDX-License-Identifier: MIT
// What the closed-form model of a kernel's time needs to know of a GPU, from data sheets and published microbenchmarks.
// No number here was measured with this code.
#pragma once

#include "core/conv_algo.h"

namespace repvgg::cuda {

struct GpuRates {
  int capability;       // and what follows it up to the next row
  int multiprocessors;  // where the device does not say
  double hertz;
  double mma_products;   // 16-bit products a clock and multiprocessor by mma.sync, summed in float32
  double gemm_products;  // the same as library kernels reach them: by wgmma on 9.0, tcgen05 on 10.0
  double memory_bytes;   // a second
  double l2_bytes;       // a clock and multiprocessor
  int shared_kib;        // of a multiprocessor
};

constexpr GpuRates kGpuRates[] = {
    {75, 40, 1.59e9, 512, 512, 320e9, 32, 64},        // T4
    {80, 108, 1.41e9, 1024, 1024, 1555e9, 40, 164},   // A100
    {86, 84, 1.70e9, 512, 512, 760e9, 24, 100},       // A10
    {87, 16, 1.30e9, 512, 512, 205e9, 24, 164},       // Orin
    {89, 128, 2.52e9, 256, 256, 1008e9, 24, 100},     // RTX 4090, whose float32 sums run at half the rate
    {90, 132, 1.755e9, 1290, 1900, 3350e9, 28, 228},  // H100
    {100, 148, 1.85e9, 1024, 4096, 8000e9, 28, 228},  // B200
    {120, 170, 2.40e9, 256, 256, 1792e9, 24, 100},    // RTX 5090
};

constexpr double kLaunchSeconds = 2.2e-6;  // of a kernel in a CUDA graph

inline GpuRates rates_of(const Device& device) {
  GpuRates rates = kGpuRates[device.capability > 0 ? 0 : 1];  // unknown: A100
  for (const GpuRates& each : kGpuRates) {
    if (each.capability <= device.capability) rates = each;
  }
  if (device.multiprocessors > 0) rates.multiprocessors = device.multiprocessors;
  return rates;
}

// float32 multiply-adds a clock and multiprocessor.
inline double float32_lanes(const Device& device) {
  return device.capability == 75 || device.capability == 80 || device.capability == 0 ? 64 : 128;
}

}  // namespace repvgg::cuda
