// SPDX-License-Identifier: MIT
#include "ops/fuse_weights.h"

#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <string>

#include "cpu/fuse_weights.h"
#include "ops/packed.h"
#ifdef RVG_WITH_CUDA
#include "cuda/algos.h"
#endif

namespace repvgg::ops {
namespace {

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return ScalarType::Double;
    case DType::kFloat32: return ScalarType::Float;
    case DType::kFloat16: return ScalarType::Half;
    case DType::kBFloat16: return ScalarType::BFloat16;
  }
  throw std::runtime_error("unknown dtype");
}

// Absent tensors are empty ones, of any device: the first that is there says where the block lies.
const Tensor& first_present(const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors) {
    if (tensor.numel() > 0) return tensor;
  }
  return tensors.front();
}

// Folds on the device that `like` lies on, as the tensors of all problems do.
void fold(const std::vector<FoldProblem>& problems, const Tensor& like) {
  if (!like.is_cuda()) {
    for (const FoldProblem& prob : problems) {
      const int64_t grain = 1 + 32768 / (9 * prob.C);  // channels worth a thread
      torch::stable::parallel_for(0, prob.K, grain,
                                  [&](int64_t begin, int64_t end) { cpu::fuse_weights(prob, begin, end); });
    }
    return;
  }
#ifdef RVG_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  cuda::fuse_weights(problems.data(), static_cast<int>(problems.size()), current_stream(like.get_device_index()));
#else
  check(false, "fuse_weights: ", device_name(like),
        " tensors need CUDA kernels, which this build lacks: rebuild with REPVGG_CUDA_BUILD=cuda, or fuse on the CPU");
#endif
}

// The outputs of a checked problem, which then points to them.
std::tuple<Tensor, Tensor> allocate(FoldProblem& prob, const Tensor& like) {
  const std::array<int64_t, 4> size{prob.K, prob.C, 3, 3};
  Tensor weight = torch::stable::empty({size.data(), 4}, scalar_type(prob.weight_dtype), std::nullopt, like.device());
  Tensor bias = torch::stable::empty({size.data(), 1}, scalar_type(prob.bias_dtype), std::nullopt, like.device());
  prob.weight = weight.mutable_data_ptr();
  prob.bias = bias.mutable_data_ptr();
  return {weight, bias};
}

// A list of an operator that takes many blocks.
void check_entries(const char* op, const char* name, size_t got, int64_t expected) {
  check(static_cast<int64_t>(got) == expected, op, ": ", name, " must have ", expected,
        " entries for these tensors_per_block, got ", got);
}

// What f returns; with the number of the block in place of `prefix` where it throws.
template <class F>
auto numbered(const char* op, size_t block, const std::string& prefix, const F& f) {
  try {
    return f();
  } catch (const std::runtime_error& error) {
    const std::string message = error.what();
    fail(op, ": block ", block, ": ", message.rfind(prefix, 0) == 0 ? message.substr(prefix.size()) : message);
  }
}

// Many blocks, checked, with the tensors that their problems point to.
struct FoldBatch {
  std::vector<FoldProblem> problems;  // at least one
  std::vector<Tensor> weights, biases;
  std::vector<std::vector<Tensor>> inputs;  // kept: they may be contiguous copies
};

FoldBatch make_batch(const char* op, const std::vector<Tensor>& tensors, const std::vector<int64_t>& tensors_per_block,
                     const std::vector<double>& bn_eps, const std::vector<int64_t>& in_channels,
                     const std::vector<int64_t>& out_channels, const std::vector<int64_t>& groups,
                     std::optional<ScalarType> dtype, std::optional<ScalarType> bias_dtype) {
  const size_t n = tensors_per_block.size();
  check(n > 0, op, ": tensors_per_block must not be empty");
  int64_t count_tensors = 0, count_eps = 0;
  for (const int64_t count : tensors_per_block) {
    check(count >= 1, op, ": tensors_per_block must be at least 1, got ", count);
    count_tensors += count;
    count_eps += fold_batchnorms(count);
  }
  check_entries(op, "tensors", tensors.size(), count_tensors);
  check_entries(op, "bn_eps", bn_eps.size(), count_eps);
  check_entries(op, "in_channels", in_channels.size(), static_cast<int64_t>(n));
  check_entries(op, "out_channels", out_channels.size(), static_cast<int64_t>(n));
  check_entries(op, "groups", groups.size(), static_cast<int64_t>(n));

  FoldBatch batch;
  auto tensor = tensors.begin();
  auto eps = bn_eps.begin();
  for (size_t i = 0; i < n; ++i) {
    std::vector<Tensor>& inputs = batch.inputs.emplace_back(tensor, tensor + tensors_per_block[i]);
    const std::vector<double> block_eps(eps, eps + fold_batchnorms(tensors_per_block[i]));
    tensor += tensors_per_block[i];
    eps += fold_batchnorms(tensors_per_block[i]);
    batch.problems.push_back(numbered(op, i, "fuse_weights: ", [&] {
      return make_fold_problem(inputs, block_eps, in_channels[i], out_channels[i], groups[i], dtype, bias_dtype);
    }));
    const Tensor& mine = first_present(inputs);
    const Tensor& first = i == 0 ? mine : batch.weights.front();
    check(same_device(mine, first), op, ": block ", i, " must be on the device of block 0 (", device_name(first),
          "), got ", device_name(mine), "; fuse it in a call of its own");
    auto [weight, bias] = allocate(batch.problems.back(), mine);
    batch.weights.push_back(std::move(weight));
    batch.biases.push_back(std::move(bias));
  }
  return batch;
}

}  // namespace

