// SPDX-License-Identifier: MIT
#include "ops/tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <array>

// Resolved where the running torch has them: the first in CUDA builds, the second from torch 2.13 on.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace repvgg::ops {

std::string shape_name(const Tensor& tensor) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << ']';
  return out.str();
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device:") + std::to_string(tensor.get_device_index());
}

std::string dtype_name(ScalarType dtype) {
  if (const auto known = float_dtype(dtype)) return repvgg::dtype_name(*known);
  switch (dtype) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return torch::headeronly::toString(dtype);
  }
}

std::optional<DType> float_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return std::nullopt;
  }
}

int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 8;
    case DType::kFloat32: return 4;
    default: return 2;
  }
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.device().type() == b.device().type() && a.get_device_index() == b.get_device_index();
}

std::ostream& operator<<(std::ostream& out, const Where& where) {
  out << where.op << ": ";
  return where.layer < 0 ? out : out << "layer " << where.layer << ": ";
}

namespace {

std::string size_name(int64_t N, int64_t C, int64_t H, int64_t W) {
  std::ostringstream out;
  out << '[' << N << ", " << C << ", " << H << ", " << W << ']';
  return out.str();
}

void check_weight_shape(const Where& where, const Tensor& weight) {
  if (weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3) return;
  fail(where, "weight must be [C_out, C_in / groups, 3, 3], got ", shape_name(weight),
       "; use F.conv2d for other kernel sizes");
}

void check_weight_like(const Where& where, const Tensor& x, const Tensor& weight) {
  if (weight.scalar_type() != x.scalar_type()) {
    fail(where, "weight must have the dtype of x (", dtype_name(x.scalar_type()), "), got ",
         dtype_name(weight.scalar_type()), "; convert one of them with .to()");
  }
  if (!same_device(weight, x)) {
    fail(where, "weight must be on the device of x (", device_name(x), "), got ", device_name(weight),
         "; move it with .to(x.device)");
  }
}

// Everything but types and devices.
void check_geometry(const Where& where, const ConvProblem& prob, int64_t group_C, int64_t stride, int64_t groups,
                    const Tensor& weight) {
  const auto [N, C, H, W] = std::array{prob.N, prob.C, prob.H, prob.W};
  if (stride != 1 && stride != 2) {
    fail(where, "stride must be 1 or 2, got ", stride, "; use F.conv2d for other strides");
  }
  if (groups < 1) fail(where, "groups must be at least 1, got ", groups);
  if (C < 1 || C % groups != 0 || prob.K < 1 || prob.K % groups != 0) {
    fail(where, "groups must divide C_in and C_out, got groups=", groups, ", C_in=", C, ", C_out=", prob.K);
  }
  if (group_C != C / groups) {
    fail(where, where.input, " has C_in=", C, " channels, but weight ", shape_name(weight), " with groups=", groups,
         " expects ", group_C * groups);
  }
  if (H < 1 || W < 1) fail(where, where.input, " must have H >= 1 and W >= 1, got ", size_name(N, C, H, W));
}

void check_bias(const Where& where, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const ScalarType dtype = x.scalar_type(), own = bias.scalar_type();
  if (bias.dim() != 1 || bias.size(0) != weight.size(0)) {
    fail(where, "bias must be [C_out] = [", weight.size(0), "], got ", shape_name(bias));
  }
  const bool wider = own == ScalarType::Float && (dtype == ScalarType::Half || dtype == ScalarType::BFloat16);
  if (own != dtype && !wider) {
    fail(where, "bias must have the dtype of x (", dtype_name(dtype),
         "), or float32 where x is float16 or bfloat16, got ", dtype_name(own), "; convert it with .to()");
  }
  if (!same_device(bias, x)) {
    fail(where, "bias must be on the device of x (", device_name(x), "), got ", device_name(bias),
         "; move it with .to(x.device)");
  }
}

}  // namespace

Activation parse_activation(const std::string& name) {
  check(name == "identity" || name == "relu", "conv3x3: activation must be one of identity, relu, got '", name, "'");
  return name == "relu" ? Activation::kRelu : Activation::kIdentity;
}

ConvProblem make_problem(const Where& where, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         int64_t stride, int64_t groups) {
  if (x.dim() != 4) {
    fail(where, "x must be [N, C_in, H, W], got ", x.dim(), " dimensions; add a batch dimension with x.unsqueeze(0)");
  }
  const std::optional<DType> dtype = float_dtype(x.scalar_type());
  if (!dtype) {
    fail(where, "x must be float64, float32, float16 or bfloat16, got ", dtype_name(x.scalar_type()),
         "; convert it with x.float()");
  }
  check_weight_shape(where, weight);
  check_weight_like(where, x, weight);
  const ConvProblem prob = {x.size(0),
                            x.size(1),
                            x.size(2),
                            x.size(3),
                            weight.size(0),
                            static_cast<int32_t>(stride),
                            static_cast<int32_t>(groups),
                            *dtype,
                            is_channels_last(x) ? Layout::kNHWC : Layout::kNCHW,
                            Activation::kIdentity};
  check_geometry(where, prob, weight.size(1), stride, groups, weight);
  if (bias) check_bias(where, x, weight, *bias);
  return prob;
}

