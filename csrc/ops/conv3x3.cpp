// SPDX-License-Identifier: MIT
#include "ops/conv3x3.h"

#include <torch/csrc/stable/accelerator.h>

#include <array>

#include "cpu/algos.h"
#ifdef RVG_WITH_CUDA
#include "cuda/algos.h"
#endif

namespace repvgg::ops {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::detail::from;
using torch::stable::detail::to;

MemoryFormat memory_format(const ConvProblem& prob) {
  return prob.layout == Layout::kNHWC ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// The last resort: F.conv2d, then the activation in place.
Tensor aten_conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const ConvProblem& prob) {
  const bool convert_bias = bias && bias->scalar_type() != x.scalar_type();
  const StableIValue aten_bias =
      convert_bias ? from(std::optional<Tensor>(torch::stable::to(*bias, x.scalar_type()))) : from(bias);
  const std::vector<int64_t> stride(2, prob.stride), ones(2, 1);
  std::array<StableIValue, 7> stack{
      from(x), from(weight), aten_bias, from(stride), from(ones), from(ones), from(static_cast<int64_t>(prob.groups))};
  call_aten("aten::conv2d", "", stack.data());
  Tensor y = to<Tensor>(stack[0]);
  if (is_channels_last(y) != (prob.layout == Layout::kNHWC)) y = torch::stable::contiguous(y, memory_format(prob));
  if (prob.activation == Activation::kRelu) {
    StableIValue self = from(y);
    call_aten("aten::relu_", "", &self);
    to<Tensor>(self);  // takes the returned reference over
  }
  return y;
}

std::string available(const AlgoTable& table) {
  std::string names;
  for (int i = 0; i < table.size; ++i) names += std::string(table.rows[i]->name) + ", ";
  return names + "aten";
}

// nullptr: aten.
const ConvAlgo* choose(const AlgoTable& table, const ConvProblem& prob, const Device& device,
                       const std::string& algorithm, const std::string& device_type) {
  if (algorithm == "auto") return table.select(prob, device);
  if (algorithm == "aten") return nullptr;
  const ConvAlgo* algo = table.find(algorithm.c_str());
  check(algo != nullptr, "conv3x3: algorithm '", algorithm, "' is not available on ", device_type,
        "; available: ", available(table));
  const Refusal why = algo->refuse(prob, device);
  check(why == nullptr, "conv3x3: algorithm '", algorithm, "' cannot run this: ", why ? why : "",
        "; use algorithm='auto'");
  return algo;
}

// Asks before calling: a call into torch costs more than a small layer's share of the work.
Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

void parallel_for(int64_t n, const std::function<void(int64_t)>& f) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace

AlgoTable algos_for(const std::string& device_type) {
  if (device_type == "cpu") return cpu::algos();
#ifdef RVG_WITH_CUDA
  if (device_type == "cuda") return cuda::algos();
#endif
  return {nullptr, 0};
}

Tensor conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride, int64_t groups,
               const std::string& activation, const std::string& algorithm) {
  const ConvProblem prob = make_problem(x, weight, bias, stride, groups, activation);
  check(!algorithm.empty(), "conv3x3: algorithm must be 'auto' or a name from repvgg_cuda.algorithms(), got ''");
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (x.is_cuda()) guard.emplace(x.get_device_index());
  const std::string device_type = x.is_cuda() ? "cuda" : "cpu";
  const Device device{true, x.get_device_index()};

  const ConvAlgo* algo = choose(algos_for(device_type), prob, device, algorithm, device_type);
  if (algo == nullptr) return aten_conv3x3(x, weight, bias, prob);

  const std::array<int64_t, 4> size{prob.N, prob.K, prob.P(), prob.Q()};
  Tensor y = torch::stable::empty({size.data(), size.size()}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                  memory_format(prob));
  if (prob.N == 0) return y;
  // The contiguous copies live until the launch is queued; torch's allocator orders their memory on the same stream.
  const Tensor x_dense = prob.layout == Layout::kNHWC ? x : dense(x);  // kNHWC says that x is dense
  const Tensor weight_dense = dense(weight);
  std::optional<Tensor> bias_dense;
  if (bias) bias_dense = dense(*bias);
  const int threads = x.is_cuda() ? 1 : static_cast<int>(torch::stable::get_num_threads());
  const int64_t workspace_bytes = algo->workspace(prob, threads);
  std::optional<Tensor> workspace;
  if (workspace_bytes > 0) {
    workspace = torch::stable::empty({&workspace_bytes, 1}, ScalarType::Byte, std::nullopt, x.device());
  }
  algo->launch(prob, {x_dense.const_data_ptr(), weight_dense.const_data_ptr(),
                      bias_dense ? bias_dense->const_data_ptr() : nullptr, y.mutable_data_ptr(),
                      workspace ? workspace->mutable_data_ptr() : nullptr,
                      x.is_cuda() ? current_stream(device.index) : nullptr, threads, parallel_for});
  return y;
}

}  // namespace repvgg::ops
