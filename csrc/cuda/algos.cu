// SPDX-License-Identifier: MIT
// The CUDA table: the rows in order of preference.
#include <algorithm>

#include "cuda/algos.h"
#include "cuda/device.cuh"
#include "cuda/gpu_rates.h"
#include "cuda/mma_plan.h"

namespace repvgg::cuda {

extern const ConvAlgo kConv3x3Mma, kConv3x3Stem, kConv3x3Direct, kConv3x3DirectSplit, kConv3x3MmaTF32;

namespace {

// F.conv2d in float32, on the assumption that it fills the GPU: products at the rate of TF32, which PyTorch allows by
// default, or of Winograd F(2x2) with exact sums; then a pass for the bias and one for the activation.
double float32_seconds(const ConvProblem& prob, const Device& device) {
  constexpr double kWinogradGain = 1.5;
  const GpuRates gpu = rates_of(device);
  const double exact = kWinogradGain * float32_lanes(device),
               tf32 = device.capability >= 80 ? gpu.gemm_products / 2 : 0;
  const auto outputs = static_cast<double>(prob.N * prob.K * prob.P() * prob.Q());
  const auto inputs = static_cast<double>(prob.N * prob.C * prob.H * prob.W);
  const auto weights = static_cast<double>(prob.K * prob.group_C() * 9);
  const double products = 9 * outputs * static_cast<double>(prob.group_C());
  const double sums = products / (std::max(exact, tf32) * gpu.multiprocessors * gpu.hertz);
  return 3 * kLaunchSeconds + std::max(4 * (inputs + outputs + weights) / gpu.memory_bytes, sums) +
         2 * 2 * 4 * outputs / gpu.memory_bytes;
}

}  // namespace

double aten_cost(const ConvProblem& prob, const Device& device) {
  if (prob.dtype == DType::kFloat16 || prob.dtype == DType::kBFloat16) {
    return implicit_gemm_seconds(prob, device, /*passes=*/2);  // cuDNN, then the bias, then the activation
  }
  return float32_seconds(prob, device);
}

Device device(int index) {
  Device device{true, index, 1};
  describe_gpu(index, &device.capability, &device.multiprocessors);
  return device;
}

void wait_for_stream(void* stream) { synchronize_stream(stream); }

AlgoTable algos() {
  static const ConvAlgo* const rows[] = {&kConv3x3Mma, &kConv3x3Stem, &kConv3x3Direct, &kConv3x3DirectSplit,
                                         &kConv3x3MmaTF32};
  return {rows, static_cast<int>(sizeof rows / sizeof *rows), aten_cost};
}

}  // namespace repvgg::cuda
