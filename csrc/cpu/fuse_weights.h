// SPDX-License-Identifier: MIT
#pragma once

#include "core/fold.h"

namespace repvgg::cpu {

// Folds output channels [begin, end) of the block.
void fuse_weights(const FoldProblem& prob, int64_t begin, int64_t end);

}  // namespace repvgg::cpu
