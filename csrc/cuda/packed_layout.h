// SPDX-License-Identifier: MIT
// The order of packed weights: [group][chunk of input channels][s][16 output channels][r][lane][16 bytes].
//
// The last three indices are one A fragment of a tensor core for tap (r, s), ready to be loaded by its lanes. It
// depends on nothing but the layer and the width of an element: every tile, batch size and architecture reads the same
// weights. A block of any number of channels reads one contiguous piece for each s. A chunk is 32 bytes of input
// channels; the first one begins with padding where their number is not a multiple of a chunk. Padding, and output
// channels that the layer does not have, are zero. The rows of a fragment are permuted channels: see packed_channel.
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
  int padding;                // channels of the first chunk that are none

  PackedLayout() = default;
  RVG_HOST_DEVICE PackedLayout(int64_t groups, int64_t group_C, int64_t group_K, int chunk_C)
      : groups(static_cast<int>(groups)),
        chunks(static_cast<int>((group_C + chunk_C - 1) / chunk_C)),
        tiles(static_cast<int>((group_K + 15) / 16)),
        padding(static_cast<int>(chunks * int64_t{chunk_C} - group_C)) {}

  RVG_HOST_DEVICE int64_t column_stride() const { return static_cast<int64_t>(tiles) * kTapColumnBytes; }
  RVG_HOST_DEVICE int64_t offset(int group, int chunk, int s, int tile) const {
    return ((static_cast<int64_t>(group) * chunks + chunk) * 3 + s) * column_stride() +
           static_cast<int64_t>(tile) * kTapColumnBytes;
  }
  // A block whose channels end past the group's reads on, into what nobody uses: the last one needs it to be there.
  RVG_HOST_DEVICE int64_t slack() const { return (kMaxTileK / 16 - 1) * kTapColumnBytes; }
  RVG_HOST_DEVICE int64_t bytes() const { return offset(groups, 0, 0, 0) + slack(); }
};

// The channel, within its group of `tiles` fragments, in row `row` of fragment `tile`. After a transposition lane % 4 =
// q holds rows 2 q, 2 q + 1, 2 q + 8, 2 q + 9: neighbouring channels, 8 of them (16 bytes) where 2 j and 2 j + 1 are a
// pair. The last fragment of an odd number is alone; fragments past it get channels that the group does not have.
RVG_HOST_DEVICE inline int packed_channel(int tile, int row, int tiles) {
  const int half = row / 8, quad = row % 8 / 2, low = row % 2;
  const bool paired = (tile | 1) < tiles;
  return paired ? tile / 2 * 32 + quad * 8 + tile % 2 * 4 + half * 2 + low : tile * 16 + quad * 4 + half * 2 + low;
}

// Where the elements of a fragment's taps are collected: [row of the fragment][channel of the chunk][tap], the bits of
// one element a word. With such a pitch of a row all lanes of packed_register read different banks.
constexpr int packed_pitch(int row) { return row + 4; }

// Register `e` of the lane's fragment (A in device_mma.cuh) of a tap r * 3 + s.
template <int kElementBytes>
RVG_HOST_DEVICE inline uint32_t packed_register(const uint32_t* staged, int pitch, int tap, int lane, int e) {
  constexpr int kHalf = kChunkBytes / kElementBytes / 2;  // channels
  const uint32_t* const row = staged + (lane / 4 + e % 2 * 8) * pitch + tap;
  const int t = lane % 4;
  if constexpr (kElementBytes == 4) {
    return row[(e / 2 * kHalf + t) * 9];
  } else {
    const int c = e / 2 * kHalf + 2 * t;
    const int first = t / 2;  // half of the lanes read the upper one first: for the banks' sake
    const uint32_t a = row[(c + first) * 9], b = row[(c + 1 - first) * 9];
    return first == 0 ? a | b << 16 : b | a << 16;
  }
}

}  // namespace repvgg::cuda
