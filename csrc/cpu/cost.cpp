// SPDX-License-Identifier: MIT
#include "cpu/cost.h"

#include <algorithm>

#include "cpu/blocked_row.h"
#include "cpu/target.h"

namespace repvgg::cpu {
namespace {

double bytes(const ConvProblem& prob) {
  return 4.0 * static_cast<double>(prob.N) * (prob.C * prob.H * prob.W + prob.K * prob.P() * prob.Q());
}

}  // namespace

double products(const ConvProblem& prob, int lanes) {
  return 9.0 * static_cast<double>(prob.N * prob.P() * prob.Q() * prob.groups) *
         static_cast<double>(round_up(prob.group_C(), lanes) * round_up(prob.group_K(), lanes));
}

double blocked_cost(const ConvProblem& prob, double multiply_adds, double touched, int64_t packed_bytes, bool packed) {
  const double speed = target().lanes / 8.0;
  double seconds = kCallSeconds * 3 + multiply_adds / (kProductsPerSecond * speed);
  seconds += touched / kReorderBytesPerSecond;
  if (!packed) seconds += 2 * bytes(prob) / kReorderBytesPerSecond;
  if (!packed) seconds += static_cast<double>(packed_bytes) / (kPackBytesPerSecond);
  return std::max(seconds, static_cast<double>(packed_bytes) / kStreamBytesPerSecond);
}

double aten_cost(const ConvProblem& prob, const Device&) {
  const double speed = target().lanes / 8.0;
  const double compute = products(prob, target().lanes) / (kAtenProductsPerSecond * speed);
  const double weights = 36.0 * static_cast<double>(prob.K * prob.group_C());  // reordered at each call
  return kAtenCallSeconds + compute + (2 * bytes(prob) + 2 * weights) / (kReorderBytesPerSecond);
}

}  // namespace repvgg::cpu
