// SPDX-License-Identifier: MIT
// What happens to a finished sum: bias, then activation. Used by every kernel, CPU and CUDA.
#pragma once

#include "core/conv_problem.h"

namespace repvgg {

struct Epilogue {
  const float* bias;  // [K] or nullptr
  Activation activation;

  // The sum comes first, the bias is added to it last: one rounding order for all kernels.
  RVG_HOST_DEVICE float operator()(float sum, int64_t k) const {
    const float v = bias == nullptr ? sum : sum + bias[k];
    return activation == Activation::kRelu && v < 0.0f ? 0.0f : v;  // `<` is false for NaN, so NaN stays
  }
};

}  // namespace repvgg
