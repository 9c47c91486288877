// SPDX-License-Identifier: MIT
// What the launch code and the code of each instruction set say to each other: plain structs of pointers and extents,
// and one table of functions per instruction set.
#pragma once

#include <cstdint>

#include "core/conv_problem.h"
#include "core/epilogue.h"
#include "cpu/blocked.h"

namespace repvgg::cpu {

// ------------------------------------------------------------------------------------------------------------- planar

// Output channels per register block; a last block may have fewer.
constexpr int kPlanarBlockK = 6;

// The sums of `count` output channels over a strip of staged input.
//   x: [C][channel_stride]; the value that tap t needs for position i is x[c * channel_stride + offset[t] + i]
//   w: channel k's weights at w + k * C * 9, [C][9]
//   sums: [count][positions], positions a multiple of the target's planar_block
struct PlanarStrip {
  const float* x;
  const float* w;
  float* sums;
  int64_t C, channel_stride, positions;
  int64_t offset[9];
};

// --------------------------------------------------------------------------------------------------------------- GEMM

// m[k][t] (+)= sum over c of a[c][t] * b[c][k], for a panel of `vectors` vectors of k and all tiles t.
//   a: [c_blocks][tiles][lanes]    b: [c_blocks * lanes][vectors * lanes]    m: [vectors][tiles][lanes]
struct GemmPanel {
  const float* a;
  const float* b;
  float* m;
  int64_t c_blocks, tiles;
  const float* next;  // fetched into the cache meanwhile: as many floats as b has; or nullptr
};

// --------------------------------------------------------------------------------------------- Winograd and polyphase

// A tile in one dimension: class n (its pairs of points) and the outputs it makes, of which the last may lie outside.
struct Tile {
  int64_t image;   // of a row of tiles; unused for columns
  int64_t start;   // first output
  int64_t valid;   // outputs inside
  int64_t before;  // outputs of the tiles before it in the block
  int cls;
};

// The rows of tiles that are transformed together, and the columns. Both are sorted by class, descending: so the tiles
// that have a given point are the first ones.
struct TileBlock {
  const Tile* rows;
  const Tile* cols;
  int64_t n_rows, n_cols;
};

// Where the transformed values of point (i, j) are: at data + offset[i * points + j], [blocks][tiles][lanes].
// tiles = row_count[i] * col_count[j].
constexpr int kMaxPoints = 8;
struct PointBuffers {
  float* data;
  int64_t offset[kMaxPoints * kMaxPoints];
  int64_t row_count[kMaxPoints], col_count[kMaxPoints];
};

// Transforms channel blocks [begin, end) of `x`, counted from `first`.
struct InputTransform {
  TileBlock tiles;
  Blocked x;
  PointBuffers v;
  int64_t first, begin, end;
};

// Makes outputs of channel blocks [begin, end) of `y`, counted from `first`; M holds them from `begin` on.
struct OutputTransform {
  TileBlock tiles;
  Blocked y;
  PointBuffers m;
  int64_t first, begin, end;
  Epilogue epilogue;
};

// Channels [begin, end) of transformed, packed weights: [point][panel][C rounded up][vectors * lanes].
struct WeightTransform {
  const float* weight;  // OIHW, of one group
  float* packed;
  int64_t C, K;
  int vectors;
  int64_t begin, end;  // panels
};

// A minimal filtering scheme in two dimensions.
struct WinogradKernels {
  void (*input)(const InputTransform&);
  void (*output)(const OutputTransform&);
  void (*weight)(const WeightTransform&);
};

enum WinogradScheme { kWinograd2, kWinograd4, kWinograd6, kPolyphase, kWinogradSchemes };

// ---------------------------------------------------------------------------------------------------- direct and stem

// Weights [panel][c block][tap][lanes][vectors * lanes]; panels [begin, end), outputs [first_pixel, last_pixel) of one
// image, counted along its rows.
struct DirectArgs {
  Blocked x, y;
  int64_t n, x_first, y_first;         // image; the group's first channel blocks
  int64_t c_blocks, k_blocks, panels;  // of the group
  int64_t begin, end, first_pixel, last_pixel;
  int stride, vectors;
  const float* packed;
  float* sums;  // scratch: [pixels][vectors * lanes]
  Epilogue epilogue;
};

// One row of outputs from rows staged with their border.
//   staged: [C * 3][pitch], rows r of channel c at c * 3 + r    packed: [panel][C * 9][vectors * lanes]
struct StemRow {
  const float* staged;
  int64_t C, pitch;
  Blocked y;
  int64_t n, p, panels;
  int stride, vectors;
  const float* packed;
  Epilogue epilogue;
};

// ------------------------------------------------------------------------------------------------------------- layout

// Rows [begin, end) of channel block `block` of image n, between a dense tensor and the inner layout.
struct Reorder {
  Blocked inner;
  float* dense;
  Layout layout;
  int64_t n, block, begin, end;
};

// -------------------------------------------------------------------------------------------------------------- table

// One instruction set.
struct Target {
  const char* name;
  bool (*supported)();
  int lanes;
  int registers;
  int planar_block;  // positions per register block
  void (*planar)(const PlanarStrip&, int count);
  void (*gemm)(const GemmPanel&, int vectors);
  WinogradKernels winograd[kWinogradSchemes];
  void (*direct)(const DirectArgs&);
  void (*stem)(const StemRow&);
  void (*to_inner)(const Reorder&);
  void (*from_inner)(const Reorder&);
  double (*multiply_adds)(int64_t rounds);
};

// From the least to the most capable; the first one runs everywhere.
struct Targets {
  const Target* rows[4];
  int size;
};
const Targets& targets();

// The most capable one that this CPU has, or at most the one that REPVGG_CUDA_CPU_ISA names.
const Target& target();

// Vectors of output channels per panel of packed weights, for `blocks` channel blocks: the register block's width.
inline int panel_vectors(int64_t blocks) { return blocks % 3 == 0 ? 3 : blocks == 1 ? 1 : 2; }

// Tiles or pixels per register block, beside so many vectors: sums, the panel's vectors and a broadcast fill the
// registers.
constexpr int register_rows(int registers, int vectors) { return (registers - 4 + (vectors > 2 ? 1 : 0)) / vectors; }

}  // namespace repvgg::cpu