std::tuple<Tensor, Tensor> fuse_weights(std::vector<Tensor> tensors, const std::vector<double>& bn_eps,
                                        int64_t in_channels, int64_t out_channels, int64_t groups,
                                        std::optional<ScalarType> dtype, std::optional<ScalarType> bias_dtype) {
  FoldProblem prob = make_fold_problem(tensors, bn_eps, in_channels, out_channels, groups, dtype, bias_dtype);
  const std::tuple<Tensor, Tensor> outputs = allocate(prob, first_present(tensors));
  fold({prob}, std::get<0>(outputs));
  return outputs;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> fuse_weights_batch(
    const std::vector<Tensor>& tensors, const std::vector<int64_t>& tensors_per_block,
    const std::vector<double>& bn_eps, const std::vector<int64_t>& in_channels,
    const std::vector<int64_t>& out_channels, const std::vector<int64_t>& groups, std::optional<ScalarType> dtype,
    std::optional<ScalarType> bias_dtype) {
  FoldBatch batch = make_batch("fuse_weights_batch", tensors, tensors_per_block, bn_eps, in_channels, out_channels,
                               groups, dtype, bias_dtype);
  fold(batch.problems, batch.weights.front());
  return {std::move(batch.weights), std::move(batch.biases)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> fuse_and_prepack(
    const std::vector<Tensor>& tensors, const std::vector<int64_t>& tensors_per_block,
    const std::vector<double>& bn_eps, const std::vector<int64_t>& in_channels,
    const std::vector<int64_t>& out_channels, const std::vector<int64_t>& groups, std::optional<ScalarType> dtype,
    std::optional<ScalarType> bias_dtype, const std::vector<int64_t>& input_sizes, const std::vector<int64_t>& strides,
    const std::string& algorithm, const std::string& memory) {
  const char* const op = "fuse_and_prepack";
  FoldBatch batch =
      make_batch(op, tensors, tensors_per_block, bn_eps, in_channels, out_channels, groups, dtype, bias_dtype);
  const size_t n = batch.problems.size();
  check_entries(op, "input_sizes", input_sizes.size(), 4 * static_cast<int64_t>(n));
  check_entries(op, "strides", strides.size(), static_cast<int64_t>(n));
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  const Tensor& first = batch.weights.front();
  if (first.is_cuda()) guard.emplace(first.get_device_index());

  std::vector<NewPacked> packed;
  for (size_t i = 0; i < n; ++i) {
    const std::vector<int64_t> size(&input_sizes[4 * i], &input_sizes[4 * i] + 4);
    packed.push_back(numbered(op, i, "prepack: ", [&] {
      return NewPacked(kPrepack, batch.weights[i], size, strides[i], groups[i], algorithm, memory);
    }));
    batch.problems[i].packed = packed.back().for_fold();
  }
  fold(batch.problems, first);
  for (size_t i = 0; i < n; ++i) {  // all launches come before the first wait
    if (batch.problems[i].packed == nullptr) packed[i].pack(batch.weights[i]);
  }
  std::vector<Tensor> finished;
  for (size_t i = 0; i < n; ++i) finished.push_back(packed[i].finish(batch.weights[i]));
  return {std::move(batch.weights), std::move(batch.biases), std::move(finished)};
}

}  // namespace repvgg::ops
