// SPDX-License-Identifier: MIT
// What the launch code and the code of each instruction set say to each other.
#pragma once

#include <cstdint>

namespace repvgg::cpu {

// Output channels per register block; a last block may have fewer.
constexpr int kDirectBlockK = 6;

// The sums of `count` output channels over a strip of staged input.
//   x: [C][channel_stride]; the value that tap t needs for position i is x[c * channel_stride + offset[t] + i]
//   w: channel k's weights at w + k * C * 9, [C][9]
//   sums: [count][positions], positions a multiple of the target's block
struct DirectStrip {
  const float* x;
  const float* w;
  float* sums;
  int64_t C, channel_stride, positions;
  int64_t offset[9];
};

// One instruction set.
struct DirectTarget {
  const char* name;
  bool (*supported)();
  int block;  // positions per register block
  void (*run)(const DirectStrip& strip, int count);
};

// From the least to the most capable; the first one runs everywhere.
struct DirectTargets {
  const DirectTarget* rows;
  int size;
};
DirectTargets direct_targets();

}  // namespace repvgg::cpu
