// SPDX-License-Identifier: MIT
// Folds a whole block with one launch: block k owns output channel k, its threads share the C * 9 taps.
#pragma once

#include "core/fold.h"
#include "cuda/device.cuh"

namespace repvgg::cuda {

constexpr int kFuseThreads = 128;
constexpr int kFuseBlocksPerSM = 8;  // 64 registers a thread
static_assert(kFuseThreads > kMaxBranches, "one thread per branch scale, and one for the sum's");

__global__ void __launch_bounds__(kFuseThreads, kFuseBlocksPerSM) fuse_weights_kernel(const FoldProblem prob) {
  RVG_SHARED(double, scales, [kMaxBranches + 1]);  // the last one belongs to the BatchNorm on the sum
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t k = blockIdx.x;

  if (thread < prob.n_branches) scales[thread] = fold_affine(prob.branches[thread].bn, k).scale;
  if (thread == kMaxBranches) {
    scales[kMaxBranches] = fold_affine(prob.post_bn, k).scale;
    store_double(prob.bias, prob.bias_dtype, k, fold_bias(prob, k));
  }
  __syncthreads();  // the scales are complete

  for (int64_t i = thread; i < prob.C * 9; i += kFuseThreads) {
    const int64_t c = i / 9;
    const double value = fold_weight(prob, scales, scales[kMaxBranches], k, c, static_cast<int>(i - c * 9));
    store_double(prob.weight, prob.weight_dtype, k * prob.C * 9 + i, value);
  }
}

}  // namespace repvgg::cuda
