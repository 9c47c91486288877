// SPDX-License-Identifier: MIT
// Direct 3x3 convolution in float32: x [N, C, H, W] or [N, H, W, C], weight [K, C/groups, 3, 3], y like x, zero
// padding 1.
//
// One block owns a kTileP x kTileQ tile of outputs of one image, for kBlockK output channels of one group. Per chunk of
// kChunkC input channels it stages the tile's input with its halo, and the weights, in shared memory. One thread owns
// kThreadK channels x kThreadQ neighbouring pixels of a row and keeps their sums in registers.
//
// The sum of an output is one chain of fused multiply-adds in the order (c, r, s), whatever the tile: results do not
// depend on the tile, the layout or the batch, and can be reproduced exactly on a CPU with fmaf.
#pragma once

#include "core/conv_problem.h"
#include "core/epilogue.h"
#include "cuda/device.cuh"

namespace repvgg::cuda {

template <int TileQ, int Stride, Layout TensorLayout>
struct Conv3x3DirectTraits {
  static constexpr int kTileP = 8, kTileQ = TileQ, kStride = Stride, kThreads = 128;
  static constexpr Layout kLayout = TensorLayout;
  static constexpr int kThreadK = 8, kThreadQ = 8;
  static constexpr int kSegments = kTileP * kTileQ / kThreadQ;  // row segments, one per thread and channel group
  static constexpr int kBlockK = kThreads / kSegments * kThreadK;
  static constexpr int kChunkC = Stride == 1 ? 8 : 4;
  static constexpr int kBlocksPerSM = 3;  // 170 registers a thread: the sums and one row's pixels and taps fit

  // The staged input is split into Stride x Stride phases, so that the pixels one tap needs are neighbours for stride 2
  // as they are for stride 1: input row Stride * i + a, column Stride * j + b is element (i, j) of phase (a, b).
  static constexpr int kHaloH = (kTileP - 1) * Stride + 3, kHaloW = (kTileQ - 1) * Stride + 3;
  static constexpr int kPhaseH = (kHaloH + Stride - 1) / Stride, kPhaseW = (kHaloW + Stride - 1) / Stride;
  static constexpr int kPitch = kPhaseW | 1;  // odd: 8 rows of a warp fall into 8 different residues of banks
  static constexpr int kPhaseSize = kPhaseH * kPitch;
  static constexpr int kChannelSize = Stride * Stride * kPhaseSize;
  static constexpr int kWeightPitch = kBlockK + 4;  // keeps 16-byte alignment, spreads the staging stores over banks

  static_assert(kTileQ % kThreadQ == 0 && kThreads % kSegments == 0, "threads cover the tile");
  static constexpr int kSharedBytes = (kChunkC * kChannelSize + kChunkC * 9 * kWeightPitch) * 4;
  static_assert(kSharedBytes <= 48 * 1024, "fits in static shared memory");
};

// Where the block works. Channel blocks vary fastest, so that neighbours in time share the input tile in L2.
template <class T>
struct Conv3x3DirectTile {
  int64_t n;
  int p0, q0;
  int group, k0;  // k0: first channel within the group

