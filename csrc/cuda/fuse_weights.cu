// SPDX-License-Identifier: MIT
#include "cuda/algos.h"
#include "cuda/fuse_weights.cuh"

namespace repvgg::cuda {

void fuse_weights(const FoldProblem& prob, void* stream) {
  launch_kernel("fuse_weights", fuse_weights_kernel, {static_cast<unsigned>(prob.K), kFuseThreads}, stream, prob);
}

}  // namespace repvgg::cuda
