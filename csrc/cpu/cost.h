// SPDX-License-Identifier: MIT
// The cost model behind "auto": seconds, from rates measured on an AVX2 machine with two cores (docs/cpu.md). Only
// their ratios decide.
#pragma once

#include "core/conv_algo.h"

namespace repvgg::cpu {

constexpr double kCallSeconds = 4e-6;        // of a row of ours, and of a task's share of threads
constexpr double kAtenCallSeconds = 12e-6;   // of F.conv2d through the dispatcher
constexpr double kProductsPerSecond = 42e9;  // multiply-adds of a register-blocked kernel with 8 lanes, per thread
constexpr double kPlanarProductsPerSecond = 30e9;
constexpr double kAtenProductsPerSecond = 34e9;
constexpr double kReorderBytesPerSecond = 6e9;  // dense <-> inner layout, read and written, per thread
constexpr double kStreamBytesPerSecond = 10e9;  // from memory, all threads
constexpr double kPackBytesPerSecond = 2.5e9;   // of packed weights, per thread

// Multiply-adds of the convolution with channels rounded up to `lanes`.
double products(const ConvProblem& prob, int lanes);

// Seconds of a row of the inner layout with so many multiply-adds, outside a chain. `touched`: bytes that its
// transforms read and write.
double blocked_cost(const ConvProblem& prob, const Device& device, double multiply_adds, double touched,
                    int64_t packed_bytes, bool packed);

double aten_cost(const ConvProblem& prob, const Device& device);

}  // namespace repvgg::cpu
