// SPDX-License-Identifier: MIT
// Which tile of the menu a problem gets, how its sum is split, and how long that is predicted to take.
#pragma once

#include "core/conv_algo.h"
#include "cuda/mma_tiles.h"

namespace repvgg::cuda {

struct MmaPlan {
  int tile = -1;  // of kMmaTiles; -1: none fits
  int k_blocks = 0, p_tiles = 0, q_tiles = 0;
  int64_t tiles = 0;  // blocks of the grid for each part of the sum
  int split = 1, split_chunks = 0;
  double seconds = 0;

  static constexpr int kBlocksPerSM = 2;

  int64_t blocks() const { return tiles * split; }
  // Of the partial sums, 4 bytes for each output of each tile and part.
  int64_t workspace_bytes() const {
    const MmaTile& t = kMmaTiles[tile];
    return split == 1 ? 0 : 4 * blocks() * t.tile_k() * t.tile_p() * t.tile_q();
  }
  LaunchPlan launch_plan(const ConvProblem& prob) const {
    const MmaTile& t = kMmaTiles[tile];
    const int images = t.joined ? static_cast<int>((t.tile_q() - 2) / prob.W) + 2 : 1;
    return {blocks(), t.threads(), t.shared_bytes(), t.tile_k(), t.tile_p(), t.tile_q(), images, split, kBlocksPerSM};
  }
};

// The fastest by the model. Depends on nothing but its arguments.
MmaPlan plan_mma(const ConvProblem& prob, const Device& device);

// Whether this tile can compute the problem, and how it would. `split`: at most so many parts.
bool mma_tile_fits(const MmaTile& tile, const ConvProblem& prob);
MmaPlan plan_mma_tile(int tile, int split, const ConvProblem& prob, const Device& device);

// Launches as planned, with the workspace that the plan asks for.
void launch_mma(const ConvProblem& prob, const ConvArgs& args, const MmaPlan& plan);

// The predicted time of a library's implicit GEMM, 16-bit, followed by `passes` kernels over the output.
double implicit_gemm_seconds(const ConvProblem& prob, const Device& device, int passes);

}  // namespace repvgg::cuda
