// SPDX-License-Identifier: MIT
#include "ops/conv3x3.h"

#include <torch/csrc/stable/accelerator.h>

#include "cpu/chain.h"
#include "ops/layer.h"
#include "ops/scratch.h"

namespace repvgg::ops {
namespace {

using Guard = std::optional<torch::stable::accelerator::DeviceGuard>;

void enter(Guard& guard, const Tensor& x) {
  if (x.is_cuda()) guard.emplace(x.get_device_index());
}

// A chain's argument for one layer, where an empty tensor says "none".
std::optional<Tensor> given(const Tensor& tensor) {
  return tensor.numel() == 0 ? std::nullopt : std::optional<Tensor>(tensor);
}

void check_lengths(size_t layers, const std::vector<std::pair<const char*, size_t>>& lists) {
  check(layers > 0, "conv3x3_chain: weights must hold at least one layer, got none");
  for (const auto& [name, size] : lists) {
    check(size == layers, "conv3x3_chain: ", name, " must have one entry per layer (", layers, "), got ", size);
  }
}

Activation chain_activation(const Where& where, int64_t code) {
  if (code != 0 && code != 1) fail(where, "activation must be 0 (identity) or 1 (relu), got ", code);
  return code == 1 ? Activation::kRelu : Activation::kIdentity;
}

// How many layers from `begin` on run as one, in the inner layout: 0 or 1 where there is nothing to join.
int joined(const std::vector<Layer>& layers, size_t begin) {
  std::vector<cpu::ChainLayer> candidates;
  for (size_t i = begin; i < layers.size() && layers[i].algo != nullptr; ++i) {
    candidates.push_back({layers[i].prob, layers[i].algo, layers[i].payload, nullptr});
  }
  return candidates.empty() ? 0 : cpu::chain_length(candidates.data(), static_cast<int>(candidates.size()));
}

// Runs layers [begin, begin + n) as one. Weights that are not packed are packed into the workspace, for this call.
Tensor run_joined(const std::vector<Layer>& layers, size_t begin, size_t n, const Tensor& x,
                  const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  std::vector<cpu::ChainLayer> run;
  std::vector<Tensor> bias_dense;
  int64_t pack_bytes = 0;
  for (size_t i = begin; i < begin + n; ++i) {
    bias_dense.push_back(dense(biases[i]));
    const auto* bias = biases[i].numel() == 0 ? nullptr : static_cast<const float*>(bias_dense.back().const_data_ptr());
    run.push_back({layers[i].prob, layers[i].algo, layers[i].payload, bias});
    pack_bytes += round_up(layers[i].bytes_to_pack(), kCacheLine);
  }
  const int count = static_cast<int>(n), threads = device_of(x).threads;
  const Layout layout = layers[begin].prob.layout;
  const Scratch scratch(pack_bytes + cpu::chain_workspace(run.data(), count, threads));
  char* packed = scratch.data();
  for (size_t i = 0; i < n; ++i) {
    const int64_t bytes = layers[begin + i].bytes_to_pack();
    if (bytes == 0) continue;
    run[i].algo->pack(run[i].prob, {dense(weights[begin + i]).const_data_ptr(), packed, nullptr, parallel_for});
    run[i].packed = packed;
    packed += round_up(bytes, kCacheLine);
  }
  const Tensor x_dense = dense(x, layout);
  Tensor y = empty_output(layers[begin + n - 1].prob, x);
  cpu::run_chain(run.data(), count,
                 {static_cast<const float*>(x_dense.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr()),
                  layout, layout, scratch.data() + pack_bytes, threads, parallel_for});
  return y;
}

}  // namespace

Tensor conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride, int64_t groups,
               const std::string& activation, const std::string& algorithm, const std::optional<Tensor>& packed) {
  const Where where{"conv3x3"};
  ConvProblem prob = make_problem(where, x, weight, bias, stride, groups);
  prob.activation = parse_activation(activation);
  Guard guard;
  enter(guard, x);
  return run_layer(choose_layer(where, prob, weight, packed, algorithm), x, weight, bias);
}

Tensor conv3x3_chain(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                     const std::vector<Tensor>& packed, const std::vector<int64_t>& strides,
                     const std::vector<int64_t>& groups, const std::vector<int64_t>& activations,
                     const std::string& algorithm) {
  const size_t n = weights.size();
  check_lengths(n, {{"biases", biases.size()},
                    {"packed", packed.size()},
                    {"strides", strides.size()},
                    {"groups", groups.size()},
                    {"activations", activations.size()}});
  Guard guard;
  enter(guard, x);
  std::vector<Layer> layers;
  for (size_t i = 0; i < n; ++i) {
    const Where where{"conv3x3_chain", static_cast<int64_t>(i)};
    const std::optional<Tensor> bias = given(biases[i]), pack = given(packed[i]);
    const Activation activation = chain_activation(where, activations[i]);
    ConvProblem prob = i == 0 ? make_problem(where, x, weights[i], bias, strides[i], groups[i])
                              : next_problem(where, layers.back().prob, x, weights[i], bias, strides[i], groups[i]);
    prob.activation = activation;
    // Between 16-bit layers on a GPU tensors are channels_last.
    if (i > 0 && x.is_cuda() && x.element_size() == 2) prob.layout = Layout::kNHWC;
    layers.push_back(choose_layer(where, prob, weights[i], pack, pack ? "auto" : algorithm));
  }
  const Layout layout = layers.front().prob.layout;
  ConvProblem last = layers.back().prob;
  last.layout = layout;
  if (x.size(0) == 0) return empty_output(last, x);

  Tensor y = x;
  for (size_t i = 0; i < n;) {
    const int join = x.is_cuda() ? 0 : joined(layers, i);
    if (join > 1) {
      y = run_joined(layers, i, static_cast<size_t>(join), y, weights, biases);
      i += static_cast<size_t>(join);
    } else {
      // Each layer takes its input as the one before it left it.
      if (x.is_cuda()) layers[i].prob.layout = is_channels_last(y) ? Layout::kNHWC : Layout::kNCHW;
      y = run_layer(layers[i], y, weights[i], given(biases[i]), /*any_layout=*/x.is_cuda());
      ++i;
    }
  }
  return x.is_cuda() ? dense(y, layout) : y;
}

}  // namespace repvgg::ops
