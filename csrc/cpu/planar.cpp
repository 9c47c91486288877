// SPDX-License-Identifier: MIT
// The planar row, float32, pixels as vector lanes: when it applies, how the work is cut, staged and shared among
// threads.
//
// A task is a strip of output rows of one image, for a range of output channels of one group. It stages the strip's
// input rows with their zero border into its thread's workspace, channel by channel and, for stride 2, split by the
// parity of row and column: then what a tap needs for consecutive outputs is consecutive in memory. A strip's positions
// run over the border columns too (two of W + 2 are computed for nothing), so that no row has a tail of its own.
#include <algorithm>

#include "core/conv_algo.h"
#include "core/epilogue.h"
#include "cpu/blocked_row.h"
#include "cpu/cost.h"
#include "cpu/target.h"

namespace repvgg::cpu {
namespace {

constexpr int64_t kStageBytes = 384 * 1024;  // of staged input: most of a second-level cache
constexpr int64_t kSumsBytes = 24 * 1024;    // of finished sums: they must still be in the first level for the epilogue
constexpr int64_t kPadding = 256;            // floats past the end: the last block of a strip reads beyond it
constexpr int64_t kAlign = 64;

// How a problem is cut. Depends on the number of threads; the sums do not.
struct Plan {
  int64_t strip_P;                       // output rows per strip
  int64_t phase_H, pitch, phase_stride;  // staged rows and columns of one parity, and their extent
  int64_t channel_stride;                // all parities
  int64_t positions;                     // per strip, rounded up to the target's block
  int64_t strips, k_parts, k_per_part;   // per image and group; channels come in multiples of kPlanarBlockK
  int64_t stage_floats, sums_floats;     // of one thread

  Plan(const ConvProblem& prob, int threads) {
    const int64_t s = prob.stride, C = prob.group_C(), block = target().planar_block;
    pitch = prob.Q() + (s == 1 ? 2 : 1);
    const int64_t stage_row = C * s * s * pitch * 4, sums_row = kPlanarBlockK * pitch * 4;
    strip_P = std::clamp<int64_t>(std::min(kStageBytes / stage_row, kSumsBytes / sums_row), 1, prob.P());
    strips = (prob.P() + strip_P - 1) / strip_P;
    strip_P = (prob.P() + strips - 1) / strips;  // of equal height
    strips = (prob.P() + strip_P - 1) / strip_P;
    const int64_t k_blocks = (prob.group_K() + kPlanarBlockK - 1) / kPlanarBlockK;
    const int64_t images = std::max<int64_t>(prob.N, 1) * prob.groups * strips;
    k_parts = std::clamp<int64_t>((2 * threads + images - 1) / images, 1, k_blocks);
    if (images % threads == 0) k_parts = 1;
    k_per_part = (k_blocks + k_parts - 1) / k_parts * kPlanarBlockK;
    k_parts = (prob.group_K() + k_per_part - 1) / k_per_part;
    phase_H = strip_P + (s == 1 ? 2 : 1);
    phase_stride = phase_H * pitch;
    channel_stride = s * s * phase_stride;
    positions = round_up(strip_P * pitch, block);
    stage_floats = round_up(C * channel_stride + kPadding, kAlign / 4);
    sums_floats = round_up(kPlanarBlockK * positions, kAlign / 4);
  }

