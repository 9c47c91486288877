// SPDX-License-Identifier: MIT
// The convolution in double precision, and how far a correct row may be from it.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "core/conv_problem.h"
#include "core/winograd_points.h"

namespace native {

using repvgg::Activation;
using repvgg::ConvProblem;
using repvgg::Layout;

// Where element (n, c, h, w) of a tensor with so many channels, rows and columns is.
inline int64_t index(Layout layout, int64_t C, int64_t H, int64_t W, int64_t n, int64_t c, int64_t h, int64_t w) {
  return layout == Layout::kNCHW ? ((n * C + c) * H + h) * W + w : ((n * H + h) * W + w) * C + c;
}

// The algorithm's set of points; nullptr for a row that multiplies inputs by weights as they are.
inline const repvgg::WinogradPoints* points_of(const char* algorithm) {
  if (std::strcmp(algorithm, "winograd2") == 0) return &repvgg::kPoints2;
  if (std::strcmp(algorithm, "winograd4") == 0 || std::strcmp(algorithm, "polyphase") == 0) return &repvgg::kPoints4;
  if (std::strcmp(algorithm, "winograd6") == 0) return &repvgg::kPoints6;
  return nullptr;
}

// The greatest sum over the points of |A| (sum |G|) (sum |B|), of any output of any class of tiles: what one dimension
// of A [(G g) * (B d)] can grow to for |g|, |d| <= 1, and what its rounding errors are multiplied by.
inline double growth(const repvgg::WinogradPoints& set, bool polyphase) {
  const repvgg::WinogradWeight weight = repvgg::winograd_weight(set, polyphase);
  const auto row = [&](int point) {
    return std::abs(weight.g[point][0]) + std::abs(weight.g[point][1]) + std::abs(weight.g[point][2]);
  };
  const auto sum = [](const float* c) {
    return std::abs(c[0]) + std::abs(c[1]) + std::abs(c[2]) + double{std::abs(c[3])};
  };
  double most = 0;
  for (int cls = 0; cls <= set.pairs; ++cls) {
    const repvgg::WinogradInput input = repvgg::winograd_input(set, cls);
    for (int r = 0; r < 2 * cls + 2; ++r) {
      double total = sum(input.all) * (row(0) * std::abs(input.dropped_zero) + row(set.points() - 1));
      for (int k = 0; k < cls; ++k) {
        const double b = sum(input.part[k]) * (1 + std::abs(input.q[k])) * std::abs(input.dropped[k]);
        total += (row(2 * k + 1) + row(2 * k + 2)) * b * std::pow(set.q[k], r);
      }
      most = std::max(most, total + (polyphase ? 1 : 0));
    }
  }
  return most;
}

// Outputs that see an input: |stride * p - h| <= reach. A Winograd tile shows a NaN in its window to all its outputs.
inline int64_t reach(const char* algorithm) {
  if (const repvgg::WinogradPoints* set = points_of(algorithm)) {
    return std::strcmp(algorithm, "polyphase") == 0 ? 4 * set->pairs + 1 : 2 * set->pairs;
  }
  return 1;
}

struct Reference {
  std::vector<double> y, bound;  // in the layout of the problem
};

// Direct rows: gamma_n * sum |w||x|, n products and the bias. Winograd rows: gamma of the longest chain of roundings
// (C / groups products; pairs + 3 in each of four transforms; one each for the weights and the bias) times growth^2
// times sum over c of max |w| max |x|. Both: half a subnormal step for each operation that may underflow.
inline Reference reference(const ConvProblem& prob, const char* algorithm, const float* x, const float* weight,
                           const float* bias) {
  const repvgg::WinogradPoints* set = points_of(algorithm);
  const double growth2 = set ? std::pow(growth(*set, prob.stride == 2), 2) : 1;
  const double terms = set ? static_cast<double>(prob.group_C() + 4 * (set->pairs + 3) + 2)
                           : static_cast<double>(9 * prob.group_C() + 1);
  const double u = std::ldexp(1, -24), gamma = terms * u / (1 - terms * u);
  const int64_t P = prob.P(), Q = prob.Q(), C = prob.group_C();
  double x_most = 0;
  for (int64_t i = 0; i < prob.N * prob.C * prob.H * prob.W; ++i) x_most = std::max(x_most, std::abs(double{x[i]}));
  Reference result;
  result.y.resize(static_cast<size_t>(prob.N * prob.K * P * Q));
  result.bound.resize(result.y.size());
  for (int64_t k = 0; k < prob.K; ++k) {
    const float* w = weight + k * C * 9;
    double w_most = 0, grown = 0;
    for (int64_t c = 0; c < C; ++c) {
      double most = 0;
      for (int tap = 0; tap < 9; ++tap) most = std::max(most, std::abs(double{w[c * 9 + tap]}));
      w_most = std::max(w_most, most);
      grown += most * x_most * growth2;
    }
    const double underflow = 4 * 9 * terms * growth2 * std::max(1.0, w_most) * std::ldexp(1, -150);
    for (int64_t i = 0; i < prob.N * P * Q; ++i) {
      const int64_t n = i / (P * Q), p = i / Q % P, q = i % Q;
      double sum = bias ? bias[k] : 0, absolute = std::abs(sum);
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t h = p * prob.stride + tap / 3 - 1, v = q * prob.stride + tap % 3 - 1;
        if (h < 0 || h >= prob.H || v < 0 || v >= prob.W) continue;
        for (int64_t c = 0; c < C; ++c) {
          const int64_t channel = k / prob.group_K() * C + c;
          const double product =
              double{w[c * 9 + tap]} * x[index(prob.layout, prob.C, prob.H, prob.W, n, channel, h, v)];
          sum += product;
          absolute += std::abs(product);
        }
      }
      const auto at = static_cast<size_t>(index(prob.layout, prob.K, P, Q, n, k, p, q));
      result.y[at] = prob.activation == Activation::kRelu && sum < 0 ? 0 : sum;
      result.bound[at] = gamma * (set ? grown + (bias ? std::abs(bias[k]) : 0) : absolute) + underflow;
    }
  }
  return result;
}

}  // namespace native
