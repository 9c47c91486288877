// SPDX-License-Identifier: MIT
// The op bodies: check, select, allocate, launch. library.cpp gives them to torch, module.cpp to NumPy and others.
#pragma once

#include <optional>
#include <string>

#include "ops/tensors.h"

namespace repvgg::ops {

Tensor conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride, int64_t groups,
               const std::string& activation, const std::string& algorithm);

// The table for "cpu" or "cuda"; empty for others, and for "cuda" in a build without it.
AlgoTable algos_for(const std::string& device_type);

}  // namespace repvgg::ops
