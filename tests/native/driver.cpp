// SPDX-License-Identifier: MIT
// Runs every row of the CPU table, and chains of them, without torch: inside guarded memory, against a reference in
// double precision, with one thread and several. `driver [--quick]`; REPVGG_CUDA_CPU_ISA chooses the instruction set.
// Exit status: 0 all is well, 1 a result is wrong, 3 an access outside a buffer.
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>

#include "cpu/algos.h"
#include "cpu/chain.h"
#include "guarded.h"
#include "reference.h"

namespace native {
namespace {

using repvgg::ConvAlgo;
using repvgg::ParallelFor;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kPoison[] = {kNaN, 1e30f};
int failures = 0;

void fail(const std::string& what) {
  if (++failures <= 20) std::fprintf(stderr, "FAILED %s\n  in %s\n", what.c_str(), running);
}

repvgg::Device cpu(int threads) { return {true, -1, threads}; }

void in_turn(int64_t n, const std::function<void(int64_t)>& f) {
  for (int64_t i = 0; i < n; ++i) f(i);
}

void in_threads(int64_t n, const std::function<void(int64_t)>& f) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < n; ++i) threads.emplace_back([&f, i] { f(i); });
  for (std::thread& thread : threads) thread.join();
}

bool same_bits(const Guarded& a, const Guarded& b) { return std::memcmp(a.data(), b.data(), a.bytes()) == 0; }

// --------------------------------------------------------------------------------------------------------- one problem

struct Case {
  ConvProblem prob;
  bool bias;
  float scale = 1;  // of x

  std::string text() const {
    char out[200];
    std::snprintf(out, sizeof out, "N=%d C=%d H=%d W=%d K=%d stride=%d groups=%d %s%s%s", static_cast<int>(prob.N),
                  static_cast<int>(prob.C), static_cast<int>(prob.H), static_cast<int>(prob.W),
                  static_cast<int>(prob.K), prob.stride, prob.groups, prob.layout == Layout::kNCHW ? "NCHW" : "NHWC",
                  bias ? " bias" : "", prob.activation == Activation::kRelu ? " relu" : "");
    return out;
  }
};

int64_t x_bytes(const ConvProblem& prob) { return 4 * prob.N * prob.C * prob.H * prob.W; }
int64_t y_bytes(const ConvProblem& prob) { return 4 * prob.N * prob.K * prob.P() * prob.Q(); }

void fill_random(const Guarded& buffer, uint32_t seed, float scale) {
  std::mt19937 generator(seed);
  for (int64_t i = 0; i < buffer.count(); ++i) {
    buffer.floats()[i] = scale * (static_cast<float>(generator() >> 8) / 8388608.0f - 1.0f);
  }
}

// The tensors of a case and the packed weights of a row.
struct Tensors {
  Guarded x, weight, bias, packed;
  const bool has_bias;

  Tensors(const Case& test, const ConvAlgo& algo, Guard guard)
      : x("x", x_bytes(test.prob), 4, guard),
        weight("weight", 4 * test.prob.K * test.prob.group_C() * 9, 4, guard),
        bias("bias", test.bias ? 4 * test.prob.K : 0, 4, guard),
        packed("packed", algo.packed_bytes(test.prob), 64, guard),
        has_bias(test.bias) {
    fill_random(x, 1, test.scale);
    fill_random(weight, 2, 1.0f / std::sqrt(static_cast<float>(test.prob.group_C())));
    fill_random(bias, 3, 1);
    packed.fill(kNaN);
    if (packed.bytes() > 0) algo.pack(test.prob, {weight.data(), packed.data(), nullptr, in_turn});
  }

  const float* bias_or_null() const { return has_bias ? bias.floats() : nullptr; }
};

void launch(const ConvAlgo& algo, const ConvProblem& prob, const Tensors& in, const Guarded& y,
            const Guarded& workspace, int threads, const ParallelFor& parallel_for) {
  algo.launch(prob,
              {in.x.data(), in.weight.data(), in.packed.bytes() > 0 ? in.packed.data() : nullptr, in.bias_or_null(),
               repvgg::DType::kFloat32, y.data(), workspace.data(), nullptr, cpu(threads), parallel_for});
}

std::string element(const ConvProblem& prob, int64_t i) {
  const int64_t P = prob.P(), Q = prob.Q();
  const bool nchw = prob.layout == Layout::kNCHW;
  const int64_t w = nchw ? i % Q : i / prob.K % Q, h = nchw ? i / Q % P : i / prob.K / Q % P;
  const int64_t c = nchw ? i / Q / P % prob.K : i % prob.K;
  return "y[" + std::to_string(i / (prob.K * P * Q)) + ", " + std::to_string(c) + ", " + std::to_string(h) + ", " +
         std::to_string(w) + "]";
}

