// SPDX-License-Identifier: MIT
// One layer, from the choice of its row to the launch: what conv3x3 does once and conv3x3_chain over and over.
#pragma once

#include <optional>
#include <string>

#include "ops/tensors.h"

namespace repvgg::ops {

// The table for "cpu" or "cuda"; empty for others, and for "cuda" in a build without it.
AlgoTable algos_for(const std::string& device_type);

const char* device_type(const Tensor& tensor);  // "cpu" or "cuda"
// What the rows need to know of a device at hand.
Device device_at(const std::string& device_type, int index);
Device device_of(const Tensor& tensor);

// The named row, nullptr for "aten". Throws std::runtime_error if it is unknown or refuses.
const ConvAlgo* named_algo(const Where& where, const AlgoTable& table, const ConvProblem& prob, const Device& device,
                           const std::string& algorithm, const std::string& device_type);

// A layer whose row is chosen.
struct Layer {
  ConvProblem prob;
  const ConvAlgo* algo;  // nullptr: aten
  const void* payload;   // its packed weights; nullptr: it reads them as they are, or they are packed for the call

  int64_t bytes_to_pack() const { return algo == nullptr || payload != nullptr ? 0 : algo->packed_bytes(prob); }
};

// `packed` decides if it is given, else `algorithm`.
Layer choose_layer(const Where& where, const ConvProblem& prob, const Tensor& weight,
                   const std::optional<Tensor>& packed, const std::string& algorithm);

// x [N, C, H, W] -> [N, K, P, Q] in the layout of the problem, or, with `any_layout`, in the one that the row writes.
Tensor run_layer(const Layer& layer, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                 bool any_layout = false);

Tensor empty_output(const ConvProblem& prob, const Tensor& x);

// Ask before calling: a call into torch costs more than a small layer's share of the work.
Tensor dense(const Tensor& tensor);
Tensor dense(const Tensor& x, Layout layout);

void parallel_for(int64_t n, const std::function<void(int64_t)>& f);

}  // namespace repvgg::ops
