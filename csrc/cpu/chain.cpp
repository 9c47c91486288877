// SPDX-License-Identifier: MIT
// Runs layers one after another between two buffers of the inner layout. Where a batch would outgrow the caches and the
// weights would not, images go through several layers one by one; where weights dominate, the batch stays together.
#include "cpu/chain.h"

#include <algorithm>
#include <vector>

#include "cpu/blocked_row.h"

namespace repvgg::cpu {

extern const BlockedRow kWinograd2Row, kWinograd4Row, kWinograd6Row, kPolyphaseRow, kDirectRow, kStemRow;

namespace {

constexpr int64_t kAlign = 64;
// A layer's packed weights against one image's activations, below which images go one by one.
constexpr int64_t kWeightsPerImage = 6;

Blocked input_of(const ConvProblem& prob, int64_t images) {
  return {nullptr, images, prob.C, prob.H, prob.W, target().lanes};
}
Blocked output_of(const ConvProblem& prob, int64_t images) {
  return {nullptr, images, prob.K, prob.P(), prob.Q(), target().lanes};
}
int64_t aligned(int64_t floats) { return round_up(floats, kAlign / 4); }

// Layers [begin, end), `images` at a time; with `spread` each thread takes images of its own.
struct Segment {
  int begin, end;
  int64_t images;
  bool spread;
};

bool by_image(const ChainLayer& layer) {
  const int64_t activations = 4 * (input_of(layer.prob, 1).floats() + output_of(layer.prob, 1).floats());
  return layer.algo->packed_bytes(layer.prob) <= kWeightsPerImage * activations;
}

std::vector<Segment> cut(const ChainLayer* layers, int n, int threads) {
  std::vector<Segment> segments;
  const int64_t N = layers[0].prob.N;
  for (int i = 0; i < n;) {
    const bool single = N > 1 && by_image(layers[i]);
    int end = i + 1;
    while (end < n && (N > 1 && by_image(layers[end])) == single) ++end;
    const bool spread = single && threads > 1 && N >= threads;
    segments.push_back({i, end, single ? 1 : N, spread});
    i = end;
  }
  return segments;
}

// Workspace of one pass over a segment: two activation buffers and the rows' scratch.
struct PassSizes {
  int64_t buffer = 0, scratch = 0;
  int64_t floats() const { return 2 * buffer + scratch; }
};

PassSizes pass_sizes(const ChainLayer* layers, const Segment& segment, int threads) {
  PassSizes sizes;
  for (int i = segment.begin; i < segment.end; ++i) {
    ConvProblem prob = layers[i].prob;
    prob.N = segment.images;
    const BlockedRow* row = find_blocked_row(layers[i].algo);
    if (!row->reads_dense) sizes.buffer = std::max(sizes.buffer, aligned(input_of(prob, prob.N).floats()));
    sizes.buffer = std::max(sizes.buffer, aligned(output_of(prob, prob.N).floats()));
    sizes.scratch = std::max(sizes.scratch, aligned(row->scratch(prob, threads)));
  }
  return sizes;
}

// Floats of the activations of the whole batch that stand between two segments.
int64_t handover_floats(const ChainLayer* layers, const std::vector<Segment>& segments) {
  int64_t most = 0;
  for (size_t s = 0; s + 1 < segments.size(); ++s) {
    const ConvProblem& prob = layers[segments[s].end - 1].prob;
    most = std::max(most, aligned(output_of(prob, prob.N).floats()));
  }
  return most;
}

int64_t segments_floats(const ChainLayer* layers, const std::vector<Segment>& segments, int threads) {
  int64_t most = 0;
  for (const Segment& segment : segments) {
    const int64_t one = pass_sizes(layers, segment, segment.spread ? 1 : threads).floats();
    most = std::max(most, one * (segment.spread ? threads : 1));
  }
  return most;
}

// Zeroes what lies around the pixels of a channel block.
void clear_border(const Blocked& t, int64_t n, int64_t block) {
  float* corner = t.corner(n, block);
  const int64_t pitch = t.pitch();
  std::fill(corner, corner + pitch, 0.0f);
  for (int64_t h = 1; h <= t.H; ++h) {
    float* row = corner + h * pitch;
    std::fill(row, row + t.lanes, 0.0f);
    std::fill(row + (t.W + 1) * t.lanes, row + pitch, 0.0f);
  }
  std::fill(corner + (t.H + 1) * pitch, corner + (t.H + 3) * pitch, 0.0f);
}

// One of the two buffers: knows for which extents its borders are clear.
struct Buffer {
  float* data = nullptr;
  Blocked last = {};

  Blocked hold(Blocked shape) {
    shape.data = data;
    if (shape.N != last.N || shape.C != last.C || shape.H != last.H || shape.W != last.W) {
      for (int64_t n = 0; n < shape.N; ++n) {
        for (int64_t block = 0; block < shape.blocks(); ++block) clear_border(shape, n, block);
      }
      last = shape;
    }
    return shape;
  }
};

Blocked images_of(Blocked t, int64_t first, int64_t count) {
  t.data += first * t.image();
  t.N = count;
  return t;
}

struct Chain {
  const ChainLayer* layers;
  int n;
  const ChainArgs& args;

