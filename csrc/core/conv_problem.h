// SPDX-License-Identifier: MIT
// What a 3x3 convolution is asked to do: extents and types, no pointers.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace repvgg {

enum class Layout : int32_t { kNCHW, kNHWC };
enum class Activation : int32_t { kIdentity, kRelu };

// x [N, C, H, W] * weight [K, C / groups, 3, 3] -> y [N, K, P, Q], zero padding 1.
// Invariants, checked once in ops/tensors.h: every extent >= 1 (N may be 0), stride is 1 or 2, groups divides C and K.
struct ConvProblem {
  int64_t N, C, H, W, K;
  int32_t stride, groups;
  DType dtype;
  Layout layout;  // of x and of y; the weight is OIHW
  Activation activation;

  RVG_HOST_DEVICE int64_t P() const { return (H - 1) / stride + 1; }
  RVG_HOST_DEVICE int64_t Q() const { return (W - 1) / stride + 1; }
  RVG_HOST_DEVICE int64_t group_C() const { return C / groups; }
  RVG_HOST_DEVICE int64_t group_K() const { return K / groups; }
};

}  // namespace repvgg