ConvProblem next_problem(const Where& where, const ConvProblem& before, const Tensor& x, const Tensor& weight,
                         const std::optional<Tensor>& bias, int64_t stride, int64_t groups) {
  check_weight_shape(where, weight);
  check_weight_like(where, x, weight);
  const ConvProblem prob = {before.N,
                            before.K,
                            before.P(),
                            before.Q(),
                            weight.size(0),
                            static_cast<int32_t>(stride),
                            static_cast<int32_t>(groups),
                            before.dtype,
                            before.layout,
                            Activation::kIdentity};
  check_geometry(where, prob, weight.size(1), stride, groups, weight);
  if (bias) check_bias(where, x, weight, *bias);
  return prob;
}

ConvProblem make_problem(const Where& where, const std::vector<int64_t>& input_size, const Tensor& weight,
                         int64_t stride, int64_t groups) {
  check(input_size.size() == 4, where, "input_size must be [N, C_in, H, W], got ", input_size.size(), " numbers");
  const std::optional<DType> dtype = float_dtype(weight.scalar_type());
  check(dtype.has_value(), where, "weight must be float64, float32, float16 or bfloat16, got ",
        dtype_name(weight.scalar_type()), "; convert it with weight.float()");
  check(input_size[0] >= 0, where, "input_size must have N >= 0, got ", input_size[0]);
  check_weight_shape(where, weight);
  const ConvProblem prob = {input_size[0],
                            input_size[1],
                            input_size[2],
                            input_size[3],
                            weight.size(0),
                            static_cast<int32_t>(stride),
                            static_cast<int32_t>(groups),
                            *dtype,
                            Layout::kNCHW,
                            Activation::kIdentity};
  check_geometry(where, prob, weight.size(1), stride, groups, weight);
  return prob;
}

