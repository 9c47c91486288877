// SPDX-License-Identifier: MIT
// The cost model behind "auto": seconds of one thread, from rates measured on an AVX2 machine (docs/cpu.md). Only their
// ratios decide. The number of threads is not asked for: results must not depend on it.
#pragma once

#include "core/conv_algo.h"

namespace repvgg::cpu {

constexpr double kCallSeconds = 4e-6;        // of a row of ours
constexpr double kAtenCallSeconds = 12e-6;   // of F.conv2d through the dispatcher
constexpr double kProductsPerSecond = 42e9;  // multiply-adds of a register-blocked kernel with 8 lanes
constexpr double kPlanarProductsPerSecond = 30e9;
constexpr double kAtenProductsPerSecond = 34e9;
constexpr double kReorderBytesPerSecond = 6e9;  // dense <-> inner layout, read and written
constexpr double kStreamBytesPerSecond = 10e9;  // from memory
constexpr double kPackBytesPerSecond = 2.5e9;   // of packed weights

// Multiply-adds of the convolution with channels rounded up to `lanes`.
double products(const ConvProblem& prob, int lanes);

// Seconds of a row of the inner layout with so many multiply-adds. `touched`: bytes that its transforms read and write.
// Where weights are packed the layer is taken to stand in a chain, and not to pay for the change of layout.
double blocked_cost(const ConvProblem& prob, double multiply_adds, double touched, int64_t packed_bytes, bool packed);

double aten_cost(const ConvProblem& prob, const Device& device);

}  // namespace repvgg::cpu
