// SPDX-License-Identifier: MIT
#include "ops/fuse_weights.h"

#include <torch/csrc/stable/accelerator.h>

#include <array>

#include "cpu/fuse_weights.h"
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

void fuse_weights_cuda(const FoldProblem& prob, const Tensor& weight) {
#ifdef RVG_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  cuda::fuse_weights(prob, current_stream(weight.get_device_index()));
#else
  check(false, "fuse_weights: ", device_name(weight),
        " tensors need CUDA kernels, which this build lacks: rebuild with REPVGG_CUDA_BUILD=cuda, or fuse on the CPU");
#endif
}

}  // namespace

std::tuple<Tensor, Tensor> fuse_weights(std::vector<Tensor> tensors, const std::vector<double>& bn_eps,
                                        int64_t in_channels, int64_t out_channels, int64_t groups,
                                        std::optional<ScalarType> dtype, std::optional<ScalarType> bias_dtype) {
  FoldProblem prob = make_fold_problem(tensors, bn_eps, in_channels, out_channels, groups, dtype, bias_dtype);
  const std::array<int64_t, 4> size{prob.K, prob.C, 3, 3};
  const auto device = tensors.front().device();
  Tensor weight = torch::stable::empty({size.data(), 4}, scalar_type(prob.weight_dtype), std::nullopt, device);
  Tensor bias = torch::stable::empty({size.data(), 1}, scalar_type(prob.bias_dtype), std::nullopt, device);
  prob.weight = weight.mutable_data_ptr();
  prob.bias = bias.mutable_data_ptr();

  if (weight.is_cuda()) {
    fuse_weights_cuda(prob, weight);
  } else {
    const int64_t grain = 1 + 32768 / (9 * prob.C);  // channels worth a thread
    torch::stable::parallel_for(0, prob.K, grain,
                                [&](int64_t begin, int64_t end) { cpu::fuse_weights(prob, begin, end); });
  }
  return {weight, bias};
}

}  // namespace repvgg::ops
