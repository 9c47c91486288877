// SPDX-License-Identifier: MIT
// What a kernel should have computed, and how far from it a correct one may be. The bounds are those of
// repvgg_cuda/testing.py, error_bound and fold_bound, and derived there.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/conv_problem.h"
#include "core/fold.h"

namespace simt_test {

using repvgg::ConvProblem;
using repvgg::DType;
using repvgg::Layout;

inline double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return std::ldexp(1, -53);
    case DType::kFloat32: return std::ldexp(1, -24);
    case DType::kFloat16: return std::ldexp(1, -11);
    case DType::kBFloat16: return std::ldexp(1, -8);
  }
  return 0;
}
inline double smallest_normal(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return std::numeric_limits<double>::min();
    case DType::kFloat16: return std::ldexp(1, -14);
    default: return std::numeric_limits<float>::min();
  }
}
inline int64_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Where element (n, c, h, w) of a tensor with so many channels, rows and columns is.
inline int64_t index(Layout layout, int64_t C, int64_t H, int64_t W, int64_t n, int64_t c, int64_t h, int64_t w) {
  return layout == Layout::kNCHW ? ((n * C + c) * H + h) * W + w : ((n * H + h) * W + w) * C + c;
}

struct Reference {
  std::vector<double> y, bound;  // in y_layout
  std::vector<float> chain;      // the same as one chain of fused multiply-adds in float, in the order (c, r, s)
};

// `product_error`: how far rounding its factors moves a product, relative to it.
inline Reference reference(const ConvProblem& prob, Layout y_layout, const std::vector<double>& x,
                           const std::vector<double>& weight, const std::vector<double>& bias, double product_error) {
  const int64_t P = prob.P(), Q = prob.Q(), C = prob.group_C();
  const double u = std::ldexp(1, -24), terms = static_cast<double>(9 * C + 1), gamma = terms * u / (1 - terms * u);
  const double factor = gamma * (1 + product_error) + product_error;
  const double u_out = unit_roundoff(prob.dtype), least = smallest_normal(prob.dtype);
  const bool relu = prob.activation == repvgg::Activation::kRelu;
  Reference result;
  result.y.resize(static_cast<size_t>(prob.N * prob.K * P * Q));
  result.bound.resize(result.y.size());
  result.chain.resize(result.y.size());
  for (int64_t i = 0; i < prob.N * prob.K * P * Q; ++i) {
    const int64_t q = i % Q, p = i / Q % P, k = i / Q / P % prob.K, n = i / Q / P / prob.K;
    double sum = 0, absolute = 0;
    float chain = 0;
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t h = p * prob.stride + tap / 3 - 1, w = q * prob.stride + tap % 3 - 1;
        const bool inside = h >= 0 && h < prob.H && w >= 0 && w < prob.W;
        const int64_t channel = k / prob.group_K() * C + c;
        const double factor_w = weight[static_cast<size_t>((k * C + c) * 9 + tap)];
        const double factor_x =
            inside ? x[static_cast<size_t>(index(prob.layout, prob.C, prob.H, prob.W, n, channel, h, w))] : 0;
        sum += factor_w * factor_x;
        absolute += std::abs(factor_w * factor_x);
        chain = std::fmaf(static_cast<float>(factor_w), static_cast<float>(factor_x), chain);
      }
    }
    const double b = bias.empty() ? 0 : bias[static_cast<size_t>(k)];
    sum += b;
    absolute += std::abs(b);
    chain += static_cast<float>(b);
    double bound = factor * absolute;
    if (prob.dtype != DType::kFloat32) bound = bound * (1 + 2 * u_out) + 2 * u_out * absolute + least * u_out * 2;
    const auto at = static_cast<size_t>(index(y_layout, prob.K, P, Q, n, k, p, q));
    result.y[at] = relu && sum < 0 ? 0 : sum;
    result.bound[at] = bound;
    result.chain[at] = relu && chain < 0 ? 0 : chain;
  }
  return result;
}

// The fold in long double, and the bound of one in double that is rounded once.
struct FoldReference {
  std::vector<double> weight, weight_bound, bias, bias_bound;
};

struct FoldTerm {
  long double value = 0, magnitude = 0;
  void add(long double term) {
    value += term;
    magnitude += std::abs(term);
  }
};

inline FoldReference fold_reference(const repvgg::FoldProblem& prob) {
  struct Affine {
    long double scale = 1, mean = 0, beta = 0;
  };
  const auto affine = [](const repvgg::FoldBatchNorm& bn, int64_t k) {
    Affine result;
    if (!bn.mean.present()) return result;
    result.scale = bn.weight.at_or(k, 1) / std::sqrt(static_cast<long double>(bn.var.at(k)) + bn.eps);
    result.mean = bn.mean.at(k);
    result.beta = bn.bias.at_or(k, 0);
    return result;
  };
  const double steps = 2 * (6 + prob.n_branches) * (prob.post_bn.mean.present() ? 2 : 1);
  const auto bound = [&](long double magnitude, DType dtype) {
    const double factor = steps * std::ldexp(1, -53) + unit_roundoff(dtype) * (1 + std::ldexp(1, -12));
    return static_cast<double>(magnitude) * factor + smallest_normal(dtype) * unit_roundoff(dtype);
  };
  FoldReference result;
  for (int64_t k = 0; k < prob.K; ++k) {
    const Affine post = affine(prob.post_bn, k);
    FoldTerm bias;
    for (int i = 0; i < prob.n_branches; ++i) {
      const Affine bn = affine(prob.branches[i].bn, k);
      bias.add(prob.branches[i].bias.at_or(k, 0) * bn.scale);
      bias.add(-bn.mean * bn.scale);
      bias.add(bn.beta);
    }
    FoldTerm total{bias.value * post.scale, bias.magnitude * std::abs(post.scale)};
    total.add(-post.mean * post.scale);
    total.add(post.beta);
    result.bias.push_back(static_cast<double>(total.value));
    result.bias_bound.push_back(bound(total.magnitude, prob.bias_dtype));
    for (int64_t c = 0; c < prob.C; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        FoldTerm weight;
        for (int i = 0; i < prob.n_branches; ++i) {
          const repvgg::FoldBranch& branch = prob.branches[i];
          const long double scale = affine(branch.bn, k).scale;
          if (branch.kind == repvgg::FoldKind::kConv3x3) {
            weight.add(branch.kernel.at((k * prob.C + c) * 9 + tap) * scale);
          } else if (tap == 4 && branch.kind == repvgg::FoldKind::kConv1x1) {
            weight.add(branch.kernel.at(k * prob.C + c) * scale);
          } else if (tap == 4 && branch.kind == repvgg::FoldKind::kIdentity && c == k % prob.C) {
            weight.add(scale);
          }
        }
        result.weight.push_back(static_cast<double>(weight.value * post.scale));
        result.weight_bound.push_back(bound(weight.magnitude * std::abs(post.scale), prob.weight_dtype));
      }
    }
  }
  return result;
}

}  // namespace simt_test
