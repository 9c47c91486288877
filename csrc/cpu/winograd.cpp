// SPDX-License-Identifier: MIT
// The Winograd rows: F(2x2, 3x3), F(4x4, 3x3), F(6x6, 3x3) for stride 1, and the polyphase row for stride 2.
//
// The output is cut into tiles, exactly: the last tiles of a row or column are of a smaller class. A block is some rows
// of tiles, of one or more images. Its inputs are transformed to V; for each point, V times the packed weights gives M;
// M is transformed to outputs. With large weights a block is as high as pays for reading them. Each thread takes blocks
// of its own; but where it would have too few tiles for such weights, all threads work on one block, and split first
// its channels, then its output channels: half of V then comes from another core. Every output is computed by the same
// operations in the same order, however the work is cut.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/winograd_points.h"
#include "cpu/blocked_row.h"
#include "cpu/cost.h"
#include "cpu/target.h"

namespace repvgg::cpu {
namespace {

constexpr int64_t kCacheBytes =
    640 * 1024;  // of V and M of a thread's own block: measured best beside a second-level cache of 512
constexpr int64_t kSmallWeights = 1024 * 1024;  // packed weights that stay in the caches while blocks pass by
constexpr int64_t kLargeTiles = 64;             // tiles that pay for reading larger weights
constexpr int64_t kOwnTiles = 20;               // tiles of a thread that pay for reading them by itself
constexpr int64_t kProductBytes = 320 * 1024;   // of M at a time

struct Scheme {
  const WinogradPoints& set;
  int stride;

  int points() const { return set.points() + stride - 1; }
  int outputs(int cls) const { return 2 * cls + stride - 1; }
  bool is_direct(int point) const { return point == set.points(); }
  // The least class that has the point.
  int least_class(int point) const { return point == 0 || point >= set.points() - 1 ? 0 : (point + 1) / 2; }
};

Scheme scheme_of(WinogradScheme scheme) {
  switch (scheme) {
    case kWinograd2: return {kPoints2, 1};
    case kWinograd4: return {kPoints4, 1};
    case kWinograd6: return {kPoints6, 1};
    default: return {kPoints4, 2};
  }
}

// Cuts `outputs` into tiles of descending class.
std::vector<Tile> cut_tiles(const Scheme& scheme, int64_t outputs) {
  std::vector<Tile> tiles;
  int cls = scheme.set.pairs;
  for (int64_t start = 0; start < outputs;) {
    const int64_t left = outputs - start;
    if (scheme.stride == 1) {
      cls = static_cast<int>(std::min<int64_t>(cls, (left + 1) / 2));
    } else {
      while (scheme.outputs(cls) > left) --cls;
    }
    tiles.push_back({0, start, std::min<int64_t>(left, scheme.outputs(cls)), start, cls});
    start += scheme.outputs(cls);
  }
  return tiles;
}

// How a problem is cut.
struct Plan {
  Scheme scheme;
  std::vector<Tile> rows, cols;  // of one image
  GroupBlocks group;
  int64_t tile_rows;  // of all images
  int64_t block_rows, blocks;
  bool shared;  // all threads work on one block
  int64_t panels_at_a_time;
  int64_t v_floats, m_floats;

