// SPDX-License-Identifier: MIT
// The Python module _C: what the build holds, and both kernels for arrays of any library that speaks DLPack.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <map>
#include <tuple>

#include "build_info.h"
#include "cpu/algos.h"
#include "ops/conv3x3.h"
#include "ops/dlpack.h"
#include "ops/fuse_weights.h"
#include "ops/layer.h"

namespace py = pybind11;
using torch::stable::Tensor;

namespace {

std::vector<std::string> algorithms(const std::string& device_type) {
  const repvgg::AlgoTable table = repvgg::ops::algos_for(device_type);
  std::vector<std::string> names;
  for (int i = 0; i < table.size; ++i) names.emplace_back(table.rows[i]->name);
  return names;
}

// Where a problem would run. index -1: no device at hand; of a GPU that is not, capability and multiprocessors.
struct Place {
  std::string device_type;
  int index;
  int capability = 0, multiprocessors = 0;

  repvgg::Device device() const {
    if (index >= 0) return repvgg::ops::device_at(device_type, index);
    const int threads = device_type == "cpu" ? static_cast<int>(torch::stable::get_num_threads()) : 1;
    return {false, index, threads, capability, multiprocessors};
  }
};

// A problem as Python describes it, and where it would run.
struct Query {
  repvgg::ConvProblem prob;
  repvgg::Device device;
  repvgg::AlgoTable table;

