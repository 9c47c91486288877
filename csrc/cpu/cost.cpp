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

double blocked_cost(const ConvProblem& prob, const Device& device, double multiply_adds, double touched,
                    int64_t packed_bytes, bool packed) {
  const double threads = std::max(device.threads, 1), speed = target().lanes / 8.0;
  double seconds = kCallSeconds * 3 + multiply_adds / (kProductsPerSecond * speed * threads);
  seconds += (2 * bytes(prob) + touched) / (kReorderBytesPerSecond * threads);
  if (!packed) seconds += static_cast<double>(packed_bytes) / (kPackBytesPerSecond * threads);
  return std::max(seconds, static_cast<double>(packed_bytes) / kStreamBytesPerSecond);
}

double aten_cost(const ConvProblem& prob, const Device& device) {
  const double threads = std::max(device.threads, 1), speed = target().lanes / 8.0;
  const double compute = products(prob, target().lanes) / (kAtenProductsPerSecond * speed * threads);
  const double weights = 36.0 * static_cast<double>(prob.K * prob.group_C());  // reordered at each call
  return kAtenCallSeconds + compute + (2 * bytes(prob) + 2 * weights) / (kReorderBytesPerSecond * threads);
}

}  // namespace repvgg::cpu