  Plan(const Scheme& s, const ConvProblem& prob, int threads)
      : scheme(s), rows(cut_tiles(s, prob.P())), cols(cut_tiles(s, prob.Q())), group(prob) {
    tile_rows = prob.N * static_cast<int64_t>(rows.size());
    const int64_t points = s.points() * s.points();
    const int64_t weights = 4 * points * group.weights();
    const int64_t v_row = 4 * point_floats(1, group.c_blocks),
                  m_row = 4 * point_floats(1, group.panels * group.vectors);
    const int64_t tiles = static_cast<int64_t>(cols.size());
    const bool large = weights > kSmallWeights;
    shared = large ? threads == 1 || tile_rows / threads * tiles < kOwnTiles : tile_rows < 2 * threads;
    int64_t height = kCacheBytes / (v_row + m_row);
    if (large || shared) height = std::max(height, ceil_div(kLargeTiles, tiles));
    height = std::clamp<int64_t>(height, 1, tile_rows);
    blocks = ceil_div(tile_rows, height);
    if (!shared) blocks = std::min(round_up(blocks, threads), tile_rows);
    block_rows = ceil_div(tile_rows, blocks);
    const int64_t m_panel = 4 * point_floats(block_rows, group.vectors);
    panels_at_a_time = std::clamp<int64_t>(kProductBytes / m_panel, 1, group.panels);
    if (shared) panels_at_a_time = std::min(panels_at_a_time, ceil_div(group.panels, threads));
    v_floats = point_floats(block_rows, group.c_blocks);
    m_floats = point_floats(block_rows, panels_at_a_time * group.vectors);
  }

  // An upper bound of what `height` rows of tiles of all points take, over so many channel blocks.
  int64_t point_floats(int64_t height, int64_t channel_blocks) const {
    std::vector<Tile> full(static_cast<size_t>(height), {0, 0, 0, 0, scheme.set.pairs});
    PointBuffers buffers;
    return lay_out(full, channel_blocks, &buffers);
  }

  // Sets offsets and counts for a block of these rows; returns the floats it takes. An odd number of cache lines
  // separates the points: else they would meet in the same cache sets.
  int64_t lay_out(const std::vector<Tile>& block, int64_t channel_blocks, PointBuffers* out) const {
    const int n = scheme.points();
    const auto count = [&](const std::vector<Tile>& tiles, int point) {
      int64_t sum = 0;
      for (const Tile& tile : tiles) {
        if (scheme.is_direct(point)) {
          sum += scheme.outputs(tile.cls);
        } else {
          sum += tile.cls >= scheme.least_class(point);
        }
      }
      return sum;
    };
    for (int i = 0; i < n; ++i) {
      out->row_count[i] = count(block, i);
      out->col_count[i] = count(cols, i);
    }
    int64_t floats = 0;
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) {
        out->offset[i * n + j] = floats;
        const int64_t lines = ceil_div(out->row_count[i] * out->col_count[j] * channel_blocks * target().lanes, 16);
        floats += 16 * (lines | 1);
      }
    }
    return floats;
  }

  // Rows of tiles of block b, by descending class.
  std::vector<Tile> block(int64_t b) const {
    const int64_t per_image = static_cast<int64_t>(rows.size());
    std::vector<Tile> tiles;
    for (int64_t r = part(tile_rows, b, blocks); r < part(tile_rows, b + 1, blocks); ++r) {
      tiles.push_back(rows[static_cast<size_t>(r % per_image)]);
      tiles.back().image = r / per_image;
    }
    std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.cls > b.cls; });
    int64_t before = 0;
    for (Tile& tile : tiles) {
      tile.before = before;
      before += scheme.outputs(tile.cls);
    }
    return tiles;
  }
};

// One block of tiles of one group.
class Block {
 public:
  Block(const Plan& plan, const WinogradKernels& kernels, const BlockedLayer& layer, int64_t group, int64_t block,
        float* v)
      : plan_(plan), kernels_(kernels), layer_(layer), group_(group), rows_(plan.block(block)) {
    plan.lay_out(rows_, plan.group.c_blocks, &v_);
    v_.data = v;
  }

  // Channel blocks: part i of n.
  void transform_inputs(int64_t i, int64_t n) const {
    const int64_t blocks = plan_.group.c_blocks;
    kernels_.input({tiles(), layer_.x, v_, group_ * blocks, part(blocks, i, n), part(blocks, i + 1, n)});
  }

  // Output channels: part i of n.
  void make_outputs(int64_t i, int64_t n, float* m) const {
    const int64_t end = part(plan_.group.panels, i + 1, n);
    for (int64_t panel = part(plan_.group.panels, i, n); panel < end; panel += plan_.panels_at_a_time) {
      make_panels(panel, std::min(panel + plan_.panels_at_a_time, end), m);
    }
  }

