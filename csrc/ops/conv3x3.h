// SPDX-License-Identifier: MIT
// The op bodies of the convolutions: check, choose, run. library.cpp gives them to torch, module.cpp to NumPy and
// others.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/tensors.h"

namespace repvgg::ops {

Tensor conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride, int64_t groups,
               const std::string& activation, const std::string& algorithm, const std::optional<Tensor>& packed);

// Consecutive layers: each reads what the one before it wrote. An empty tensor says "no bias", "not packed";
// activations are 0 identity, 1 relu; `algorithm` is for the layers that are not packed.
Tensor conv3x3_chain(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                     const std::vector<Tensor>& packed, const std::vector<int64_t>& strides,
                     const std::vector<int64_t>& groups, const std::vector<int64_t>& activations,
                     const std::string& algorithm);

}  // namespace repvgg::ops
