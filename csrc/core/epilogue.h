// SPDX-License-Identifier: MIT
// What happens to a finished sum: bias, then activation. Used by every kernel, CPU and CUDA.
#pragma once

#include <cmath>

#include "core/conv_problem.h"

namespace repvgg {

struct Epilogue {
  const float* bias;  // [K] or nullptr
  Activation activation;

  // One output channel's part, free of branches. ReLU is a floor of 0, the identity a floor of -infinity.
  struct Channel {
    float bias, floor;

    // The sum comes first, the bias is added to it last: one rounding order for all kernels. `<` is false for NaN, so a
    // NaN stays.
    RVG_HOST_DEVICE float operator()(float sum) const {
      const float v = sum + bias;
      return v < floor ? floor : v;
    }
  };

  RVG_HOST_DEVICE Channel channel(int64_t k) const {
    return {bias == nullptr ? 0.0f : bias[k], activation == Activation::kRelu ? 0.0f : -INFINITY};
  }
};

}  // namespace repvgg
