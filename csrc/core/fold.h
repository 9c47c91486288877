// SPDX-License-Identifier: MIT
// The fold of a block's branches into one 3x3 kernel and one bias, per element, in double (arXiv:2101.03697, sec. 3.3).
// reference.py says the same in PyTorch and is the oracle.
#pragma once

#include <cmath>

#include "core/dtype.h"

namespace repvgg {

constexpr int kMaxBranches = 32;  // repvgg_cuda/branches.py: MAX_BRANCHES

// A dense vector or kernel of any float type. data == nullptr: absent.
struct FoldArray {
  const void* data;
  DType dtype;

  RVG_HOST_DEVICE bool present() const { return data != nullptr; }
  RVG_HOST_DEVICE double at(int64_t i) const { return load_double(data, dtype, i); }
  RVG_HOST_DEVICE double at_or(int64_t i, double absent) const { return present() ? at(i) : absent; }
};

struct FoldBatchNorm {
  FoldArray weight, bias, mean, var;  // mean.present() == var.present(): whether there is a BatchNorm
  double eps;
};

enum class FoldKind : int32_t { kIdentity, kConv1x1, kConv3x3 };

struct FoldBranch {
  FoldArray kernel;  // [K, C, taps]; absent for the identity
  FoldArray bias;
  FoldBatchNorm bn;
  FoldKind kind;
};

// weight [K, C, 3, 3], bias [K]; C is C_in / groups.
struct FoldProblem {
  int64_t K, C;
  int32_t groups;
  int32_t n_branches;
  DType weight_dtype, bias_dtype;
  void* weight;  // nullptr, where `packed` is not: not asked for
  void* bias;
  void* packed;  // on a GPU: the weight once more, in the order of cuda/packed_layout.h; nullptr: not asked for
  FoldBatchNorm post_bn;
  FoldBranch branches[kMaxBranches];
};

// BN(v) = v * scale + shift for channel k; the identity where there is no BatchNorm.
struct FoldAffine {
  double scale, shift;
};

RVG_HOST_DEVICE inline FoldAffine fold_affine(const FoldBatchNorm& bn, int64_t k) {
  if (!bn.mean.present()) return {1.0, 0.0};
  const double scale = bn.weight.at_or(k, 1.0) * (1.0 / sqrt(bn.var.at(k) + bn.eps));
  return {scale, bn.bias.at_or(k, 0.0) - bn.mean.at(k) * scale};
}

// What a branch adds to the bias of channel k.
RVG_HOST_DEVICE inline double fold_bias(const FoldBranch& branch, const FoldAffine& affine, int64_t k) {
  return branch.bias.at_or(k, 0.0) * affine.scale + affine.shift;
}

// The identity of a grouped convolution: output k reads channel k of the input, which is this one of its group's C.
RVG_HOST_DEVICE inline int64_t fold_identity_channel(int64_t k, int64_t C) { return k % C; }

}  // namespace repvgg