bool is_dense(const Tensor& x, Layout layout) {
  if (layout == Layout::kNCHW) return x.is_contiguous();
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {  // C, W, H, N: from the fastest to the slowest
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

bool is_channels_last(const Tensor& x) { return !x.is_contiguous() && is_dense(x, Layout::kNHWC); }

namespace {

constexpr size_t kTensorsPerBranch = 6, kTensorsPerBatchNorm = 4;  // branches.py has the same names

FoldArray fold_array(Tensor& tensor, const Tensor& first, const std::string& name, bool shape_ok,
                     const std::string& expected) {
  if (tensor.numel() == 0) return {nullptr, DType::kFloat32};
  check(shape_ok, "fuse_weights: ", name, " must be ", expected, ", got ", shape_name(tensor));
  const std::optional<DType> dtype = float_dtype(tensor.scalar_type());
  check(dtype.has_value(), "fuse_weights: ", name, " must be float64, float32, float16 or bfloat16, got ",
        dtype_name(tensor.scalar_type()), "; convert it with .float()");
  check(same_device(tensor, first), "fuse_weights: ", name, " must be on the device of the first tensor (",
        device_name(first), "), got ", device_name(tensor), "; move it with .to()");
  tensor = torch::stable::contiguous(tensor);
  return {tensor.const_data_ptr(), *dtype};
}

FoldArray fold_vector(Tensor& tensor, const Tensor& first, const std::string& name, int64_t K) {
  const bool shape_ok = tensor.dim() == 1 && tensor.size(0) == K;
  return fold_array(tensor, first, name, shape_ok, "[" + std::to_string(K) + "]");
}

FoldBatchNorm fold_batchnorm(Tensor* tensors, const Tensor& first, const std::string& where, double eps, int64_t K,
                             bool required) {
  const FoldBatchNorm bn = {fold_vector(tensors[0], first, where + ": BatchNorm weight", K),
                            fold_vector(tensors[1], first, where + ": BatchNorm bias", K),
                            fold_vector(tensors[2], first, where + ": BatchNorm mean", K),
                            fold_vector(tensors[3], first, where + ": BatchNorm var", K), eps};
  const bool together = bn.mean.present() == bn.var.present();
  const bool alone = !bn.mean.present() && !bn.weight.present() && !bn.bias.present();
  check(together && (bn.mean.present() || (alone && !required)), "fuse_weights: ", where,
        ": BatchNorm mean and var must be given together, and with its weight and bias");
  return bn;
}

FoldBranch fold_branch(Tensor* tensors, const Tensor& first, int i, double eps, int64_t K, int64_t C,
                       bool same_channels, int64_t in_channels) {
  const std::string where = "branch " + std::to_string(i);
  Tensor& kernel = tensors[0];
  FoldBranch branch = {};
  branch.kind = FoldKind::kIdentity;
  if (kernel.numel() == 0) {
    check(same_channels, "fuse_weights: ", where,
          ": kernel is an identity, which needs in_channels == out_channels, got ", in_channels, " and ", K);
  } else {
    const bool square =
        kernel.dim() == 4 && kernel.size(2) == kernel.size(3) && (kernel.size(2) == 3 || kernel.size(2) == 1);
    branch.kind = square && kernel.size(2) == 1 ? FoldKind::kConv1x1 : FoldKind::kConv3x3;
    const std::string size = "[" + std::to_string(K) + ", " + std::to_string(C) + ", ";
    branch.kernel = fold_array(kernel, first, where + ": kernel", square && kernel.size(0) == K && kernel.size(1) == C,
                               size + "3, 3] or " + size + "1, 1]");
  }
  branch.bias = fold_vector(tensors[1], first, where + ": bias", K);
  branch.bn = fold_batchnorm(tensors + 2, first, where, eps, K, /*required=*/false);
  return branch;
}

DType output_dtype(std::optional<ScalarType> dtype, ScalarType fallback) {
  const std::optional<DType> known = float_dtype(dtype.value_or(fallback));
  check(known.has_value(), "fuse_weights: dtype and bias_dtype must be float64, float32, float16 or bfloat16, got ",
        dtype_name(dtype.value_or(fallback)));
  return *known;
}

}  // namespace

int64_t fold_batchnorms(int64_t tensors) {
  constexpr int64_t kPerBranch = kTensorsPerBranch;
  return tensors / kPerBranch + (tensors % kPerBranch != 0 ? 1 : 0);
}

FoldProblem make_fold_problem(std::vector<Tensor>& tensors, const std::vector<double>& bn_eps, int64_t in_channels,
                              int64_t out_channels, int64_t groups, std::optional<ScalarType> dtype,
                              std::optional<ScalarType> bias_dtype) {
  const size_t n = tensors.size() / kTensorsPerBranch, rest = tensors.size() % kTensorsPerBranch;
  check(
      n >= 1 && (rest == 0 || rest == kTensorsPerBatchNorm),
      "fuse_weights: tensors must hold six per branch (kernel, bias, BatchNorm weight, bias, mean, var) and four more "
      "for a BatchNorm on the sum, got ",
      tensors.size());
  const size_t expected = n + (rest ? 1 : 0);
  check(bn_eps.size() == expected,
        "fuse_weights: bn_eps must have one entry per branch and one for a BatchNorm on the sum (", expected, "), got ",
        bn_eps.size());
  check(n <= kMaxBranches, "fuse_weights: a block must have 1 to ", kMaxBranches, " branches, got ", n);
  check(in_channels >= 1 && out_channels >= 1 && groups >= 1 && in_channels % groups == 0 && out_channels % groups == 0,
        "fuse_weights: groups must divide in_channels and out_channels, got groups=", groups,
        ", in_channels=", in_channels, ", out_channels=", out_channels);

  const Tensor* first = nullptr;         // the first tensor that is there
  const Tensor* first_kernel = nullptr;  // its dtype is the default of the weight
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel() == 0) continue;
    if (first == nullptr) first = &tensors[i];
    if (first_kernel == nullptr && i % kTensorsPerBranch == 0 && i < n * kTensorsPerBranch) first_kernel = &tensors[i];
  }
  check(first != nullptr, "fuse_weights: at least one branch must hold a tensor");
  const ScalarType default_dtype = (first_kernel ? first_kernel : first)->scalar_type();
  const Tensor reference = *first;  // by value: `tensors` is rewritten below

  FoldProblem prob = {};
  prob.K = out_channels;
  prob.C = in_channels / groups;
  prob.groups = static_cast<int32_t>(groups);
  prob.n_branches = static_cast<int32_t>(n);
  for (size_t i = 0; i < n; ++i) {
    prob.branches[i] = fold_branch(&tensors[i * kTensorsPerBranch], reference, static_cast<int>(i), bn_eps[i], prob.K,
                                   prob.C, in_channels == out_channels, in_channels);
  }
  if (rest) {
    prob.post_bn = fold_batchnorm(&tensors[n * kTensorsPerBranch], reference, "the sum", bn_eps[n], prob.K,
                                  /*required=*/true);
  }
  for (size_t i = 0; i < bn_eps.size(); ++i) {
    check(bn_eps[i] >= 0, "fuse_weights: bn_eps[", i, "] must be at least 0, got ", bn_eps[i]);
  }
  prob.weight_dtype = output_dtype(dtype, default_dtype);
  prob.bias_dtype = output_dtype(bias_dtype, dtype.value_or(default_dtype));
  return prob;
}

void* current_stream(int32_t device_index) {
  check(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA: install a CUDA build of torch");
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0,
        "cannot get the current stream of cuda:", device_index);
  return stream;
}

void call_aten(const char* name, const char* overload, StableIValue* stack) {
  if (torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION) == 0) return;
  const char* what =
      torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  throw std::runtime_error(what ? std::string(what) : std::string(name) + " failed; torch printed why");
}

}  // namespace repvgg::ops
