// SPDX-License-Identifier: MIT
// The inner layout: [N][channel blocks][rows][columns][lanes], lanes being the channels of one vector. One row and
// column of zeros stand before each plane, two after it, so that no kernel has a border case; the channels past C in
// the last block are zeros too. Producers write the pixels alone: borders are cleared once for a buffer.
#pragma once

#include <cstdint>

namespace repvgg::cpu {

struct Blocked {
  float* data;
  int64_t N, C, H, W;
  int lanes;

  int64_t blocks() const { return (C + lanes - 1) / lanes; }
  int64_t pitch() const { return (W + 3) * lanes; }
  int64_t plane() const { return (H + 3) * pitch(); }
  int64_t image() const { return blocks() * plane(); }
  int64_t floats() const { return N * image(); }

  // Pixel (-1, -1) of a channel block: the corner of its border.
  float* corner(int64_t n, int64_t block) const { return data + (n * blocks() + block) * plane(); }
  float* pixel(int64_t n, int64_t block, int64_t h, int64_t w) const {
    return corner(n, block) + (h + 1) * pitch() + (w + 1) * lanes;
  }
};

}  // namespace repvgg::cpu
