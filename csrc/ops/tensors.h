// SPDX-License-Identifier: MIT
// The border: torch::stable::Tensor in, plain structs out. Every check on a tensor is here, and says what repvgg_cuda's
// Python checks say (branches.py, reference.py), word for word.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <ostream>
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
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// On the path of every call write `if (!condition) fail(...)`: there the parts are not even built.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

std::string shape_name(const Tensor& tensor);   // "[2, 3, 4]"
std::string device_name(const Tensor& tensor);  // "cpu", "cuda:1"
std::string dtype_name(ScalarType dtype);       // "float32"
std::optional<DType> float_dtype(ScalarType dtype);
int64_t element_bytes(DType dtype);
bool same_device(const Tensor& a, const Tensor& b);

Activation parse_activation(const std::string& name);

// Whose arguments are wrong: what a message begins with.
struct Where {
  const char* op;
  int64_t layer = -1;       // of a chain
  const char* input = "x";  // what holds [N, C_in, H, W]
};
std::ostream& operator<<(std::ostream& out, const Where& where);  // "conv3x3: ", "conv3x3_chain: layer 2: "

// The checked problems, with no activation yet. Throw std::runtime_error where the arguments disagree.
// A layer of its own:
ConvProblem make_problem(const Where& where, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         int64_t stride, int64_t groups);
// The layer that reads what `before`, a checked layer on `x`'s device, writes:
ConvProblem next_problem(const Where& where, const ConvProblem& before, const Tensor& x, const Tensor& weight,
                         const std::optional<Tensor>& bias, int64_t stride, int64_t groups);
// A layer whose input is known by its size alone:
ConvProblem make_problem(const Where& where, const std::vector<int64_t>& input_size, const Tensor& weight,
                         int64_t stride, int64_t groups);

// How many entries of bn_eps a block with so many tensors has: one per branch, one for a BatchNorm on the sum.
int64_t fold_batchnorms(int64_t tensors);

// The checked block. Its arrays point into `tensors`, each made contiguous in place; weight and bias are left null.
FoldProblem make_fold_problem(std::vector<Tensor>& tensors, const std::vector<double>& bn_eps, int64_t in_channels,
                              int64_t out_channels, int64_t groups, std::optional<ScalarType> dtype,
                              std::optional<ScalarType> bias_dtype);

// dense channels_last and not dense NCHW as well: reference.output_format.
bool is_channels_last(const Tensor& x);

// Whether the elements of `x` [N, C, H, W] lie without gaps in the order of `layout`.
bool is_dense(const Tensor& x, Layout layout);

// cudaStream_t of torch's current stream on that CUDA device. Throws std::runtime_error in a torch without CUDA.
void* current_stream(int32_t device_index);

// Calls an ATen operator through the dispatcher. `stack` holds the arguments and receives the results. On failure
// throws std::runtime_error with ATen's own message.
void call_aten(const char* name, const char* overload, StableIValue* stack);

}  // namespace repvgg::ops