  const repvgg::ConvAlgo& row(const std::string& algorithm, const std::string& device_type) const {
    const repvgg::ConvAlgo* algo = table.find(algorithm.c_str());
    if (algo == nullptr) throw std::runtime_error("no algorithm '" + algorithm + "' on " + device_type);
    return *algo;
  }
};

Query make_query(const Place& place, const std::array<int64_t, 4>& x_shape, int64_t out_channels, int stride,
                 int groups, const std::string& dtype, bool channels_last, const std::string& activation) {
  using repvgg::DType;
  static const std::map<std::string, DType> dtypes = {{"float64", DType::kFloat64},
                                                      {"float32", DType::kFloat32},
                                                      {"float16", DType::kFloat16},
                                                      {"bfloat16", DType::kBFloat16}};
  const repvgg::ConvProblem prob = {x_shape[0],
                                    x_shape[1],
                                    x_shape[2],
                                    x_shape[3],
                                    out_channels,
                                    stride,
                                    groups,
                                    dtypes.at(dtype),
                                    channels_last ? repvgg::Layout::kNHWC : repvgg::Layout::kNCHW,
                                    repvgg::ops::parse_activation(activation)};
  return {prob, place.device(), repvgg::ops::algos_for(place.device_type)};
}

std::optional<std::string> text(repvgg::Refusal why) {
  return why == nullptr ? std::nullopt : std::optional<std::string>(why);
}

template <class... Problem>
std::optional<std::string> refusal(const std::string& algorithm, const std::string& device_type, int device_index,
                                   Problem... problem) {
  const Query query = make_query({device_type, device_index}, problem...);
  return text(query.row(algorithm, device_type).refuse(query.prob, query.device));
}

// Every field of repvgg::LaunchPlan by its name, and how many of x and y are converted around the launch; None where
// the row refuses the problem.
template <class... Problem>
std::optional<std::map<std::string, int64_t>> launch_plan(const std::string& algorithm, int capability,
                                                          int multiprocessors, Problem... problem) {
  const Query query = make_query({"cuda", -1, capability, multiprocessors}, problem...);
  const repvgg::ConvAlgo& algo = query.row(algorithm, "cuda");
  if (algo.refuse(query.prob, query.device) != nullptr || algo.plan == nullptr) return std::nullopt;
  const repvgg::LaunchPlan plan = algo.plan(query.prob, query.device);
  const bool planes = query.prob.layout == repvgg::Layout::kNCHW;
  const int converts = planes ? static_cast<int>(algo.layout != repvgg::RowLayout::kAsProblem) +
                                    static_cast<int>(algo.layout == repvgg::RowLayout::kNHWC)
                              : 0;
  return std::map<std::string, int64_t>{
      {"blocks", plan.blocks}, {"threads", plan.threads}, {"shared_bytes", plan.shared_bytes},
      {"tile_k", plan.tile_k}, {"tile_p", plan.tile_p},   {"tile_q", plan.tile_q},
      {"images", plan.images}, {"split", plan.split},     {"blocks_per_sm", plan.blocks_per_sm},
      {"converts", converts}};
}

// Name, refusal, predicted seconds, bytes of packed weights, whether "auto" takes it.
using Row = std::tuple<std::string, std::optional<std::string>, std::optional<double>, int64_t, bool>;

template <class... Problem>
std::vector<Row> explain(bool prepared, bool low_memory, const std::string& device_type, int device_index,
                         int capability, int multiprocessors, Problem... problem) {
  const auto [prob, device, table] = make_query({device_type, device_index, capability, multiprocessors}, problem...);
  const int64_t weight_bytes = prob.K * prob.group_C() * 9 * repvgg::ops::element_bytes(prob.dtype);
  const int64_t max_bytes = low_memory ? weight_bytes : std::numeric_limits<int64_t>::max();
  const repvgg::ConvAlgo* chosen = table.select(prob, device, prepared, max_bytes);
  std::vector<Row> rows;
  for (int i = 0; i < table.size; ++i) {
    const repvgg::ConvAlgo* algo = table.rows[i];
    const repvgg::Refusal why = algo->refuse(prob, device);
    const bool runs = why == nullptr;
    rows.emplace_back(algo->name, text(why), runs ? std::optional(algo->cost(prob, device, prepared)) : std::nullopt,
                      runs ? algo->packed_bytes(prob) : 0, algo == chosen);
  }
  const auto aten = table.size > 0 ? std::optional(table.aten_cost(prob, device)) : std::nullopt;
  rows.emplace_back("aten", std::nullopt, aten, 0, chosen == nullptr);
  return rows;
}

std::vector<std::string> cpu_targets() {
  std::vector<std::string> names;
  for (int i = 0; const char* name = repvgg::cpu::supported_target(i); ++i) names.emplace_back(name);
  return names;
}

// The result as an array of the library that x came from, where that library follows the array API standard.
py::object like(const py::object& x, Tensor result) {
  py::object array = py::cast(repvgg::ops::DLPackArray(std::move(result)));
  if (!py::hasattr(x, "__array_namespace__")) return array;
  return x.attr("__array_namespace__")().attr("from_dlpack")(array);
}

py::object conv3x3(const py::object& x, const py::object& weight, const std::optional<py::object>& bias, int64_t stride,
                   int64_t groups, const std::string& activation, const std::string& algorithm) {
  using repvgg::ops::from_dlpack;
  const auto borrowed_x = from_dlpack(x, "x"), borrowed_weight = from_dlpack(weight, "weight");
  std::optional<repvgg::ops::BorrowedTensor> borrowed_bias;
  std::optional<Tensor> bias_tensor;
  if (bias) {
    borrowed_bias = from_dlpack(*bias, "bias");
    bias_tensor = borrowed_bias->tensor;
  }
  const auto run = [&] {
    const py::gil_scoped_release release;
    return repvgg::ops::conv3x3(borrowed_x.tensor, borrowed_weight.tensor, bias_tensor, stride, groups, activation,
                                algorithm, std::nullopt);
  };
  return like(x, run());
}

py::tuple fuse_weights(const std::vector<std::optional<py::object>>& arrays, const std::vector<double>& bn_eps,
                       int64_t in_channels, int64_t out_channels, int64_t groups) {
  std::vector<repvgg::ops::BorrowedTensor> borrowed;
  std::optional<py::object> first;
  for (size_t i = 0; i < arrays.size(); ++i) {
    if (!arrays[i]) continue;
    if (!first) first = arrays[i];
    borrowed.push_back(repvgg::ops::from_dlpack(*arrays[i], ("arrays[" + std::to_string(i) + "]").c_str()));
  }
  repvgg::ops::check(first.has_value(), "fuse_weights: at least one branch must hold an array");
  std::vector<Tensor> tensors;
  size_t next = 0;
  const int64_t zero = 0;
  for (const auto& array : arrays) {
    tensors.push_back(array ? borrowed[next++].tensor
                            : torch::stable::empty({&zero, 1}, torch::headeronly::ScalarType::Float));
  }
  const auto run = [&] {
    const py::gil_scoped_release release;
    return repvgg::ops::fuse_weights(tensors, bn_eps, in_channels, out_channels, groups, std::nullopt, std::nullopt);
  };
  auto [weight, bias] = run();
  return py::make_tuple(like(*first, std::move(weight)), like(*first, std::move(bias)));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of repvgg_cuda. Importing it registers torch.ops.repvgg_cuda.*.";
  m.def("algorithms", &algorithms, py::arg("device_type"), "Names of the rows of a device's table, without 'aten'.");
  using Shape = std::array<int64_t, 4>;
  m.def("refusal", &refusal<Shape, int64_t, int, int, std::string, bool, std::string>, py::arg("algorithm"),
        py::arg("device_type"), py::arg("device_index"), py::arg("x_shape"), py::arg("out_channels"), py::arg("stride"),
        py::arg("groups"), py::arg("dtype"), py::arg("channels_last"), py::arg("activation"),
        "Why a row refuses a problem; None if it accepts. device_index -1: no device at hand.");
  m.def(
      "explain", &explain<Shape, int64_t, int, int, std::string, bool, std::string>, py::arg("prepared"),
      py::arg("low_memory"), py::arg("device_type"), py::arg("device_index"), py::arg("capability"),
      py::arg("multiprocessors"), py::arg("x_shape"), py::arg("out_channels"), py::arg("stride"), py::arg("groups"),
      py::arg("dtype"), py::arg("channels_last"), py::arg("activation"),
      "Every row and 'aten': name, refusal, predicted seconds, bytes of packed weights, whether 'auto' takes it. With "
      "device_index -1 capability (80 for 8.0) and multiprocessors describe a GPU that is not at hand; 0: unknown.");
  m.def("launch_plan", &launch_plan<Shape, int64_t, int, int, std::string, bool, std::string>, py::arg("algorithm"),
        py::arg("capability"), py::arg("multiprocessors"), py::arg("x_shape"), py::arg("out_channels"),
        py::arg("stride"), py::arg("groups"), py::arg("dtype"), py::arg("channels_last"), py::arg("activation"),
        "How a CUDA row would launch on such a GPU; None where it refuses.");
  m.def("build_info", [] { return std::string(RVG_BUILD_INFO); }, "How this module was built, as JSON.");
  m.def("cpu_targets", &cpu_targets, "Instruction sets that the CPU kernels are compiled for and this machine has.");
  m.def("cpu_multiply_adds", &repvgg::cpu::multiply_adds, py::arg("rounds"), py::call_guard<py::gil_scoped_release>(),
        "Multiply-adds in registers and nothing else, in one thread, for the ceiling. Returns their operations.");
  m.def("cpu_target", [] { return std::string(repvgg::cpu::target_name()); }, "The one of them that runs.");

  py::class_<repvgg::ops::DLPackArray>(m, "DLPackArray", "A result for any library: pass it to its from_dlpack().")
      .def(
          "__dlpack__",
          [](const repvgg::ops::DLPackArray& self, const py::object&, const py::object& max_version, const py::object&,
             const py::object&) { return self.dlpack(max_version); },
          py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
          py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__", &repvgg::ops::DLPackArray::device);

  m.def("conv3x3", &conv3x3, py::arg("x"), py::arg("weight"), py::arg("bias") = py::none(), py::kw_only(),
        py::arg("stride") = 1, py::arg("groups") = 1, py::arg("activation") = "identity", py::arg("algorithm") = "auto",
        "repvgg_cuda.conv3x3 for arrays of any library that speaks DLPack; NumPy and CuPy arrays come back as such.");
  m.def("fuse_weights", &fuse_weights, py::arg("arrays"), py::arg("bn_eps"), py::arg("in_channels"),
        py::arg("out_channels"), py::arg("groups") = 1,
        "Folds a block given as six arrays or None per branch (kernel, bias, BatchNorm weight, bias, mean, var), and "
        "four "
        "more for a BatchNorm on the sum. Returns (weight, bias).");
}