  int64_t tasks(const ConvProblem& prob) const { return prob.N * prob.groups * strips * k_parts; }
  int64_t thread_floats() const { return stage_floats + sums_floats; }
};

// Copies input row h of channel c (nullptr: a row of zeros) into its parity's rows. Columns -1 and W are zero.
void stage_row(const ConvProblem& prob, const Plan& plan, const float* row, int64_t step, float* even, float* odd) {
  const int64_t Q = prob.Q(), W = prob.W;
  if (prob.stride == 1) {  // even[j] is column j - 1
    if (row == nullptr) {
      std::fill(even, even + plan.pitch, 0.0f);
      return;
    }
    even[0] = 0.0f;
    if (step == 1) {
      std::copy(row, row + W, even + 1);
    } else {
      for (int64_t w = 0; w < W; ++w) even[w + 1] = row[w * step];
    }
    even[W + 1] = 0.0f;
    return;
  }
  // even[j] is column 2 j - 1, odd[j] is column 2 j; the last of even is column W, outside, where W is odd
  if (row == nullptr) {
    std::fill(even, even + plan.pitch, 0.0f);
    std::fill(odd, odd + plan.pitch, 0.0f);
    return;
  }
  even[0] = even[Q] = odd[Q] = 0.0f;
  for (int64_t j = 0; j < Q; ++j) odd[j] = row[2 * j * step];
  for (int64_t j = 1; j <= W / 2; ++j) even[j] = row[(2 * j - 1) * step];
}

// Stages the strip that starts at output row p0.
void stage(const ConvProblem& prob, const Plan& plan, int64_t n, int64_t group, int64_t p0, const float* x,
           float* staged) {
  const int64_t s = prob.stride, C = prob.group_C();
  const bool nchw = prob.layout == Layout::kNCHW;
  const int64_t step = nchw ? 1 : prob.C;
  for (int64_t c = 0; c < C; ++c) {
    const int64_t channel = group * C + c;
    float* plane = staged + c * plan.channel_stride;
    for (int64_t i = 0; i < plan.phase_H * s; ++i) {  // i: staged row, of parity i % s
      const int64_t h = p0 * s + i - 1;
      const bool inside = h >= 0 && h < prob.H;
      const float* row = !inside ? nullptr
                         : nchw  ? x + ((n * prob.C + channel) * prob.H + h) * prob.W
                                 : x + (n * prob.H + h) * prob.W * prob.C + channel;
      float* even = plane + (i % s) * s * plan.phase_stride + (i / s) * plan.pitch;
      stage_row(prob, plan, row, step, even, even + plan.phase_stride);
    }
  }
}

// Writes `count` channels from k on, rows [p0, p0 + rows), with bias and activation.
void finish(const ConvProblem& prob, const Plan& plan, const Epilogue& epilogue, int64_t n, int64_t k, int count,
            int64_t p0, int64_t rows, const float* sums, float* y) {
  const int64_t P = prob.P(), Q = prob.Q();
  for (int i = 0; i < count; ++i) {
    const Epilogue::Channel channel = epilogue.channel(k + i);
    for (int64_t p = 0; p < rows; ++p) {
      const float* sum = sums + i * plan.positions + p * plan.pitch;
      if (prob.layout == Layout::kNCHW) {
        float* row = y + ((n * prob.K + k + i) * P + p0 + p) * Q;
        for (int64_t q = 0; q < Q; ++q) row[q] = channel(sum[q]);
      } else {
        float* row = y + (n * P + p0 + p) * Q * prob.K + k + i;
        for (int64_t q = 0; q < Q; ++q) row[q * prob.K] = channel(sum[q]);
      }
    }
  }
}

void run_task(const ConvProblem& prob, const Plan& plan, const ConvArgs& args, int64_t task, float* workspace) {
  const int64_t part = task % plan.k_parts, strip_index = task / plan.k_parts % plan.strips;
  const int64_t group = task / plan.k_parts / plan.strips % prob.groups;
  const int64_t n = task / plan.k_parts / plan.strips / prob.groups;
  const int64_t p0 = strip_index * plan.strip_P, rows = std::min(plan.strip_P, prob.P() - p0);
  float* staged = workspace;
  float* sums = workspace + plan.stage_floats;
  stage(prob, plan, n, group, p0, static_cast<const float*>(args.x), staged);

  PlanarStrip strip{staged, nullptr, sums, prob.group_C(), plan.channel_stride, plan.positions, {}};
  for (int r = 0; r < 3; ++r) {
    for (int s = 0; s < 3; ++s) {
      const int64_t stride = prob.stride, phase = r % stride * stride + s % stride;
      strip.offset[r * 3 + s] = phase * plan.phase_stride + r / stride * plan.pitch + s / stride;
    }
  }
  const Epilogue epilogue{static_cast<const float*>(args.bias), prob.activation};
  const int64_t k_end = std::min((part + 1) * plan.k_per_part, prob.group_K());
  for (int64_t k = part * plan.k_per_part; k < k_end; k += kPlanarBlockK) {
    const int count = static_cast<int>(std::min<int64_t>(kPlanarBlockK, k_end - k));
    const int64_t k_out = group * prob.group_K() + k;
    strip.w = static_cast<const float*>(args.weight) + k_out * prob.group_C() * 9;
    target().planar(strip, count);
    finish(prob, plan, epilogue, n, k_out, count, p0, rows, sums, static_cast<float*>(args.y));
  }
}

Refusal refuse(const ConvProblem& prob, const Device&) {
  return prob.dtype == DType::kFloat32 ? nullptr : "x must be float32";
}

double cost(const ConvProblem& prob, const Device&, bool) {
  const double speed = target().lanes / 8.0;
  const double k = static_cast<double>(prob.K) / static_cast<double>(prob.group_K()) *
                   static_cast<double>(round_up(prob.group_K(), kPlanarBlockK));
  const double values = 9.0 * static_cast<double>(prob.N * prob.group_C() * prob.P() * (prob.Q() + 2)) * k;
  const double strided = prob.layout == Layout::kNHWC ? 4 : 1;  // channels_last is read and written value by value
  const double bytes = 4.0 * static_cast<double>(prob.N) * (prob.C * prob.H * prob.W + prob.K * prob.P() * prob.Q());
  return kCallSeconds + values / (kPlanarProductsPerSecond * speed) + strided * bytes / kReorderBytesPerSecond;
}

int64_t workspace(const ConvProblem& prob, const Device& device) {
  return Plan(prob, device.threads).thread_floats() * 4 * device.threads + kAlign;
}

void launch(const ConvProblem& prob, const ConvArgs& args) {
  const int threads = args.device.threads;
  const Plan plan(prob, threads);
  const auto address = reinterpret_cast<uintptr_t>(args.workspace);
  auto* const base = reinterpret_cast<float*>((address + kAlign - 1) / kAlign * kAlign);
  const int64_t tasks = plan.tasks(prob);
  args.parallel_for(threads, [&](int64_t thread) {
    for (int64_t task = thread; task < tasks; task += threads) {
      run_task(prob, plan, args, task, base + thread * plan.thread_floats());
    }
  });
}

}  // namespace

extern const ConvAlgo kPlanarAlgo = {"planar", refuse, cost, no_bytes, no_pack, workspace, launch};

}  // namespace repvgg::cpu