  __device__ Conv3x3DirectTile(const ConvProblem& prob, int64_t block) {
    const int k_blocks = static_cast<int>((prob.group_K() + T::kBlockK - 1) / T::kBlockK);
    const int64_t q_tiles = (prob.Q() + T::kTileQ - 1) / T::kTileQ, p_tiles = (prob.P() + T::kTileP - 1) / T::kTileP;
    k0 = static_cast<int>(block % k_blocks) * T::kBlockK;
    block /= k_blocks;
    group = static_cast<int>(block % prob.groups);
    block /= prob.groups;
    q0 = static_cast<int>(block % q_tiles) * T::kTileQ;
    block /= q_tiles;
    p0 = static_cast<int>(block % p_tiles) * T::kTileP;
    n = block / p_tiles;
  }
};

// Element (n, c, h, w) of a dense tensor with C channels.
template <Layout kLayout>
__device__ int64_t tensor_offset(int64_t n, int64_t c, int64_t h, int64_t w, int64_t C, int64_t H, int64_t W) {
  return kLayout == Layout::kNCHW ? ((n * C + c) * H + h) * W + w : ((n * H + h) * W + w) * C + c;
}

// Stages channels [c0, c0 + count) of the group; what lies outside the image is zero.
template <class T>
__device__ void conv3x3_direct_stage_x(const ConvProblem& prob, const Conv3x3DirectTile<T>& tile, int c0, int count,
                                       const float* x, float* tile_x) {
  constexpr int kPixels = T::kHaloH * T::kHaloW;
  for (int i = static_cast<int>(threadIdx.x); i < T::kChunkC * kPixels; i += T::kThreads) {
    // The index that is contiguous in memory varies fastest.
    const int c = T::kLayout == Layout::kNCHW ? i / kPixels : i % T::kChunkC;
    const int pixel = T::kLayout == Layout::kNCHW ? i % kPixels : i / T::kChunkC;
    if (c >= count) continue;
    const int row = pixel / T::kHaloW, column = pixel % T::kHaloW;
    const int64_t h = static_cast<int64_t>(tile.p0) * T::kStride + row - 1;
    const int64_t w = static_cast<int64_t>(tile.q0) * T::kStride + column - 1;
    const bool inside = h >= 0 && h < prob.H && w >= 0 && w < prob.W;
    const int64_t channel = tile.group * prob.group_C() + c0 + c;
    const float value = inside ? x[tensor_offset<T::kLayout>(tile.n, channel, h, w, prob.C, prob.H, prob.W)] : 0.0f;
    const int phase = row % T::kStride * T::kStride + column % T::kStride;
    tile_x[c * T::kChannelSize + phase * T::kPhaseSize + row / T::kStride * T::kPitch + column / T::kStride] = value;
  }
}

// Stages the weights of the chunk as [c][tap][k]; channels beyond the group are zero.
template <class T>
__device__ void conv3x3_direct_stage_weight(const ConvProblem& prob, const Conv3x3DirectTile<T>& tile, int c0,
                                            int count, const float* weight, float* tile_w) {
  for (int i = static_cast<int>(threadIdx.x); i < T::kBlockK * T::kChunkC * 9; i += T::kThreads) {
    const int k = i / (T::kChunkC * 9), rest = i % (T::kChunkC * 9);
    if (rest >= count * 9) continue;
    const bool inside = tile.k0 + k < prob.group_K();
    const int64_t row = (tile.group * prob.group_K() + tile.k0 + k) * prob.group_C() + c0;
    tile_w[rest * T::kWeightPitch + k] = inside ? weight[row * 9 + rest] : 0.0f;
  }
}

// Adds one input channel to the sums. x points to the thread's first pixel in phase (0, 0), w to its first channel.
template <class T>
__device__ __forceinline__ void conv3x3_direct_accumulate(const float* x, const float* w,
                                                          float (&sum)[T::kThreadK][T::kThreadQ]) {
  constexpr int S = T::kStride;
#pragma unroll
  for (int r = 0; r < 3; ++r) {
    float pixel[S][T::kThreadQ + 2 / S];  // [phase of the column][neighbour]
#pragma unroll
    for (int b = 0; b < S; ++b) {
      const float* row = x + (r % S * S + b) * T::kPhaseSize + r / S * T::kPitch;
#pragma unroll
      for (int j = 0; j < T::kThreadQ + 2 / S; ++j) {
        if (j < T::kThreadQ + (2 - b) / S) pixel[b][j] = row[j];  // a bound that varies keeps nvcc from unrolling
      }
    }
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      float tap[T::kThreadK];
#pragma unroll
      for (int k = 0; k < T::kThreadK; ++k) tap[k] = w[(r * 3 + s) * T::kWeightPitch + k];
#pragma unroll
      for (int k = 0; k < T::kThreadK; ++k) {
#pragma unroll
        for (int j = 0; j < T::kThreadQ; ++j) sum[k][j] = fmaf(tap[k], pixel[s % S][j + s / S], sum[k][j]);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSM)
    conv3x3_direct_kernel(const ConvProblem prob, const float* x, const float* weight, const Epilogue epilogue,
                          float* y) {
  RVG_SHARED(float, tile_x, [T::kChunkC * T::kChannelSize]);
  RVG_SHARED(float, tile_w, [T::kChunkC * 9 * T::kWeightPitch]);
  const Conv3x3DirectTile<T> tile(prob, blockIdx.x);
  const int segment = static_cast<int>(threadIdx.x) % T::kSegments;
  const int k_thread = static_cast<int>(threadIdx.x) / T::kSegments * T::kThreadK;
  const int p_thread = segment / (T::kTileQ / T::kThreadQ);
  const int q_thread = segment % (T::kTileQ / T::kThreadQ) * T::kThreadQ;

  float sum[T::kThreadK][T::kThreadQ] = {};
  const int C = static_cast<int>(prob.group_C());
  for (int c0 = 0; c0 < C; c0 += T::kChunkC) {
    const int count = min(T::kChunkC, C - c0);
    conv3x3_direct_stage_x<T>(prob, tile, c0, count, x, tile_x);
    conv3x3_direct_stage_weight<T>(prob, tile, c0, count, weight, tile_w);
    __syncthreads();  // the chunk is complete
    for (int c = 0; c < count; ++c) {
      conv3x3_direct_accumulate<T>(tile_x + c * T::kChannelSize + p_thread * T::kPitch + q_thread,
                                   tile_w + c * 9 * T::kWeightPitch + k_thread, sum);
    }
    __syncthreads();  // the chunk is read: its memory is free for the next
  }

  const int64_t p = tile.p0 + p_thread;
  if (p >= prob.P()) return;  // only after the last barrier
#pragma unroll
  for (int k = 0; k < T::kThreadK; ++k) {
    const int64_t k_group = tile.k0 + k_thread + k;
    if (k_group >= prob.group_K()) break;
    const int64_t k_out = tile.group * prob.group_K() + k_group;
    const Epilogue::Channel channel = epilogue.channel(k_out);
#pragma unroll
    for (int j = 0; j < T::kThreadQ; ++j) {
      const int64_t q = tile.q0 + q_thread + j;
      if (q < prob.Q()) {
        y[tensor_offset<T::kLayout>(tile.n, k_out, p, q, prob.K, prob.P(), prob.Q())] = channel(sum[k][j]);
      }
    }
  }
}

}  // namespace repvgg::cuda
