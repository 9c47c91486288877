// SPDX-License-Identifier: MIT
// The CUDA table: the rows in order of preference.
#include <algorithm>

#include "cuda/algos.h"
#include "cuda/device.cuh"
#include "cuda/mma_plan.h"

namespace repvgg::cuda {

extern const ConvAlgo kConv3x3Mma, kConv3x3Stem, kConv3x3Direct, kConv3x3DirectSplit, kConv3x3MmaTF32;

double aten_cost(const ConvProblem& prob, const Device& device) {
  if (prob.dtype == DType::kFloat16 || prob.dtype == DType::kBFloat16) {
    return implicit_gemm_seconds(prob, device, /*passes=*/2);  // cuDNN, then the bias, then the activation
  }
  constexpr double kLaunch = 4e-6, kBytesPerSecond = 1e12, kFlopsPerSecond = 2e13;
  const auto outputs = static_cast<double>(prob.N * prob.K * prob.P() * prob.Q());
  const auto inputs = static_cast<double>(prob.N * prob.C * prob.H * prob.W);
  const auto weights = static_cast<double>(prob.K * prob.group_C() * 9);
  const double bytes = sizeof(float) * (inputs + outputs + weights);
  return kLaunch +
         std::max(bytes / kBytesPerSecond, 18 * outputs * static_cast<double>(prob.group_C()) / kFlopsPerSecond);
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
