// SPDX-License-Identifier: MIT
// The border: torch::stable::Tensor in, plain structs out. Every check on a tensor is here, and says what repvgg_cuda's
// Python checks say (branches.py, reference.py), word for word.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/conv_algo.h"
#include "core/fold.h"

namespace repvgg::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Unlike STD_TORCH_CHECK, the message is the user's alone: one line, no file of ours.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape_name(const Tensor& tensor);   // "[2, 3, 4]"
std::string device_name(const Tensor& tensor);  // "cpu", "cuda:1"
std::string dtype_name(ScalarType dtype);       // "float32"
std::optional<DType> float_dtype(ScalarType dtype);

Activation parse_activation(const std::string& name);

// The checked problem. Throws std::runtime_error where the arguments disagree.
ConvProblem make_problem(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride,
                         int64_t groups, const std::string& activation);

// The checked block. Its arrays point into `tensors`, each made contiguous in place; weight and bias are left null.
FoldProblem make_fold_problem(std::vector<Tensor>& tensors, const std::vector<double>& bn_eps, int64_t in_channels,
                              int64_t out_channels, int64_t groups, std::optional<ScalarType> dtype,
                              std::optional<ScalarType> bias_dtype);

// dense channels_last and not dense NCHW as well: reference.output_format.
bool is_channels_last(const Tensor& x);

// cudaStream_t of torch's current stream on that CUDA device. Throws std::runtime_error in a torch without CUDA.
void* current_stream(int32_t device_index);

// Calls an ATen operator through the dispatcher. `stack` holds the arguments and receives the results. On failure
// throws std::runtime_error with ATen's own message.
void call_aten(const char* name, const char* overload, StableIValue* stack);

}  // namespace repvgg::ops
