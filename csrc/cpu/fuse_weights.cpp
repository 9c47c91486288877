// SPDX-License-Identifier: MIT
// Every weight is a sum over the branches in their order, in double. Summed branch by branch over runs of taps: the
// type of a branch is looked at once per run instead of once per element, and the compiler makes vectors of the loops.
#include "cpu/fuse_weights.h"

#include <algorithm>

namespace repvgg::cpu {
namespace {

constexpr int64_t kRunC = 64;  // input channels per run: 9 * 64 doubles stay in the first-level cache

// sums[i * stride] += kernel[first + i] * scale
void add_scaled(const FoldArray& kernel, int64_t first, int64_t n, double scale, double* sums, int64_t stride) {
  switch (kernel.dtype) {
    case DType::kFloat64: {
      const double* values = static_cast<const double*>(kernel.data) + first;
      for (int64_t i = 0; i < n; ++i) sums[i * stride] += values[i] * scale;
      return;
    }
    case DType::kFloat32: {
      const float* values = static_cast<const float*>(kernel.data) + first;
      for (int64_t i = 0; i < n; ++i) sums[i * stride] += values[i] * scale;
      return;
    }
    default:
      for (int64_t i = 0; i < n; ++i) sums[i * stride] += kernel.at(first + i) * scale;
  }
}

void store_scaled(const double* sums, int64_t n, double scale, void* out, DType dtype, int64_t first) {
  switch (dtype) {
    case DType::kFloat64:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(out)[first + i] = sums[i] * scale;
      return;
    case DType::kFloat32:
      for (int64_t i = 0; i < n; ++i) static_cast<float*>(out)[first + i] = static_cast<float>(sums[i] * scale);
      return;
    default:
      for (int64_t i = 0; i < n; ++i) store_double(out, dtype, first + i, sums[i] * scale);
  }
}

// Input channels [c0, c0 + n) of output channel k.
void fold_run(const FoldProblem& prob, const double* scales, double post_scale, int64_t k, int64_t c0, int64_t n) {
  constexpr int64_t kCentre = 4;
  double sums[kRunC * 9];
  std::fill(sums, sums + n * 9, 0.0);
  for (int i = 0; i < prob.n_branches; ++i) {
    const FoldBranch& branch = prob.branches[i];
    const int64_t c_identity = fold_identity_channel(k, prob.C) - c0;
    switch (branch.kind) {
      case FoldKind::kConv3x3: add_scaled(branch.kernel, (k * prob.C + c0) * 9, n * 9, scales[i], sums, 1); break;
      case FoldKind::kConv1x1: add_scaled(branch.kernel, k * prob.C + c0, n, scales[i], sums + kCentre, 9); break;
      case FoldKind::kIdentity:
        if (c_identity >= 0 && c_identity < n) sums[c_identity * 9 + kCentre] += scales[i];
        break;
    }
  }
  store_scaled(sums, n * 9, post_scale, prob.weight, prob.weight_dtype, (k * prob.C + c0) * 9);
}

}  // namespace

void fuse_weights(const FoldProblem& prob, int64_t begin, int64_t end) {
  double scales[kMaxBranches];
  for (int64_t k = begin; k < end; ++k) {
    double bias = 0.0;
    for (int i = 0; i < prob.n_branches; ++i) {
      const FoldAffine affine = fold_affine(prob.branches[i].bn, k);
      scales[i] = affine.scale;
      bias += fold_bias(prob.branches[i], affine, k);
    }
    const FoldAffine post = fold_affine(prob.post_bn, k);
    for (int64_t c0 = 0; c0 < prob.C; c0 += kRunC) {
      fold_run(prob, scales, post.scale, k, c0, std::min(kRunC, prob.C - c0));
    }
    store_double(prob.bias, prob.bias_dtype, k, bias * post.scale + post.shift);
  }
}

}  // namespace repvgg::cpu
