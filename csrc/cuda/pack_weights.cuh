// SPDX-License-Identifier: MIT
// Writes weights [K, C/groups, 3, 3] in the order of packed_layout.h. Block b packs one fragment's channels and chunk,
// all 9 taps: it reads whole rows of taps and writes whole fragments.
#pragma once

#include "cuda/device.cuh"
#include "cuda/packed_layout.h"

namespace repvgg::cuda {

template <MmaType Type>
struct PackWeightsTraits {
  static constexpr MmaType kType = Type;
  static constexpr int kElementBytes = Type == MmaType::kTF32 ? 4 : 2, kChunkC = kChunkBytes / kElementBytes;
  static constexpr int kThreads = 96, kBlocksPerSM = 6;                  // the shared memory of sm_75
  static constexpr int kRow = kChunkC * 9, kPitch = packed_pitch(kRow);  // of a staged output channel
  static_assert(kPitch % 8 == 4, "8 rows begin in 8 different groups of 4 banks");
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSM)
    pack_weights_kernel(const PackedLayout layout, int group_C, int group_K, const void* weight, char* packed) {
  RVG_SHARED(uint32_t, staged, [16 * T::kPitch]);  // [row of the fragment][c][r][s], bits
  const int thread = static_cast<int>(threadIdx.x);
  int block = static_cast<int>(blockIdx.x);
  const int tile = block % layout.tiles;
  block /= layout.tiles;
  const int chunk = block % layout.chunks, group = block / layout.chunks;

  const int first = chunk * T::kChunkC - layout.padding;  // negative: padding
  for (int i = thread; i < 16 * T::kRow; i += T::kThreads) {
    const int row = i / T::kRow, at = i % T::kRow, k = packed_channel(tile, row, layout.tiles);
    uint32_t bits = 0;
    if (k < group_K && first * 9 + at >= 0) {
      const int64_t from = ((static_cast<int64_t>(group) * group_K + k) * group_C + first) * 9 + at;
      if constexpr (T::kType == MmaType::kTF32) {
        bits = round_tf32(static_cast<const float*>(weight)[from]);
      } else {
        bits = static_cast<const uint16_t*>(weight)[from];
      }
    }
    staged[row * T::kPitch + at] = bits;
  }
  __syncthreads();  // the taps are staged

  const int lane = thread % 32, s = thread / 32;
  for (int r = 0; r < 3; ++r) {
    uint32_t a[4];
    for (int e = 0; e < 4; ++e) a[e] = packed_register<T::kElementBytes>(staged, T::kPitch, r * 3 + s, lane, e);
    store_global_16(packed + layout.offset(group, chunk, s, tile) + r * kTapBytes + lane * 16, a[0], a[1], a[2], a[3]);
  }
  if (blockIdx.x == 0) {
    char* const slack = packed + layout.bytes() - layout.slack();
    for (int64_t i = thread * 16; i < layout.slack(); i += T::kThreads * 16) store_global_16(slack + i, 0, 0, 0, 0);
  }
}

}  // namespace repvgg::cuda