void check_numbers(const Case& test, const ConvAlgo& algo, const Tensors& in, const Guarded& y) {
  const Reference expected = reference(test.prob, algo.name, in.x.floats(), in.weight.floats(), in.bias_or_null());
  for (int64_t i = 0; i < y.count(); ++i) {
    const auto at = static_cast<size_t>(i);
    if (std::abs(y.floats()[i] - expected.y[at]) <= expected.bound[at]) continue;  // false for NaN
    char text[160];
    std::snprintf(text, sizeof text, ": got %.9g, expected %.9g +- %.3g", double{y.floats()[i]}, expected.y[at],
                  expected.bound[at]);
    return fail(element(test.prob, i) + text);
  }
}

// A NaN in one pixel: seen where the convolution sees it, and nowhere past the row's reach.
void check_reach(const Case& test, const ConvAlgo& algo, const Tensors& in, const Guarded& y,
                 const Guarded& workspace) {
  const ConvProblem& prob = test.prob;
  const Guarded before("y before", y_bytes(prob), 4, Guard::kAfter);
  std::memcpy(before.data(), y.data(), y.bytes());
  const int64_t n = prob.N / 2, h = prob.H / 2, w = prob.W / 3, far = reach(algo.name);
  float& pixel = in.x.floats()[index(prob.layout, prob.C, prob.H, prob.W, n, prob.C - 1, h, w)];
  const float kept = pixel;
  pixel = kNaN;
  launch(algo, prob, in, y, workspace, 1, in_turn);
  pixel = kept;
  const int64_t P = prob.P(), Q = prob.Q();
  for (int64_t i = 0; i < prob.N * prob.K * P * Q; ++i) {
    const int64_t q = i % Q, p = i / Q % P, k = i / Q / P % prob.K, image = i / Q / P / prob.K;
    const int64_t at = index(prob.layout, prob.K, P, Q, image, k, p, q);
    const int64_t distance = std::max(std::abs(p * prob.stride - h), std::abs(q * prob.stride - w));
    const bool mine = image == n && k / prob.group_K() == prob.groups - 1;
    if (mine && distance <= 1 && !std::isnan(y.floats()[at])) return fail(element(prob, at) + " lost a NaN of x");
    if (mine && distance <= far) continue;
    if (std::memcmp(y.floats() + at, before.floats() + at, 4) != 0) {
      return fail(element(prob, at) + " is changed by a NaN in x[" + std::to_string(n) + ", " +
                  std::to_string(prob.C - 1) + ", " + std::to_string(h) + ", " + std::to_string(w) + "]");
    }
  }
}

void check_row(const Case& test, const ConvAlgo& algo, Guard guard) {
  const ConvProblem& prob = test.prob;
  std::snprintf(running, sizeof running, "%s, %s, forbidden page %s", algo.name, test.text().c_str(),
                guard == Guard::kAfter ? "after" : "before");
  const Tensors in(test, algo, guard), untouched(test, algo, guard);
  const Guarded first("y", y_bytes(prob), 4, guard), y("y", y_bytes(prob), 4, guard);
  for (int threads = 1; threads <= 3; ++threads) {
    for (const float& poison : kPoison) {
      const Guarded workspace("workspace", algo.workspace(prob, cpu(threads)), 64, guard);
      const Guarded& out = threads == 1 && &poison == kPoison ? first : y;
      workspace.fill(poison);
      out.fill(poison);
      launch(algo, prob, in, out, workspace, threads, &poison == kPoison ? in_turn : in_threads);
      if (&out != &first && !same_bits(first, y)) {
        return fail("other bits with " + std::to_string(threads) + " threads, memory filled with " +
                    std::to_string(poison));
      }
    }
  }
  for (const auto& [a, b] : {std::pair(&in.x, &untouched.x), std::pair(&in.weight, &untouched.weight),
                             std::pair(&in.bias, &untouched.bias), std::pair(&in.packed, &untouched.packed)}) {
    if (!same_bits(*a, *b)) fail("an input was written to");
  }
  check_numbers(test, algo, in, first);
  const Guarded workspace("workspace", algo.workspace(prob, cpu(1)), 64, guard);
  check_reach(test, algo, in, y, workspace);
}

