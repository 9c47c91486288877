// SPDX-License-Identifier: MIT
// The packed weights of the tensor-core rows.
#pragma once

#include "core/conv_algo.h"

namespace repvgg::cuda {

int64_t mma_packed_bytes(const ConvProblem& prob);

// Packs OIHW weights with one launch; float32 is rounded to tf32, to nearest.
void mma_pack(const ConvProblem& prob, const PackArgs& args);

}  // namespace repvgg::cuda
