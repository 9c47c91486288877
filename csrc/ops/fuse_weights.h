// SPDX-License-Identifier: MIT
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ops/tensors.h"

namespace repvgg::ops {

std::tuple<Tensor, Tensor> fuse_weights(std::vector<Tensor> tensors, const std::vector<double>& bn_eps,
                                        int64_t in_channels, int64_t out_channels, int64_t groups,
                                        std::optional<ScalarType> dtype, std::optional<ScalarType> bias_dtype);

// Many blocks with one launch; the lists of their arguments one after another.
std::tuple<std::vector<Tensor>, std::vector<Tensor>> fuse_weights_batch(
    const std::vector<Tensor>& tensors, const std::vector<int64_t>& tensors_per_block,
    const std::vector<double>& bn_eps, const std::vector<int64_t>& in_channels,
    const std::vector<int64_t>& out_channels, const std::vector<int64_t>& groups, std::optional<ScalarType> dtype,
    std::optional<ScalarType> bias_dtype);

// The same, and each weight packed as prepack does. On a GPU one launch writes both, where the row allows it.
std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> fuse_and_prepack(
    const std::vector<Tensor>& tensors, const std::vector<int64_t>& tensors_per_block,
    const std::vector<double>& bn_eps, const std::vector<int64_t>& in_channels,
    const std::vector<int64_t>& out_channels, const std::vector<int64_t>& groups, std::optional<ScalarType> dtype,
    std::optional<ScalarType> bias_dtype, const std::vector<int64_t>& input_sizes, const std::vector<int64_t>& strides,
    const std::string& algorithm, const std::string& memory);

}  // namespace repvgg::ops