// The same call from four threads at once.
void check_concurrent(const Case& test, const ConvAlgo& algo) {
  std::snprintf(running, sizeof running, "%s, %s, four calls at once", algo.name, test.text().c_str());
  const Tensors in(test, algo, Guard::kAfter);
  std::vector<std::unique_ptr<Guarded>> y, workspace;
  for (int i = 0; i < 4; ++i) {
    y.push_back(std::make_unique<Guarded>("y", y_bytes(test.prob), 4, Guard::kAfter));
    workspace.push_back(std::make_unique<Guarded>("workspace", algo.workspace(test.prob, cpu(2)), 64, Guard::kAfter));
    workspace.back()->fill(kNaN);
  }
  in_threads(4, [&](int64_t i) {
    const auto at = static_cast<size_t>(i);
    launch(algo, test.prob, in, *y[at], *workspace[at], 2, in_threads);
  });
  for (int i = 1; i < 4; ++i) {
    if (!same_bits(*y[0], *y[static_cast<size_t>(i)])) fail("calls at the same time gave different bits");
  }
}

// --------------------------------------------------------------------------------------------------------------- cases

// No empty batch: ops/ returns before a row sees it.
std::vector<Case> cases(bool quick) {
  std::vector<Case> all;
  const auto add = [&](int64_t N, int64_t C, int64_t H, int64_t W, int64_t K, int stride, int groups) {
    const size_t i = all.size();
    const ConvProblem prob = {N,
                              C,
                              H,
                              W,
                              K,
                              stride,
                              groups,
                              repvgg::DType::kFloat32,
                              i % 3 == 0 ? Layout::kNHWC : Layout::kNCHW,
                              i % 5 < 2 ? Activation::kRelu : Activation::kIdentity};
    all.push_back({prob, i % 4 != 0});
  };
  const int64_t some_C[] = {1, 3, 8, 9, 16, 5}, some_K[] = {4, 8, 17, 24, 1, 49, 12};
  size_t i = 0;
  for (int64_t H = 1; H <= 14; ++H) {
    for (int64_t W = 1; W <= 14; ++W, ++i) {
      if (quick && i % 9 != 0) continue;
      add(1 + static_cast<int64_t>(i % 2), some_C[i % 6], H, W, some_K[i % 7], 1, 1);
      add(1, some_C[(i + 1) % 6], H + 1, W + 1, some_K[i % 7], 2, 1);
    }
  }
  for (int64_t extent = 15; extent <= 40; extent += quick ? 8 : 1) {
    add(1, 4, extent, 55 - extent, 10, 1, 1);
    add(1, 6, extent, 55 - extent, 10, 2, 1);
  }
  for (int stride = 1; stride <= 2; ++stride) {
    for (int64_t C = 1; C <= 9; ++C) add(1, C, 7, 8, 3 * C + 1, stride, 1);
    for (int64_t N : {3, 4, 5, 9}) add(N, 7, 6, 9, 16, stride, 1);
    for (int groups : {2, 4}) {
      for (int64_t per_group : {3, 8, 16, 32}) add(2, groups * per_group, 9, 7, groups * per_group, stride, groups);
    }
    add(1, 6, 8, 5, 18, stride, 6);
    add(2, 70, 14, 14, 100, stride, 1);  // several panels and blocks of channels
    all.push_back(all.back());
    all.back().scale = 1e-39f;  // denormals
    if (!quick) add(1, 300, 9, 9, 130, stride, 1);
  }
  return all;
}

// -------------------------------------------------------------------------------------------------------------- chains

struct ChainCase {
  int64_t N, C, H, W;
  std::vector<std::pair<const char*, int64_t>> layers;  // row and its output channels
};

// Layer by layer, from the dense output of one to the next.
std::vector<float> run_layers(const std::vector<Case>& tests, const std::vector<const ConvAlgo*>& algos,
                              const std::vector<std::unique_ptr<Tensors>>& in) {
  std::vector<float> x(in[0]->x.floats(), in[0]->x.floats() + in[0]->x.count());
  for (size_t i = 0; i < tests.size(); ++i) {
    std::copy(x.begin(), x.end(), in[i]->x.floats());
    const Guarded y("y of a layer", y_bytes(tests[i].prob), 4, Guard::kAfter);
    const Guarded workspace("workspace of a layer", algos[i]->workspace(tests[i].prob, cpu(1)), 64, Guard::kAfter);
    workspace.fill(kNaN);
    launch(*algos[i], tests[i].prob, *in[i], y, workspace, 1, in_turn);
    x.assign(y.floats(), y.floats() + y.count());
  }
  return x;
}

