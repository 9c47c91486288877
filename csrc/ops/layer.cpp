// SPDX-License-Identifier: MIT
#include "ops/layer.h"

#include <array>
#include <limits>

#include "cpu/algos.h"
#include "ops/packed.h"
#include "ops/scratch.h"
#ifdef RVG_WITH_CUDA
#include "cuda/algos.h"
#endif

namespace repvgg::ops {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::detail::from;
using torch::stable::detail::to;

MemoryFormat memory_format(Layout layout) {
  return layout == Layout::kNHWC ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
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
  if (is_channels_last(y) != (prob.layout == Layout::kNHWC)) {
    y = torch::stable::contiguous(y, memory_format(prob.layout));
  }
  if (prob.activation == Activation::kRelu) {
    StableIValue self = from(y);
    call_aten("aten::relu_", "", &self);
    to<Tensor>(self);  // takes the returned reference over
  }
  return y;
}

// CUDA rows copy 16 bytes at a time. A tensor begins at such an address unless it is a slice of another.
Tensor aligned(const Tensor& x) {
  constexpr uintptr_t kAlign = 16;
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kAlign == 0 ? x : torch::stable::clone(x);
}

std::string available(const AlgoTable& table) {
  std::string names;
  for (int i = 0; i < table.size; ++i) names += std::string(table.rows[i]->name) + ", ";
  return names + "aten";
}

}  // namespace

AlgoTable algos_for(const std::string& device_type) {
  if (device_type == "cpu") return cpu::algos();
#ifdef RVG_WITH_CUDA
  if (device_type == "cuda") return cuda::algos();
#endif
  return {nullptr, 0, nullptr};
}

const char* device_type(const Tensor& tensor) { return tensor.is_cuda() ? "cuda" : "cpu"; }

Device device_at(const std::string& device_type, int index) {
#ifdef RVG_WITH_CUDA
  if (device_type == "cuda") return cuda::device(index);
#endif
  return {true, index, device_type == "cpu" ? static_cast<int>(torch::stable::get_num_threads()) : 1};
}

Device device_of(const Tensor& tensor) { return device_at(device_type(tensor), tensor.get_device_index()); }

const ConvAlgo* named_algo(const Where& where, const AlgoTable& table, const ConvProblem& prob, const Device& device,
                           const std::string& algorithm, const std::string& device_type) {
  check(!algorithm.empty(), where, "algorithm must be 'auto' or a name from repvgg_cuda.algorithms(), got ''");
  if (algorithm == "aten") return nullptr;
  const ConvAlgo* algo = table.find(algorithm.c_str());
  if (algo == nullptr) {
    fail(where, "algorithm '", algorithm, "' is not available on ", device_type, "; available: ", available(table));
  }
  if (const Refusal why = algo->refuse(prob, device); why != nullptr) {
    fail(where, "algorithm '", algorithm, "' cannot run this: ", why, "; use algorithm='auto'");
  }
  return algo;
}

Layer choose_layer(const Where& where, const ConvProblem& prob, const Tensor& weight,
                   const std::optional<Tensor>& packed, const std::string& algorithm) {
  if (packed) {
    check(!algorithm.empty(), where, "algorithm must be 'auto' or a name from repvgg_cuda.algorithms(), got ''");
    const Packed opened = open_packed(where, *packed, weight, prob, algorithm);
    return {prob, opened.algo, opened.payload};
  }
  const AlgoTable table = algos_for(device_type(weight));
  const Device device = device_of(weight);
  if (algorithm != "auto") {
    return {prob, named_algo(where, table, prob, device, algorithm, device_type(weight)), nullptr};
  }
  return {prob, table.select(prob, device, /*packed=*/false, std::numeric_limits<int64_t>::max()), nullptr};
}

Tensor empty_output(const ConvProblem& prob, const Tensor& x) {
  const std::array<int64_t, 4> size{prob.N, prob.K, prob.P(), prob.Q()};
  return torch::stable::empty({size.data(), size.size()}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              memory_format(prob.layout));
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

Tensor dense(const Tensor& x, Layout layout) {
  return is_dense(x, layout) ? x : torch::stable::contiguous(x, memory_format(layout));
}

void parallel_for(int64_t n, const std::function<void(int64_t)>& f) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

Tensor run_layer(const Layer& layer, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                 bool any_layout) {
  const auto& [asked, algo, payload] = layer;
  if (algo == nullptr) return aten_conv3x3(x, weight, bias, asked);
  ConvProblem prob = asked, output = asked;
  if (algo->layout == RowLayout::kNHWC) prob.layout = Layout::kNHWC;
  if (algo->layout != RowLayout::kAsProblem) output.layout = Layout::kNHWC;
  if (prob.N == 0) return empty_output(any_layout ? output : asked, x);
  Tensor y = empty_output(output, x);

  // The dense copies live until the launch is queued; torch's allocator orders their memory on the same stream.
  const Tensor x_dense = x.is_cuda() ? aligned(dense(x, prob.layout)) : dense(x, prob.layout);
  std::optional<Tensor> weight_dense, bias_dense, cuda_workspace;
  if (payload == nullptr) weight_dense = dense(weight);
  if (bias) bias_dense = dense(*bias);
  const Device device = device_of(x);
  const int64_t pack_bytes = round_up(layer.bytes_to_pack(), kCacheLine);
  const int64_t bytes = pack_bytes + algo->workspace(prob, device);
  const Scratch scratch(x.is_cuda() ? 0 : bytes);
  char* workspace = scratch.data();
  if (x.is_cuda() && bytes > 0) {
    cuda_workspace = torch::stable::empty({&bytes, 1}, ScalarType::Byte, std::nullopt, x.device());
    workspace = static_cast<char*>(cuda_workspace->mutable_data_ptr());
  }
  const void* const weight_data = weight_dense ? weight_dense->const_data_ptr() : nullptr;
  void* const stream = x.is_cuda() ? current_stream(device.index) : nullptr;
  if (pack_bytes > 0) algo->pack(prob, {weight_data, workspace, stream, parallel_for});
  const DType bias_dtype = bias ? *float_dtype(bias->scalar_type()) : prob.dtype;
  algo->launch(prob, {x_dense.const_data_ptr(), weight_data, pack_bytes > 0 ? workspace : payload,
                      bias_dense ? bias_dense->const_data_ptr() : nullptr, bias_dtype, y.mutable_data_ptr(),
                      workspace + pack_bytes, stream, device, parallel_for, /*just_packed=*/pack_bytes > 0});
  return any_layout ? y : dense(y, asked.layout);
}

}  // namespace repvgg::ops
