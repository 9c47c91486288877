// SPDX-License-Identifier: MIT
// Runs rows of the CUDA table and fuse_weights through their own launch code, on the CPU, and checks the results.
//
//   driver [option value ...] case ...
//     --schedule forward | backward | random:SEED   --blocks-at-once N   --capability 80   --multiprocessors 108
//     --algorithm NAME (default: every row)         --guard after | before
//     --reach yes: also with a NaN in one pixel, which may reach the outputs that see it and no others
//     --tile I, --split N: of the tensor-core rows, instead of what they would choose
//   case: N,C,H,W,K,stride,groups,dtype,layout,activation,bias|none     as 2,5,7,9,6,1,1,float32,nhwc,relu,bias
//     or  fuse,K,C,dtype,3x3 branches,1x1 branches,identities,bn|none,bn of the sum|none     several joined by +: one
//     call
//
// Prints a JSON object per row and case. Exit status: 0 all is well, 1 a result is wrong, 2 usage, 3 an access outside
// a buffer, 4 a diagnosis of the executor.
#include <array>
#include <cinttypes>
#include <memory>
#include <stdexcept>
#include <string>

#include "buffers.h"
#include "core/conv_algo.h"
#include "counters.h"
#include "cuda/algos.h"
#include "cuda/device.cuh"
#include "cuda/mma_plan.h"
#include "executor.h"

