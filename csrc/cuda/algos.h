// SPDX-License-Identifier: MIT
// What ops/ sees of this folder: plain C++, no CUDA header.
#pragma once

#include "core/conv_algo.h"
#include "core/fold.h"

namespace repvgg::cuda {

// In order of preference. F.conv2d ("aten", that is cuDNN) comes after the last row: it belongs to ops/.
AlgoTable algos();

// What the rows need to know of the GPU with this index. Throws std::runtime_error if it cannot be asked.
Device device(int index);

// Returns when what was launched on the stream has ended. Throws std::runtime_error if it failed.
void wait_for_stream(void* stream);

// The predicted time of F.conv2d in seconds, no measurement: of float32 the larger of its byte and FLOP floors on a
// current GPU, of 16-bit types mma_plan.h's model of an implicit GEMM. It is there to be compared with.
double aten_cost(const ConvProblem& prob, const Device& device);

// Folds n blocks on `stream`, with one launch for as many as a kernel's parameters describe (with CUDA 12.1 and later
// 67 blocks of three branches). With `packed` a block also gets, or only, what the pack of a row that folds_packed
// would make of its weight, bit for bit. Throws std::runtime_error if a launch fails.
void fuse_weights(const FoldProblem* problems, int n, void* stream);

}  // namespace repvgg::cuda
