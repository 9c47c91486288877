// SPDX-License-Identifier: MIT
// Register-blocked sums of the planar convolution, over Vec. Included once per target, inside its namespace, after
// simd.inl: no #include, no free names. RVG_BLOCK_VECTORS: vectors of positions per block, as registers allow.

constexpr int kBlockVectors = RVG_BLOCK_VECTORS;

// kCount channels x kBlockVectors vectors of positions stay in registers while all channels and taps are added, in the
// order (c, r, s): one chain of multiply-adds per output, whatever the strip.
template <int kCount>
static void planar_strip(const PlanarStrip& strip) {
  for (int64_t i = 0; i < strip.positions; i += kBlockVectors * kLanes) {
    Vec sum[kCount][kBlockVectors] = {};
    const float* x = strip.x + i;
    const float* w = strip.w;
    for (int64_t c = 0; c < strip.C; ++c, x += strip.channel_stride, w += 9) {
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) {
        Vec pixels[kBlockVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kBlockVectors; ++v) pixels[v] = load(x + strip.offset[t] + v * kLanes);
#pragma GCC unroll 8
        for (int k = 0; k < kCount; ++k) {
          const Vec tap = Vec{} + w[k * strip.C * 9 + t];
#pragma GCC unroll 8
          for (int v = 0; v < kBlockVectors; ++v) sum[k][v] += tap * pixels[v];
        }
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
#pragma GCC unroll 8
      for (int v = 0; v < kBlockVectors; ++v) store(strip.sums + k * strip.positions + i + v * kLanes, sum[k][v]);
    }
  }
}

static void planar(const PlanarStrip& strip, int count) {
  switch (count) {
    case 1: return planar_strip<1>(strip);
    case 2: return planar_strip<2>(strip);
    case 3: return planar_strip<3>(strip);
    case 4: return planar_strip<4>(strip);
    case 5: return planar_strip<5>(strip);
    default: return planar_strip<kPlanarBlockK>(strip);
  }
}