 private:
  TileBlock tiles() const {
    return {rows_.data(), plan_.cols.data(), static_cast<int64_t>(rows_.size()),
            static_cast<int64_t>(plan_.cols.size())};
  }

  void make_panels(int64_t begin, int64_t end, float* m) const {
    const GroupBlocks& group = plan_.group;
    const int n = plan_.scheme.points(), lanes = target().lanes;
    PointBuffers products;
    plan_.lay_out(rows_, (end - begin) * group.vectors, &products);
    products.data = m;
    const int64_t panel_floats = group.channels() * group.width();
    const float* weights = layer_.packed + group_ * n * n * group.weights();
    for (int point = 0; point < n * n; ++point) {
      const int64_t count = v_.row_count[point / n] * v_.col_count[point % n];
      if (count == 0) continue;
      for (int64_t panel = begin; panel < end; ++panel) {
        const float* b = weights + (point * group.panels + panel) * panel_floats;
        // The next panel follows in memory, but for the last one of these: there the next point's begins.
        const float* next = panel + 1 < end ? b + panel_floats : b + (group.panels - (end - 1 - begin)) * panel_floats;
        if (panel + 1 == end && point + 1 == n * n) next = nullptr;
        target().gemm({v_.data + v_.offset[point], b,
                       products.data + products.offset[point] + (panel - begin) * group.vectors * count * lanes,
                       group.c_blocks, count, next},
                      group.vectors);
      }
    }
    const int64_t first = group_ * group.k_blocks, block_end = std::min(end * group.vectors, group.k_blocks);
    kernels_.output({tiles(), layer_.y, products, first, begin * group.vectors, block_end, layer_.epilogue()});
  }

  const Plan& plan_;
  const WinogradKernels& kernels_;
  const BlockedLayer& layer_;
  const int64_t group_;
  const std::vector<Tile> rows_;
  PointBuffers v_;
};

template <WinogradScheme kScheme>
int64_t scratch(const ConvProblem& prob, int threads) {
  const Plan plan(scheme_of(kScheme), prob, threads);
  return plan.shared ? plan.v_floats + threads * plan.m_floats : threads * (plan.v_floats + plan.m_floats);
}

template <WinogradScheme kScheme>
void run(const BlockedLayer& layer) {
  const WinogradKernels& kernels = target().winograd[kScheme];
  const Plan plan(scheme_of(kScheme), layer.prob, layer.threads);
  const int64_t threads = layer.threads, tasks = layer.prob.groups * plan.blocks;
  if (plan.shared) {
    float* const v = layer.scratch;
    for (int64_t task = 0; task < tasks; ++task) {
      const Block block(plan, kernels, layer, task / plan.blocks, task % plan.blocks, v);
      layer.each_thread([&](int64_t thread) { block.transform_inputs(thread, threads); });
      layer.each_thread(
          [&](int64_t thread) { block.make_outputs(thread, threads, v + plan.v_floats + thread * plan.m_floats); });
    }
    return;
  }
  layer.each_thread([&](int64_t thread) {
    float* const v = layer.scratch + thread * (plan.v_floats + plan.m_floats);
    for (int64_t task = part(tasks, thread, threads); task < part(tasks, thread + 1, threads); ++task) {
      const Block block(plan, kernels, layer, task / plan.blocks, task % plan.blocks, v);
      block.transform_inputs(0, 1);
      block.make_outputs(0, 1, v + plan.v_floats);
    }
  });
}

template <WinogradScheme kScheme>
int64_t packed_bytes(const ConvProblem& prob) {
  const int points = scheme_of(kScheme).points();
  return 4 * int64_t{points} * points * prob.groups * GroupBlocks(prob).weights();
}

