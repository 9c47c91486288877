// SPDX-License-Identifier: MIT
// The direct rows of the inner layout: `direct` for any stride, `stem` for the first layer's few input channels.
#include <algorithm>

#include "cpu/blocked_row.h"
#include "cpu/cost.h"
#include "cpu/target.h"

namespace repvgg::cpu {

extern const ConvAlgo kDirectAlgo, kStemAlgo;

namespace {

constexpr int64_t kPixelsPerTask = 120;  // their sums stay in the first-level cache beside the weights
constexpr int64_t kMaxStemChannels = 8;

int64_t packed_bytes(const ConvProblem& prob) { return 4 * 9 * prob.groups * GroupBlocks(prob).weights(); }

// Calls f(panel, c, tap, k, weight) for each weight of a group, k counted within the panel.
template <class F>
void for_panel(const ConvProblem& prob, const GroupBlocks& group, const float* weight, int64_t panel, const F& f) {
  const int64_t first = panel * group.width(), count = std::min(group.width(), prob.group_K() - first);
  for (int64_t k = 0; k < count; ++k) {
    const float* w = weight + (first + k) * prob.group_C() * 9;
    for (int64_t c = 0; c < prob.group_C(); ++c) {
      for (int64_t tap = 0; tap < 9; ++tap) f(c, tap, k, w[c * 9 + tap]);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- direct

void pack_direct(const ConvProblem& prob, const PackArgs& args) {
  const GroupBlocks group(prob);
  const int64_t lanes = target().lanes, width = group.width(), panel_floats = 9 * group.channels() * width;
  args.parallel_for(prob.groups * group.panels, [&](int64_t task) {
    float* out = static_cast<float*>(args.packed) + task * panel_floats;
    std::fill(out, out + panel_floats, 0.0f);
    const float* w = static_cast<const float*>(args.weight) + task / group.panels * prob.group_K() * prob.group_C() * 9;
    for_panel(prob, group, w, task % group.panels, [&](int64_t c, int64_t tap, int64_t k, float value) {
      out[((c / lanes * 9 + tap) * lanes + c % lanes) * width + k] = value;
    });
  });
}

int64_t direct_scratch(const ConvProblem& prob, int threads) {
  return threads * (kPixelsPerTask + 16) * GroupBlocks(prob).width();
}

void run_direct(const BlockedLayer& layer) {
  const ConvProblem& prob = layer.prob;
  const GroupBlocks group(prob);
  const int64_t pixels = prob.P() * prob.Q(), strips = ceil_div(pixels, kPixelsPerTask), threads = layer.threads;
  // Panels are split too where there are too few strips for the threads.
  const int64_t images = prob.N * prob.groups * strips;
  const int64_t parts = images >= 4 * threads ? 1 : std::min(group.panels, ceil_div(4 * threads, images));
  const int64_t tasks = images * parts, scratch = direct_scratch(prob, 1);
  layer.each_thread([&](int64_t thread) {
    for (int64_t task = part(tasks, thread, threads); task < part(tasks, thread + 1, threads); ++task) {
      // Strips innermost: consecutive tasks of a thread use the same weights.
      const int64_t strip = task % strips, p = task / strips % parts, g = task / strips / parts % prob.groups;
      DirectArgs args = {};
      args.x = layer.x;
      args.y = layer.y;
      args.n = task / strips / parts / prob.groups;
      args.x_first = g * group.c_blocks;
      args.y_first = g * group.k_blocks;
      args.c_blocks = group.c_blocks;
      args.k_blocks = group.k_blocks;
      args.panels = group.panels;
      args.begin = part(group.panels, p, parts);
      args.end = part(group.panels, p + 1, parts);
      args.first_pixel = part(pixels, strip, strips);
      args.last_pixel = part(pixels, strip + 1, strips);
      args.stride = prob.stride;
      args.vectors = group.vectors;
      args.packed = layer.packed + g * 9 * group.weights();
      args.sums = layer.scratch + thread * scratch;
      args.epilogue = layer.epilogue();
      target().direct(args);
    }
  });
}

Refusal refuse_direct(const ConvProblem& prob, const Device&) { return refuse_blocked(prob); }

double direct_cost(const ConvProblem& prob, const Device&, bool packed) {
  return blocked_cost(prob, products(prob, target().lanes), 0, packed_bytes(prob), packed);
}

// --------------------------------------------------------------------------------------------------------------- stem

int64_t stem_bytes(const ConvProblem& prob) {
  const GroupBlocks group(prob);
  return 4 * 9 * group.panels * group.width() * prob.C;
}

void pack_stem(const ConvProblem& prob, const PackArgs& args) {
  const GroupBlocks group(prob);
  const int64_t width = group.width(), panel_floats = 9 * prob.C * width;
  args.parallel_for(group.panels, [&](int64_t panel) {
    float* out = static_cast<float*>(args.packed) + panel * panel_floats;
    std::fill(out, out + panel_floats, 0.0f);
    for_panel(prob, group, static_cast<const float*>(args.weight), panel,
              [&](int64_t c, int64_t tap, int64_t k, float value) { out[(c * 9 + tap) * width + k] = value; });
  });
}

// A staged row: the input with a zero before it and after it.
int64_t stem_pitch(const ConvProblem& prob) { return round_up(prob.W + 2, 16); }

int64_t stem_scratch(const ConvProblem& prob, int threads) { return threads * 3 * prob.C * stem_pitch(prob); }

void stage_stem_row(const BlockedLayer& layer, int64_t n, int64_t p, float* staged) {
  const ConvProblem& prob = layer.prob;
  const bool nchw = layer.dense_layout == Layout::kNCHW;
  const int64_t step = nchw ? 1 : prob.C, pitch = stem_pitch(prob);
  for (int64_t row = 0; row < 3 * prob.C; ++row) {
    const int64_t c = row / 3, h = p * prob.stride + row % 3 - 1;
    float* out = staged + row * pitch;
    if (h < 0 || h >= prob.H) {
      std::fill(out, out + prob.W + 2, 0.0f);
      continue;
    }
    const float* in = nchw ? layer.dense + ((n * prob.C + c) * prob.H + h) * prob.W
                           : layer.dense + (n * prob.H + h) * prob.W * prob.C + c;
    out[0] = out[prob.W + 1] = 0.0f;
    for (int64_t w = 0; w < prob.W; ++w) out[w + 1] = in[w * step];
  }
}

void run_stem(const BlockedLayer& layer) {
  const ConvProblem& prob = layer.prob;
  const GroupBlocks group(prob);
  const int64_t rows = prob.N * prob.P(), threads = layer.threads;
  layer.each_thread([&](int64_t thread) {
    float* const staged = layer.scratch + thread * stem_scratch(prob, 1);
    for (int64_t row = part(rows, thread, threads); row < part(rows, thread + 1, threads); ++row) {
      const int64_t n = row / prob.P(), p = row % prob.P();
      stage_stem_row(layer, n, p, staged);
      target().stem({staged, prob.C, stem_pitch(prob), layer.y, n, p, group.panels, prob.stride, group.vectors,
                     layer.packed, layer.epilogue()});
    }
  });
}

Refusal refuse_stem(const ConvProblem& prob, const Device&) {
  if (prob.dtype != DType::kFloat32) return "x must be float32";
  if (prob.groups != 1) return "groups must be 1";
  return prob.C <= kMaxStemChannels ? nullptr : "C_in must be at most 8";
}

double stem_cost(const ConvProblem& prob, const Device&, bool packed) {
  const double outputs = static_cast<double>(prob.N * prob.P() * prob.Q() * round_up(prob.K, target().lanes));
  return blocked_cost(prob, 1.6 * 9 * static_cast<double>(prob.C) * outputs, 2 * outputs, stem_bytes(prob), packed);
}

int64_t direct_workspace(const ConvProblem& prob, const Device& device) {
  return blocked_workspace(kDirectAlgo, prob, device.threads);
}
void launch_direct(const ConvProblem& prob, const ConvArgs& args) { blocked_launch(kDirectAlgo, prob, args); }
int64_t stem_workspace(const ConvProblem& prob, const Device& device) {
  return blocked_workspace(kStemAlgo, prob, device.threads);
}
void launch_stem(const ConvProblem& prob, const ConvArgs& args) { blocked_launch(kStemAlgo, prob, args); }

}  // namespace

extern const ConvAlgo kDirectAlgo = {"direct",    refuse_direct,    direct_cost,  packed_bytes,
                                     pack_direct, direct_workspace, launch_direct};
extern const ConvAlgo kStemAlgo = {"stem", refuse_stem, stem_cost, stem_bytes, pack_stem, stem_workspace, launch_stem};

extern const BlockedRow kDirectRow = {&kDirectAlgo, false, direct_scratch, run_direct};
extern const BlockedRow kStemRow = {&kStemAlgo, true, stem_scratch, run_stem};

}  // namespace repvgg::cpu
