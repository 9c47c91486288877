// SPDX-License-Identifier: MIT
// The menu of the tensor-core convolution: which tiles there are, and what each of them costs in threads and memory.
// Kernels, launches and the choice of a tile all read it. What a launch hands to the kernel is here too.
#pragma once

#include "core/conv_problem.h"
#include "cuda/packed_layout.h"

namespace repvgg::cuda {

// What a thread block computes. A warp owns tiles_m x 16 output channels of `rows` x 8 pixels; the block has
// warps_m x warps_p x warps_q warps. Sizes in bytes do not depend on the type: a chunk is 32 bytes of a pixel.
struct MmaTile {
  int tiles_m, warps_m, rows, warps_p, warps_q, stride;
  bool joined;  // images of the batch are joined along their rows
  bool tf32;    // compiled for tf32 too
  bool split;   // the sum over the input channels may be split among blocks

  static constexpr int kJoinGap = 4;  // columns between joined images; a multiple of 4 keeps 8 neighbours in 8 banks
  static constexpr int kMinJoinedW = 14;  // the narrowest image that is joined

  constexpr int tile_k() const { return 16 * tiles_m * warps_m; }
  constexpr int tile_p() const { return rows * warps_p; }
  constexpr int tile_q() const { return 8 * warps_q; }
  constexpr int threads() const { return 32 * warps_m * warps_p * warps_q; }
  constexpr int max_images() const { return joined ? (tile_q() - 2) / kMinJoinedW + 2 : 1; }  // a row of the tile sees
  constexpr int halo_h() const { return (tile_p() - 1) * stride + 3; }
  constexpr int halo_w() const { return (tile_q() - 1) * stride + 3 + kJoinGap * (max_images() - 1); }
  constexpr int halo_bytes() const { return halo_h() * halo_w() * kChunkBytes; }
  constexpr int stage_bytes() const { return tile_k() / 16 * kTapColumnBytes; }  // weights of one column s, one chunk
  // Columns of weights that are held or on their way: three, or two where a third would leave GPUs with 100 KB of
  // shared memory (8.6, 8.9, 12.0) one block. The system keeps 1 KB of each block's.
  constexpr int ring() const { return 2 * halo_bytes() + 3 * stage_bytes() <= 49 * 1024 ? 3 : 2; }
  constexpr int shared_bytes() const { return 2 * halo_bytes() + ring() * stage_bytes(); }
};

// Ordered by stride, joined or not, size.
constexpr MmaTile kMmaTiles[] = {
    // tiles_m, warps_m, rows, warps_p, warps_q, stride, joined, tf32, split
    {4, 2, 8, 1, 2, 1, false, false, false},  // 128 channels x 8 x 16 pixels
    {4, 1, 8, 2, 2, 1, false, true, false},   // 64 x 16 x 16
    {3, 1, 8, 2, 2, 1, false, false, false},  // 48 x 16 x 16
    {2, 1, 8, 2, 2, 1, false, true, false},   // 32 x 16 x 16
    {1, 2, 7, 1, 2, 1, false, true, true},    // 32 x 7 x 16
    {4, 2, 7, 1, 2, 1, true, true, false},    // 128 x 7 x 16
    {3, 2, 7, 1, 2, 1, true, false, false},   // 96 x 7 x 16
    {4, 1, 7, 2, 2, 1, true, false, false},   // 64 x 14 x 16
    {4, 2, 4, 2, 1, 2, false, true, false},   // 128 x 8 x 8
    {3, 2, 4, 1, 2, 2, false, false, false},  // 96 x 4 x 16
    {4, 1, 4, 2, 2, 2, false, false, false},  // 64 x 8 x 16
    {3, 1, 4, 2, 2, 2, false, false, false},  // 48 x 8 x 16
    {1, 2, 4, 2, 1, 2, false, true, true},    // 32 x 8 x 8
};
constexpr int kMmaTileCount = sizeof kMmaTiles / sizeof *kMmaTiles;

// The problem in ints, so that the device divides no 64-bit numbers. conv3x3_mma.cu fills it.
struct Conv3x3MmaParams {
  const void* x;
  const void* packed;
  const void* bias;  // [K] or nullptr
  void* y;
  float* partial;  // the sums of split blocks; nullptr without a split
  DType bias_dtype;
  Activation activation;
  int N, C, H, W, K, P, Q;
  int groups, group_C, group_K;
  int k_blocks;             // tiles of output channels in a group
  int p_tiles, q_tiles;     // of an image; with kJoined q_tiles are those of the whole batch
  int tiles;                // all of them: a block of the grid each, `split` blocks where sums are split
  int split, split_chunks;  // blocks that share a sum, chunks that each of them takes
};

// The kernels of one tile and type; null where the tile is not compiled for the type.
struct Conv3x3MmaEntry {
  bool (*has_code)();
  // `overlap`: the first launch may begin before the one ahead of it has ended; `overlap_sum`: the second, if there is
  // one, before the first has.
  void (*launch)(const Conv3x3MmaParams&, bool overlap, bool overlap_sum, void* stream);
};

// By index of kMmaTiles. Each type is compiled in a file of its own.
const Conv3x3MmaEntry& conv3x3_mma_float16(int tile);
const Conv3x3MmaEntry& conv3x3_mma_bfloat16(int tile);
const Conv3x3MmaEntry& conv3x3_mma_tf32(int tile);

}  // namespace repvgg::cuda