template <WinogradScheme kScheme>
void pack(const ConvProblem& prob, const PackArgs& args) {
  const GroupBlocks group(prob);
  const int64_t points = scheme_of(kScheme).points(), group_floats = points * points * group.weights();
  args.parallel_for(prob.groups * group.panels, [&](int64_t task) {
    const int64_t g = task / group.panels, panel = task % group.panels;
    target().winograd[kScheme].weight({static_cast<const float*>(args.weight) + g * prob.group_K() * prob.group_C() * 9,
                                       static_cast<float*>(args.packed) + g * group_floats, prob.group_C(),
                                       prob.group_K(), group.vectors, panel, panel + 1});
  });
}

template <WinogradScheme kScheme>
Refusal refuse(const ConvProblem& prob, const Device&) {
  if (const Refusal why = refuse_blocked(prob)) return why;
  const int stride = scheme_of(kScheme).stride;
  if (prob.stride != stride) return stride == 1 ? "stride must be 1" : "stride must be 2";
  return nullptr;
}

template <WinogradScheme kScheme>
double cost(const ConvProblem& prob, const Device&, bool packed) {
  if (kScheme == kWinograd6) return INFINITY;  // less accurate: only where it is asked for
  const Scheme scheme = scheme_of(kScheme);
  double rows = 0, cols = 0;  // products per row and column
  const auto count = [&](int64_t outputs, double* sum) {
    for (const Tile& tile : cut_tiles(scheme, outputs)) {
      *sum += 2 * tile.cls + 2 + (scheme.stride == 2 ? scheme.outputs(tile.cls) : 0);
    }
  };
  count(prob.P(), &rows);
  count(prob.Q(), &cols);
  const GroupBlocks group(prob);
  const double values = rows * cols * static_cast<double>(prob.N * prob.groups);
  const double touched = 4 * values * static_cast<double>(group.channels() + group.panels * group.width()) / 3;
  return blocked_cost(prob, values * static_cast<double>(group.weights()), touched, packed_bytes<kScheme>(prob),
                      packed);
}

}  // namespace

extern const ConvAlgo kWinograd2Algo, kWinograd4Algo, kWinograd6Algo, kPolyphaseAlgo;

namespace {

template <const ConvAlgo& kAlgo>
int64_t workspace(const ConvProblem& prob, const Device& device) {
  return blocked_workspace(kAlgo, prob, device.threads);
}
template <const ConvAlgo& kAlgo>
void launch(const ConvProblem& prob, const ConvArgs& args) {
  blocked_launch(kAlgo, prob, args);
}

template <WinogradScheme kScheme, const ConvAlgo& kAlgo>
constexpr ConvAlgo algo(const char* name) {
  return {name, refuse<kScheme>, cost<kScheme>, packed_bytes<kScheme>, pack<kScheme>, workspace<kAlgo>, launch<kAlgo>};
}

}  // namespace

extern const ConvAlgo kWinograd2Algo = algo<kWinograd2, kWinograd2Algo>("winograd2");
extern const ConvAlgo kWinograd4Algo = algo<kWinograd4, kWinograd4Algo>("winograd4");
extern const ConvAlgo kWinograd6Algo = algo<kWinograd6, kWinograd6Algo>("winograd6");
extern const ConvAlgo kPolyphaseAlgo = algo<kPolyphase, kPolyphaseAlgo>("polyphase");

extern const BlockedRow kWinograd2Row = {&kWinograd2Algo, false, scratch<kWinograd2>, run<kWinograd2>};
extern const BlockedRow kWinograd4Row = {&kWinograd4Algo, false, scratch<kWinograd4>, run<kWinograd4>};
extern const BlockedRow kWinograd6Row = {&kWinograd6Algo, false, scratch<kWinograd6>, run<kWinograd6>};
extern const BlockedRow kPolyphaseRow = {&kPolyphaseAlgo, false, scratch<kPolyphase>, run<kPolyphase>};

}  // namespace repvgg::cpu