  // Images [first, first + segment.images) through the layers of a segment. `from`, `to`: activations of the whole
  // batch before and after, data == nullptr at the ends of the chain.
  void pass(const Segment& segment, int64_t first, Blocked from, Blocked to, float* workspace, int threads) const {
    const PassSizes sizes = pass_sizes(layers, segment, threads);
    Buffer buffers[2];
    buffers[0].data = workspace;
    buffers[1].data = workspace + sizes.buffer;
    const BlockedRow* row = find_blocked_row(layers[segment.begin].algo);
    BlockedLayer layer = {};
    layer.scratch = workspace + 2 * sizes.buffer;
    layer.threads = threads;
    layer.parallel_for = &args.parallel_for;
    int side = 0;
    const ConvProblem& head = layers[segment.begin].prob;
    Blocked x = input_of(head, segment.images);
    const float* dense = args.x + first * head.C * head.H * head.W;
    if (from.data != nullptr) {
      x = images_of(from, first, segment.images);
    } else if (!row->reads_dense) {
      x = buffers[side].hold(x);
      reorder(x, const_cast<float*>(dense), args.x_layout, target().to_inner, threads);
      side = 1;
    }
    for (int i = segment.begin; i < segment.end; ++i) {
      layer.prob = layers[i].prob;
      layer.prob.N = segment.images;
      layer.x = x;
      layer.dense = dense;
      layer.dense_layout = args.x_layout;
      layer.packed = static_cast<const float*>(layers[i].packed);
      layer.bias = layers[i].bias;
      const bool last = i + 1 == segment.end;
      layer.y = last && to.data != nullptr ? images_of(to, first, segment.images)
                                           : buffers[side].hold(output_of(layer.prob, segment.images));
      find_blocked_row(layers[i].algo)->run(layer);
      x = layer.y;
      side = 1 - side;
    }
    if (to.data == nullptr) {
      reorder(x, args.y + first * x.C * x.H * x.W, args.y_layout, target().from_inner, threads);
    }
  }

  void reorder(const Blocked& inner, float* dense, Layout layout, void (*kernel)(const Reorder&), int threads) const {
    const int64_t tasks = inner.N * inner.blocks();
    const auto some = [&](int64_t thread) {
      for (int64_t task = part(tasks, thread, threads); task < part(tasks, thread + 1, threads); ++task) {
        kernel({inner, dense, layout, task / inner.blocks(), task % inner.blocks(), 0, inner.H});
      }
    };
    if (threads == 1) return some(0);
    args.parallel_for(threads, some);
  }

  void run_segment(const Segment& segment, Blocked from, Blocked to, float* workspace) const {
    const int64_t N = layers[0].prob.N, threads = args.threads;
    int64_t done = 0;
    if (segment.spread) {  // as many images at a time as there are threads
      done = N / threads * threads;
      const int64_t floats = pass_sizes(layers, segment, 1).floats();
      args.parallel_for(threads, [&](int64_t thread) {
        for (int64_t i = thread; i < done; i += threads) pass(segment, i, from, to, workspace + thread * floats, 1);
      });
    }
    for (; done < N; done += segment.images) {
      const bool alone = segment.spread;  // the workspace was measured for single threads
      pass(segment, done, from, to, workspace, alone ? 1 : static_cast<int>(threads));
    }
  }
};

}  // namespace

const BlockedRow* find_blocked_row(const ConvAlgo* algo) {
  for (const BlockedRow* row :
       {&kWinograd4Row, &kWinograd2Row, &kWinograd6Row, &kPolyphaseRow, &kDirectRow, &kStemRow}) {
    if (row->algo == algo) return row;
  }
  return nullptr;
}

int chain_length(const ChainLayer* layers, int n) {
  int length = 0;
  for (; length < n; ++length) {
    const BlockedRow* row = layers[length].algo ? find_blocked_row(layers[length].algo) : nullptr;
    if (row == nullptr || (row->reads_dense && length > 0)) break;
  }
  return length;
}

int64_t chain_workspace(const ChainLayer* layers, int n, int threads) {
  if (layers[0].prob.N == 0) return 0;
  const std::vector<Segment> segments = cut(layers, n, threads);
  return 4 * (2 * handover_floats(layers, segments) + segments_floats(layers, segments, threads)) + kAlign;
}

void run_chain(const ChainLayer* layers, int n, const ChainArgs& args) {
  if (layers[0].prob.N == 0) return;
  const std::vector<Segment> segments = cut(layers, n, args.threads);
  const auto address = reinterpret_cast<uintptr_t>(args.workspace);
  auto* const base = reinterpret_cast<float*>((address + kAlign - 1) / kAlign * kAlign);
  const int64_t handover = handover_floats(layers, segments);
  const Chain chain = {layers, n, args};
  Blocked from = {};
  for (size_t s = 0; s < segments.size(); ++s) {
    Blocked to = {};
    if (s + 1 < segments.size()) {
      Buffer buffer;
      buffer.data = base + s % 2 * handover;
      to = buffer.hold(output_of(layers[segments[s].end - 1].prob, layers[0].prob.N));
    }
    chain.run_segment(segments[s], from, to, base + 2 * handover);
    from = to;
  }
}

Refusal refuse_blocked(const ConvProblem& prob) {
  if (prob.dtype != DType::kFloat32) return "x must be float32";
  if (prob.groups > 1 && (prob.group_C() % target().lanes != 0 || prob.group_K() % target().lanes != 0)) {
    return "with groups, the channels of a group must be a multiple of the vector width";
  }
  return nullptr;
}

int64_t blocked_workspace(const ConvAlgo& algo, const ConvProblem& prob, int threads) {
  const ChainLayer layer = {prob, &algo, nullptr, nullptr};
  return chain_workspace(&layer, 1, threads);
}

void blocked_launch(const ConvAlgo& algo, const ConvProblem& prob, const ConvArgs& args) {
  const ChainLayer layer = {prob, &algo, args.packed, static_cast<const float*>(args.bias)};
  run_chain(&layer, 1,
            {static_cast<const float*>(args.x), static_cast<float*>(args.y), prob.layout, prob.layout, args.workspace,
             args.device.threads, args.parallel_for});
}

}  // namespace repvgg::cpu
