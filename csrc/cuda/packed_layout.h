// SPDX-License-Identifier: MIT
// The order of packed weights: [group][chunk of input channels][s][16 output channels][r][lane][16 bytes].
//
// The last three indices are one A fragment of a tensor core for tap (r, s), ready to be loaded by its lanes. It
// depends on nothing but the layer and the width of an element: every tile, batch size and architecture reads the same
// weights. A block of any number of channels reads one contiguous piece for each s. A chunk is 32 bytes of input
// channels; what the layer does not have is zero. The rows of a fragment are permuted channels: see packed_channel.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace repvgg::cuda {

constexpr int kChunkBytes = 32;
constexpr int kTapBytes = 32 * 16;              // 16 output channels x a chunk, one tap
constexpr int kTapColumnBytes = 3 * kTapBytes;  // the taps r = 0, 1, 2
constexpr int kMaxTileK = 128;                  // output channels of the widest block

struct PackedLayout {
  int groups, chunks, tiles;  // tiles: of 16 output channels in a group

  RVG_HOST_DEVICE PackedLayout(int64_t groups, int64_t group_C, int64_t group_K, int chunk_C)
      : groups(static_cast<int>(groups)),
        chunks(static_cast<int>((group_C + chunk_C - 1) / chunk_C)),
        tiles(static_cast<int>((group_K + 15) / 16)) {}

  RVG_HOST_DEVICE int64_t column_stride() const { return static_cast<int64_t>(tiles) * kTapColumnBytes; }
  RVG_HOST_DEVICE int64_t offset(int group, int chunk, int s, int tile) const {
    return ((static_cast<int64_t>(group) * chunks + chunk) * 3 + s) * column_stride() +
           static_cast<int64_t>(tile) * kTapColumnBytes;
  }
  // A block whose channels end past the group's reads on, into what nobody uses: the last one needs it to be there.
  RVG_HOST_DEVICE int64_t slack() const { return (kMaxTileK / 16 - 1) * kTapColumnBytes; }
  RVG_HOST_DEVICE int64_t bytes() const { return offset(groups, 0, 0, 0) + slack(); }
};

// The channel, within its group, that row `row` of fragment `tile` holds. After a transposition lane % 4 = q holds rows
// 2 q, 2 q + 1, 2 q + 8, 2 q + 9: these are neighbouring channels, 8 of them from a pair of fragments, that is 16
// bytes.
RVG_HOST_DEVICE inline int packed_channel(int tile, int row, int tiles) {
  const int half = row / 8, quad = row % 8 / 2, low = row % 2;
  const bool single = tile + 1 == tiles && tile % 2 == 0;  // the group's last, without a partner
  return single ? tile * 16 + quad * 4 + half * 2 + low : tile / 2 * 32 + quad * 8 + tile % 2 * 4 + half * 2 + low;
}

}  // namespace repvgg::cuda
