// SPDX-License-Identifier: MIT
// What ops/ sees of this folder: plain C++, no CUDA header.
#pragma once

#include "core/conv_algo.h"
#include "core/fold.h"

namespace repvgg::cuda {

// In order of preference. F.conv2d ("aten", that is cuDNN) comes after the last row: it belongs to ops/.
AlgoTable algos();

// Folds the block with one launch on `stream`. Throws std::runtime_error if the launch fails.
void fuse_weights(const FoldProblem& prob, void* stream);

}  // namespace repvgg::cuda
