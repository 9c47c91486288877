// SPDX-License-Identifier: MIT
// Convolutions: rows of the table with their own packing, workspace, plan and launch.
#include <array>

#include "core/conv_algo.h"
#include "counters.h"
#include "cuda/algos.h"
#include "cuda/device.cuh"
#include "cuda/mma_plan.h"
#include "driver.h"

namespace simt_test {
namespace {

using repvgg::ConvAlgo;

struct ConvCase {
  ConvProblem prob;
  bool bias;
};

ConvCase conv_case(const std::vector<std::string>& part) {
  if (part.size() != 11) throw std::invalid_argument("a case has 11 parts");
  const auto extent = [&](size_t i) { return std::stoll(part[i]); };
  return {{extent(0), extent(1), extent(2), extent(3), extent(4), static_cast<int32_t>(extent(5)),
           static_cast<int32_t>(extent(6)), dtype_of(part[7]),
           choose<Layout>(part[8], {{"nchw", Layout::kNCHW}, {"nhwc", Layout::kNHWC}}),
           choose<repvgg::Activation>(
               part[9], {{"identity", repvgg::Activation::kIdentity}, {"relu", repvgg::Activation::kRelu}})},
          choose<bool>(part[10], {{"bias", true}, {"none", false}})};
}

bool is_named(const ConvAlgo& algo, const char* prefix) {
  return std::strncmp(algo.name, prefix, std::strlen(prefix)) == 0;
}

// A kernel was launched as the row's plan says.
std::string check_plan(const repvgg::LaunchPlan& plan) {
  std::string launched;
  for (const simt::LaunchRecord& launch : simt::launches) {
    if (launch.grid == plan.blocks && launch.block == static_cast<unsigned>(plan.threads) &&
        launch.shared == static_cast<size_t>(plan.shared_bytes)) {
      return "";
    }
    launched += "; launched: " + std::to_string(launch.grid) + " blocks of " + std::to_string(launch.block) +
                " threads and " + std::to_string(launch.shared) + " bytes";
  }
  return "the plan says " + std::to_string(plan.blocks) + " blocks of " + std::to_string(plan.threads) +
         " threads and " + std::to_string(plan.shared_bytes) + " bytes of shared memory" + launched;
}

void in_turn(int64_t n, const std::function<void(int64_t)>& f) {
  for (int64_t i = 0; i < n; ++i) f(i);
}

// How a row launches: as it chooses to, or with the tile that an option names.
struct Way {
  repvgg::cuda::MmaPlan forced;  // tile -1: none
  int64_t workspace_bytes;
  std::string text;  // for the report
};

// False: the row refuses the case, which is reported.
bool choose_way(const ConvAlgo& algo, const ConvProblem& prob, const repvgg::Device& device, const std::string& text,
                Way* way) {
  const char* why = algo.refuse(prob, device);
  if (why == nullptr && algo.layout == repvgg::RowLayout::kNHWC && prob.layout != Layout::kNHWC) {
    why = "x must be channels_last here: ops/ converts it for this row";
  }
  if (why == nullptr && options.tile >= 0 && is_named(algo, "mma")) {
    if (repvgg::cuda::mma_tile_fits(repvgg::cuda::kMmaTiles[options.tile], prob)) {
      way->forced = repvgg::cuda::plan_mma_tile(options.tile, options.split, prob, device);
    } else {
      why = "the tile does not fit";
    }
  }
  if (why != nullptr) {
    report(algo.name, text, std::string("\"refused\": \"") + why + "\"");
    return false;
  }
  const bool forced = way->forced.tile >= 0;
  way->workspace_bytes = forced ? way->forced.workspace_bytes() : algo.workspace(prob, device);
  const repvgg::LaunchPlan plan = algo.plan(prob, device);
  char tile[100];
  std::snprintf(tile, sizeof tile, ", \"threads\": %d, \"tile\": [%d, %d, %d], \"split\": %d", plan.threads,
                plan.tile_k, plan.tile_p, plan.tile_q, plan.split);
  way->text = forced ? ", \"forced_tile\": " + std::to_string(options.tile) : tile;
  return true;
}

// The first element that is not bit for bit the chain of fused multiply-adds.
std::string compare_chain(const Buffer& y, const std::vector<float>& chain) {
  for (int64_t i = 0; i < y.size(); ++i) {
    if (std::memcmp(y.floats() + i, &chain[static_cast<size_t>(i)], 4) == 0) continue;
    char text[120];
    std::snprintf(text, sizeof text, "y[%" PRId64 "]: got %a, the chain of fused multiply-adds gives %a", i, y.at(i),
                  double{chain[static_cast<size_t>(i)]});
    return text;
  }
  return "";
}

// What a network's stream has before a layer: it writes x, and reads what y held. A launch that may overlap with it has
// to wait before it touches either.
__global__ void previous_layer_kernel(const char* from, char* x, int64_t x_bytes, const char* y, int64_t y_bytes) {
  for (int64_t i = threadIdx.x; i < x_bytes; i += blockDim.x) x[i] = from[i];
  volatile char read = 0;
  for (int64_t i = threadIdx.x; i < y_bytes; i += blockDim.x) read = y[i];
  (void)read;
}

void run_previous_layer(const std::vector<char>& from, const Buffer& x, const Buffer& y) {
  x.poison();
  repvgg::cuda::launch_kernel("the previous layer", previous_layer_kernel, {1, 32}, nullptr, from.data(),
                              static_cast<char*>(x.data()), static_cast<int64_t>(x.bytes()),
                              static_cast<const char*>(y.data()), static_cast<int64_t>(y.bytes()));
}

// The first output that a NaN in one pixel of x did not reach though it should, or reached though it should not.
std::string compare_reach(const ConvProblem& prob, Layout y_layout, const std::array<int64_t, 4>& pixel,
                          const Buffer& with_nan, const std::vector<char>& without) {
  const int64_t P = prob.P(), Q = prob.Q(), bytes = element_size(prob.dtype);
  const auto [n, c, h, w] = pixel;
  for (int64_t i = 0; i < with_nan.size(); ++i) {
    const int64_t q = i % Q, p = i / Q % P, k = i / Q / P % prob.K, image = i / Q / P / prob.K;
    const bool sees = image == n && k / prob.group_K() == c / prob.group_C() && std::abs(p * prob.stride - h) <= 1 &&
                      std::abs(q * prob.stride - w) <= 1;
    const int64_t at = index(y_layout, prob.K, P, Q, image, k, p, q);
    const bool same = std::memcmp(static_cast<const char*>(with_nan.data()) + at * bytes, without.data() + at * bytes,
                                  static_cast<size_t>(bytes)) == 0;
    if (sees ? !std::isnan(with_nan.at(at)) : !same) {
      return "a NaN in a pixel " + std::string(sees ? "does not reach y[" : "reaches y[") + std::to_string(at) + "]";
    }
  }
  return "";
}

void run_row(const ConvAlgo& algo, const ConvCase& test, const std::string& text) {
  ConvProblem prob = test.prob;
  if (algo.layout == repvgg::RowLayout::kNHWC) prob.layout = Layout::kNHWC;
  const Layout y_layout = algo.layout == repvgg::RowLayout::kToNHWC ? Layout::kNHWC : prob.layout;
  std::snprintf(native::running, sizeof native::running, "%s, %s", algo.name, text.c_str());
  const repvgg::Device device = {true, 0, 1, simt::gpu.capability, simt::gpu.multiprocessors};
  Way way = {};
  if (!choose_way(algo, prob, device, text, &way)) return;
  const Buffer x("x", prob.N * prob.C * prob.H * prob.W, prob.dtype, options.guard);
  const Buffer weight("weight", prob.K * prob.group_C() * 9, prob.dtype, options.guard);
  const Buffer bias("bias", test.bias ? prob.K : 0, prob.dtype, options.guard);
  const Buffer y("y", prob.N * prob.K * prob.P() * prob.Q(), prob.dtype, options.guard);
  const Buffer packed("packed weights", algo.packed_bytes(prob) / 2, DType::kFloat16, options.guard);
  const Buffer workspace("workspace", way.workspace_bytes / 2, DType::kFloat16, options.guard);
  const std::vector<double> xs = x.fill_random(1, 1);
  const std::vector<double> weights = weight.fill_random(2, 1 / std::sqrt(9.0 * static_cast<double>(prob.group_C())));
  const std::vector<double> biases = bias.fill_random(3, 0.5);
  if (packed.bytes() > 0) algo.pack(prob, {weight.data(), packed.data(), nullptr, in_turn});
  simt::synchronize();
  simt::launches.clear();
  const std::vector<char> inputs[] = {x.copy(), weight.copy(), bias.copy(), packed.copy()};
  const void* const packed_data = packed.bytes() > 0 ? packed.data() : nullptr;
  const void* const bias_data = test.bias ? bias.data() : nullptr;
  const repvgg::ConvArgs args = {x.data(), weight.data(),    packed_data, bias_data, prob.dtype,
                                 y.data(), workspace.data(), nullptr,     device,    in_turn};
  const auto launch = [&](const std::vector<char>& from) {
    run_previous_layer(from, x, y);
    for (const Buffer* buffer : {&x, &weight, &bias, &y, &packed, &workspace})
      simt::count_memory(buffer->data(), buffer->bytes());
    if (way.forced.tile >= 0) {
      repvgg::cuda::launch_mma(prob, args, way.forced);
    } else {
      algo.launch(prob, args);
    }
    simt::synchronize();
    simt::forget_memory();
  };
  launch(inputs[0]);

  const bool exact = std::strcmp(algo.name, "direct") == 0, tf32 = std::strcmp(algo.name, "mma_tf32") == 0;
  // tf32: packing rounds the weights to 11 bits, the hardware cuts the pixels off after 11.
  const double tf32_error = (1 + std::ldexp(1, -11)) * (1 + std::ldexp(1, -10)) - 1;
  const Reference expected = reference(prob, y_layout, xs, weights, biases, tf32 ? tf32_error : 0);
  double used = 0;
  std::string wrong = compare("y", y, expected.y, expected.bound, &used);
  if (wrong.empty() && exact) wrong = compare_chain(y, expected.chain);
  if (wrong.empty()) {
    wrong = check_plan(way.forced.tile < 0 ? algo.plan(prob, device) : way.forced.launch_plan(prob));
  }
  const Buffer* const buffers[] = {&x, &weight, &bias, &packed};
  for (int i = 0; i < 4 && wrong.empty(); ++i) {
    if (!buffers[i]->same(inputs[i])) wrong = "an input was written to";
  }
  const uint64_t hash = y.hash();
  if (wrong.empty() && options.reach) {
    // Of few channels the first: it lies behind another pixel's last.
    const std::array<int64_t, 4> pixel = {prob.N / 2, prob.C > 4 ? prob.C - 1 : 0, prob.H / 2, prob.W / 3};
    const int64_t at = index(prob.layout, prob.C, prob.H, prob.W, pixel[0], pixel[1], pixel[2], pixel[3]);
    const std::vector<char> before = y.copy();
    std::vector<char> from = inputs[0];
    repvgg::store_double(from.data(), prob.dtype, at, std::nan(""));
    workspace.poison();
    launch(from);
    wrong = compare_reach(prob, y_layout, pixel, y, before);
  }
  report(algo.name, text, checked(exact ? "bits" : "bound", used, hash, wrong) + way.text);
}

}  // namespace

void run_conv(const std::string& test) {
  const ConvCase parsed = conv_case(split(test));
  const repvgg::AlgoTable table = repvgg::cuda::algos();
  if (!options.algorithm.empty() && table.find(options.algorithm.c_str()) == nullptr) {
    throw std::invalid_argument("there is no row " + options.algorithm);
  }
  for (int row = 0; row < table.size; ++row) {
    if (options.algorithm.empty() || options.algorithm == table.rows[row]->name) {
      run_row(*table.rows[row], parsed, test);
    }
  }
}

}  // namespace simt_test
