// SPDX-License-Identifier: MIT
// Folds of blocks, one or several in a call.
#include <memory>

#include "cuda/algos.h"
#include "cuda/pack_weights.h"
#include "driver.h"

namespace simt_test {
namespace {

// The arrays of a FoldProblem, made on demand.
struct FoldArrays {
  std::vector<std::unique_ptr<Buffer>> buffers;
  DType dtype = DType::kFloat32;

  repvgg::FoldArray make(int64_t size, double scale, bool positive = false) {
    buffers.push_back(std::make_unique<Buffer>("an array of the block", size, dtype, options.guard));
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
  std::unique_ptr<Buffer> weight, bias, packed;

  bool weight_asked() const { return prob.weight != nullptr; }
  // The layer that packed weights are for.
  ConvProblem layer() const {
    return {1,
            prob.C * prob.groups,
            1,
            1,
            prob.K,
            1,
            prob.groups,
            prob.weight_dtype,
            Layout::kNHWC,
            repvgg::Activation::kIdentity};
  }
};

FoldCase fold_case(const std::vector<std::string>& part) {
  if (part.size() != 9 && part.size() != 11) throw std::invalid_argument("a case of fuse has 9 or 11 parts");
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
  result.weight = std::make_unique<Buffer>("weight", prob.K * prob.C * 9, dtype, options.guard);
  result.bias = std::make_unique<Buffer>("bias", prob.K, dtype, options.guard);
  prob.weight = result.weight->data(), prob.bias = result.bias->data();
  prob.weight_dtype = prob.bias_dtype = dtype;
  prob.groups = 1;
  if (part.size() == 11) {
    prob.groups = std::stoi(part[9]);
    result.packed = std::make_unique<Buffer>("packed", repvgg::cuda::mma_packed_bytes(result.layer()), DType::kFloat16,
                                             options.guard);
    prob.packed = result.packed->data();
    if (!choose<bool>(part[10], {{"both", true}, {"packed", false}})) prob.weight = nullptr;
  }
  return result;
}

// Whether what was packed is what packing the folded weight gives.
std::string compare_packed(const FoldCase& each) {
  const Buffer expected("expected", static_cast<int64_t>(each.packed->bytes() / 2), DType::kFloat16, options.guard);
  repvgg::cuda::mma_pack(each.layer(), {each.weight->data(), expected.data(), nullptr, {}});
  simt::synchronize();
  return each.packed->same(expected.copy()) ? "" : "packed weights differ from the packed weight";
}

}  // namespace

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
  for (FoldCase& each : cases) {  // the weight that was not asked for
    if (each.weight_asked()) continue;
    each.prob.weight = each.weight->data();
    each.prob.packed = nullptr;
    repvgg::cuda::fuse_weights(&each.prob, 1, nullptr);
    simt::synchronize();
  }
  double used = 0;
  uint64_t hash = 0;
  std::string wrong;
  for (const FoldCase& each : cases) {
    const FoldReference expected = fold_reference(each.prob);
    if (wrong.empty()) wrong = compare("weight", *each.weight, expected.weight, expected.weight_bound, &used);
    if (wrong.empty()) wrong = compare("bias", *each.bias, expected.bias, expected.bias_bound, &used);
    if (wrong.empty() && each.packed != nullptr) wrong = compare_packed(each);
    hash ^= each.weight->hash() ^ each.bias->hash();
  }
  report("fuse_weights", text, checked("bound", used, hash, wrong));
}

}  // namespace simt_test