void check_chain(const ChainCase& chain, Guard guard) {
  std::vector<Case> tests;
  std::vector<const ConvAlgo*> algos;
  std::vector<std::unique_ptr<Tensors>> in;
  std::vector<repvgg::cpu::ChainLayer> layers;
  std::string text = "chain N=" + std::to_string(chain.N);
  int64_t C = chain.C, H = chain.H, W = chain.W;
  for (const auto& [name, K] : chain.layers) {
    const bool strided = std::strcmp(name, "polyphase") == 0 || std::strcmp(name, "stem") == 0;
    const ConvProblem prob = {chain.N,
                              C,
                              H,
                              W,
                              K,
                              strided ? 2 : 1,
                              1,
                              repvgg::DType::kFloat32,
                              Layout::kNCHW,
                              tests.size() % 2 ? Activation::kIdentity : Activation::kRelu};
    tests.push_back({prob, tests.size() != 1});
    algos.push_back(repvgg::cpu::algos().find(name));
    in.push_back(std::make_unique<Tensors>(tests.back(), *algos.back(), guard));
    layers.push_back({prob, algos.back(), in.back()->packed.data(), in.back()->bias_or_null()});
    text += std::string("; ") + name + " " + tests.back().text();
    C = K, H = prob.P(), W = prob.Q();
  }
  std::snprintf(running, sizeof running, "%s", text.c_str());
  const int n = static_cast<int>(layers.size());
  if (repvgg::cpu::chain_length(layers.data(), n) != n) return fail("chain_length does not accept the chain");
  const std::vector<float> expected = run_layers(tests, algos, in);
  const Guarded y("y", y_bytes(tests.back().prob), 4, guard);
  for (int threads = 1; threads <= 3; ++threads) {
    const Guarded workspace("workspace", repvgg::cpu::chain_workspace(layers.data(), n, threads), 64, guard);
    workspace.fill(kPoison[threads % 2]);
    y.fill(kNaN);
    repvgg::cpu::run_chain(layers.data(), n,
                           {in[0]->x.floats(), y.floats(), Layout::kNCHW, Layout::kNCHW, workspace.data(), threads,
                            threads == 2 ? in_threads : in_turn});
    if (std::memcmp(y.data(), expected.data(), y.bytes()) != 0) {
      fail("other bits than layer by layer, with " + std::to_string(threads) + " threads");
    }
  }
}

void check_chains(Guard guard) {
  for (int64_t N : {1, 2, 5}) {
    check_chain({N, 9, 7, 10, {{"winograd4", 12}, {"direct", 17}}}, guard);
    check_chain({N, 3, 19, 22, {{"stem", 16}, {"polyphase", 24}, {"winograd2", 24}, {"winograd4", 9}}}, guard);
    check_chain({N, 16, 9, 5, {{"direct", 5}, {"winograd6", 70}, {"polyphase", 33}, {"direct", 8}, {"winograd2", 1}}},
                guard);
    check_chain({N, 160, 6, 6, {{"winograd4", 160}, {"winograd4", 160}, {"polyphase", 200}}}, guard);
  }
}

int run(bool quick) {
  std::map<std::string, int> count;
  const repvgg::Device device = {true, 0, 2};
  const repvgg::AlgoTable table = repvgg::cpu::algos();
  for (int i = 0; i < table.size; ++i) {
    const ConvAlgo& algo = *table.rows[i];
    for (const Case& test : cases(quick)) {
      if (algo.refuse(test.prob, device) != nullptr) continue;
      for (const Guard guard : {Guard::kAfter, Guard::kBefore}) check_row(test, algo, guard);
      if (count[algo.name]++ % 16 == 0) check_concurrent(test, algo);
    }
    if (count[algo.name] == 0) fail(std::string(algo.name) + " refused every case");
  }
  for (const Guard guard : {Guard::kAfter, Guard::kBefore}) check_chains(guard);
  std::printf("%s:", repvgg::cpu::target_name());
  for (const auto& [name, cases] : count) std::printf(" %s %d", name.c_str(), cases);
  std::printf("; %d failures\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace native

int main(int argc, char** argv) {
  const bool quick = argc == 2 && std::strcmp(argv[1], "--quick") == 0;
  if (argc > 1 && !quick) {
    std::fprintf(stderr, "usage: %s [--quick], got '%s'\n", argv[0], argv[1]);
    return 2;
  }
  native::catch_segfaults();
  return native::run(quick);
}