namespace simt_test {
namespace {

using repvgg::ConvAlgo;

Guard guard = Guard::kAfter;
bool with_reach = false;
int forced_tile = -1, forced_split = 1;
int failures = 0;

std::vector<std::string> split(const std::string& text, char separator = ',') {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

template <class T>
T choose(const std::string& text, const std::vector<std::pair<const char*, T>>& choices) {
  for (const auto& [name, value] : choices) {
    if (text == name) return value;
  }
  throw std::invalid_argument("'" + text + "' is no choice here");
}

DType dtype_of(const std::string& text) {
  return choose<DType>(text, {{"float64", DType::kFloat64},
                              {"float32", DType::kFloat32},
                              {"float16", DType::kFloat16},
                              {"bfloat16", DType::kBFloat16}});
}

// One line of output.
void report(const std::string& row, const std::string& test, const std::string& rest) {
  std::printf("{\"row\": \"%s\", \"case\": \"%s\", %s}\n", row.c_str(), test.c_str(), rest.c_str());
  std::fflush(stdout);
}

std::string checked(const char* what, double used, uint64_t hash, const std::string& wrong) {
  if (!wrong.empty()) ++failures;
  char text[1000];
  std::snprintf(text, sizeof text,
                "\"ok\": %s, \"check\": \"%s\", \"bound_used\": %.3g, \"bits\": \"%016" PRIx64 "\"%s%s%s",
                wrong.empty() ? "true" : "false", what, used, hash, wrong.empty() ? "" : ", \"wrong\": \"",
                wrong.c_str(), wrong.empty() ? "" : "\"");
  return text;
}

// The first element that is further from `expected` than `bound`; `used`: the greatest share of a bound.
std::string compare(const char* name, const Buffer& got, const std::vector<double>& expected,
                    const std::vector<double>& bound, double* used) {
  std::string wrong;
  int64_t count = 0;
  for (int64_t i = 0; i < got.size(); ++i) {
    const auto at = static_cast<size_t>(i);
    const double error = std::abs(got.at(i) - expected[at]);
    if (error <= bound[at]) {  // false for NaN
      if (bound[at] > 0) *used = std::max(*used, error / bound[at]);
    } else if (count++ == 0) {
      char text[200];
      std::snprintf(text, sizeof text, "%s[%" PRId64 "]: got %.9g, expected %.9g +- %.3g", name, i, got.at(i),
                    expected[at], bound[at]);
      wrong = text;
    }
  }
  if (count > 1) wrong += " and " + std::to_string(count - 1) + " more";
  return wrong;
}

// ----------------------------------------------------------------------------------------------------------
// convolution

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
  if (why == nullptr && forced_tile >= 0 && is_named(algo, "mma")) {
    if (repvgg::cuda::mma_tile_fits(repvgg::cuda::kMmaTiles[forced_tile], prob)) {
      way->forced = repvgg::cuda::plan_mma_tile(forced_tile, forced_split, prob, device);
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
  way->text = forced ? ", \"forced_tile\": " + std::to_string(forced_tile) : tile;
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
  const Buffer x("x", prob.N * prob.C * prob.H * prob.W, prob.dtype, guard);
  const Buffer weight("weight", prob.K * prob.group_C() * 9, prob.dtype, guard);
  const Buffer bias("bias", test.bias ? prob.K : 0, prob.dtype, guard);
  const Buffer y("y", prob.N * prob.K * prob.P() * prob.Q(), prob.dtype, guard);
  const Buffer packed("packed weights", algo.packed_bytes(prob) / 2, DType::kFloat16, guard);
  const Buffer workspace("workspace", way.workspace_bytes / 2, DType::kFloat16, guard);
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
  if (wrong.empty() && with_reach) {
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

// -------------------------------------------------------------------------------------------------------- fuse_weights

// The arrays of a FoldProblem, made on demand.
struct FoldArrays {
  std::vector<std::unique_ptr<Buffer>> buffers;
  DType dtype = DType::kFloat32;

  repvgg::FoldArray make(int64_t size, double scale, bool positive = false) {
    buffers.push_back(std::make_unique<Buffer>("an array of the block", size, dtype, guard));
    buffers.back()->fill_random(static_cast<uint32_t>(buffers.size()), scale, positive);
    return {buffers.back()->data(), dtype};
  }
  repvgg::FoldBatchNorm batchnorm(int64_t K) {
    return {make(K, 1), make(K, 0.3), make(K, 0.3), make(K, 1.5, true), 1e-5};
  }
};

// A block with its tensors.
struct FoldCase {
  repvgg::FoldProblem prob = {};
  FoldArrays arrays;
  std::unique_ptr<Buffer> weight, bias;
};

FoldCase fold_case(const std::vector<std::string>& part) {
  if (part.size() != 9) throw std::invalid_argument("a case of fuse has 9 parts");
  FoldCase result;
  repvgg::FoldProblem& prob = result.prob;
  prob.K = std::stoll(part[1]);
  prob.C = std::stoll(part[2]);
  const DType dtype = dtype_of(part[3]);
  const bool bn = choose<bool>(part[7], {{"bn", true}, {"none", false}});
  const bool post_bn = choose<bool>(part[8], {{"bn", true}, {"none", false}});
  FoldArrays& arrays = result.arrays;
  arrays.dtype = dtype;
  for (size_t kind = 0; kind < 3; ++kind) {
    for (int i = 0; i < std::stoi(part[4 + kind]); ++i) {
      repvgg::FoldBranch& branch = prob.branches[prob.n_branches++];
      branch.kind =
          std::vector{repvgg::FoldKind::kConv3x3, repvgg::FoldKind::kConv1x1, repvgg::FoldKind::kIdentity}[kind];
      if (kind < 2) branch.kernel = arrays.make(prob.K * prob.C * (kind == 0 ? 9 : 1), 1);
      if (kind < 2 && i % 2 == 0) branch.bias = arrays.make(prob.K, 0.5);
      if (bn) branch.bn = arrays.batchnorm(prob.K);
    }
  }
  if (post_bn) prob.post_bn = arrays.batchnorm(prob.K);
  result.weight = std::make_unique<Buffer>("weight", prob.K * prob.C * 9, dtype, guard);
  result.bias = std::make_unique<Buffer>("bias", prob.K, dtype, guard);
  prob.weight = result.weight->data(), prob.bias = result.bias->data();
  prob.weight_dtype = prob.bias_dtype = dtype;
  return result;
}

void run_fold(const std::string& text) {
  std::snprintf(native::running, sizeof native::running, "fuse_weights, %s", text.c_str());
  std::vector<FoldCase> cases;
  std::vector<repvgg::FoldProblem> problems;
  for (const std::string& each : split(text, '+')) {
    cases.push_back(fold_case(split(each)));
    problems.push_back(cases.back().prob);
  }
  repvgg::cuda::fuse_weights(problems.data(), static_cast<int>(problems.size()), nullptr);
  simt::synchronize();
  double used = 0;
  uint64_t hash = 0;
  std::string wrong;
  for (const FoldCase& each : cases) {
    const FoldReference expected = fold_reference(each.prob);
    if (wrong.empty()) wrong = compare("weight", *each.weight, expected.weight, expected.weight_bound, &used);
    if (wrong.empty()) wrong = compare("bias", *each.bias, expected.bias, expected.bias_bound, &used);
    hash ^= each.weight->hash() ^ each.bias->hash();
  }
  report("fuse_weights", text, checked("bound", used, hash, wrong));
}

// -----------------------------------------------------------------------------------------------------------------
// main

void set_option(const std::string& name, const std::string& value, std::string* algorithm) {
  if (name == "--schedule") {
    const bool random = value.rfind("random:", 0) == 0;
    simt::schedule.order = choose<simt::Order>(
        random ? "random" : value,
        {{"forward", simt::Order::kForward}, {"backward", simt::Order::kBackward}, {"random", simt::Order::kRandom}});
    if (random) simt::schedule.seed = std::stoull(value.substr(7));
  } else if (name == "--blocks-at-once") {
    simt::schedule.blocks_at_once = static_cast<unsigned>(std::stoul(value));
  } else if (name == "--capability") {
    simt::gpu.capability = std::stoi(value);
  } else if (name == "--multiprocessors") {
    simt::gpu.multiprocessors = std::stoi(value);
  } else if (name == "--guard") {
    guard = choose<Guard>(value, {{"after", Guard::kAfter}, {"before", Guard::kBefore}});
  } else if (name == "--reach") {
    with_reach = value == "yes";
  } else if (name == "--tile") {
    forced_tile = std::stoi(value);
    if (forced_tile >= repvgg::cuda::kMmaTileCount) throw std::invalid_argument("there is no tile " + value);
  } else if (name == "--split") {
    forced_split = std::stoi(value);
  } else if (name == "--algorithm") {
    *algorithm = value;
  } else {
    throw std::invalid_argument("there is no option " + name);
  }
}

int run(int argc, char** argv) {
  std::string algorithm;
  int first = 1;
  for (; first + 1 < argc && argv[first][0] == '-'; first += 2) set_option(argv[first], argv[first + 1], &algorithm);
  if (first >= argc || argv[first][0] == '-') throw std::invalid_argument("there is no case");
  const repvgg::AlgoTable table = repvgg::cuda::algos();
  if (!algorithm.empty() && algorithm != "fuse_weights" && table.find(algorithm.c_str()) == nullptr) {
    throw std::invalid_argument("there is no row " + algorithm);
  }
  for (int i = first; i < argc; ++i) {
    const std::vector<std::string> part = split(argv[i]);
    if (part[0] == "fuse") {
      if (algorithm.empty() || algorithm == "fuse_weights") run_fold(argv[i]);
      continue;
    }
    const ConvCase test = conv_case(part);
    for (int row = 0; row < table.size; ++row) {
      if (algorithm.empty() || algorithm == table.rows[row]->name) run_row(*table.rows[row], test, argv[i]);
    }
  }
  const simt::Totals& totals = simt::totals;
  const std::string counts = simt::take_counts();
  std::printf("{\"launches\": %" PRIu64 ", \"blocks\": %" PRIu64 ", \"threads\": %" PRIu64 ", \"barriers\": %" PRIu64
              ", \"collectives\": %" PRIu64 ", \"failures\": %d, \"counts\": %s}\n",
              totals.launches, totals.blocks, totals.threads, totals.barriers, totals.collectives, failures,
              counts.c_str());
  return failures != 0;
}

}  // namespace
}  // namespace simt_test

int main(int argc, char** argv) {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which show the line
  native::catch_segfaults();
#endif
  try {
    return simt_test::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 2;
  }
}
