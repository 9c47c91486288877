// SPDX-License-Identifier: MIT
// The direct convolution on the inner layout, and the stem. Included once per target, inside its namespace, after
// simd.inl and layout.inl: no #include, no free names.

// Weights of so many channels stay in the first-level cache while all pixels of a task pass by.
constexpr int kDirectBlockC = 16;

// kRows pixels x kVectors vectors of output channels, over channel blocks [0, c_blocks) of the packed weights at b. The
// order of additions is (channel block, tap, channel), however the work is cut.
template <int kRows, int kVectors>
static void direct_block(const DirectArgs& p, const float* const* x, const float* b, int64_t c_blocks, float* sums,
                         bool first, bool last, float* const* y, const TileEpilogue* epilogue, const float* next,
                         int next_lines) {
  Vec sum[kRows][kVectors] = {};
  if (!first) {
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[t][v] = load(sums + (t * kVectors + v) * kLanes);
    }
  }
  const float* at[kRows];
#pragma GCC unroll 16
  for (int t = 0; t < kRows; ++t) at[t] = x[t];
  const int64_t plane = p.x.plane(), pitch = p.x.pitch();
  for (int64_t block = 0; block < c_blocks; ++block) {
    for (int tap = 0; tap < 9; ++tap, b += kVectors * kLanes * kLanes) {
      const int64_t offset = block * plane + tap / 3 * pitch + tap % 3 * kLanes;
      for (int line = 0; line < next_lines; ++line, next += 16) __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) {
        Vec weights[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          weights[v] = load(b + (c * kVectors + v) * kLanes);
          pin(weights[v]);
        }
#pragma GCC unroll 16
        for (int t = 0; t < kRows; ++t) {
          const Vec value = broadcast(at[t][offset + c]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum[t][v] += value * weights[v];
        }
      }
    }
  }
  const int64_t y_plane = p.y.plane();
#pragma GCC unroll 16
  for (int t = 0; t < kRows; ++t) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (last) {
        if (epilogue[v].floor[0] <= 0) store(y[t] + v * y_plane, finish(sum[t][v], epilogue[v]));
      } else {
        store(sums + (t * kVectors + v) * kLanes, sum[t][v]);
      }
    }
  }
}

template <int kRows, int kVectors>
static inline void direct_rows(int64_t rows, const DirectArgs& p, const float* const* x, const float* b,
                               int64_t c_blocks, float* sums, bool first, bool last, float* const* y,
                               const TileEpilogue* epilogue, const float* next, int next_lines) {
  if (rows == kRows) {
    direct_block<kRows, kVectors>(p, x, b, c_blocks, sums, first, last, y, epilogue, next, next_lines);
  } else if constexpr (kRows > 1) {
    direct_rows<kRows - 1, kVectors>(rows, p, x, b, c_blocks, sums, first, last, y, epilogue, next, next_lines);
  }
}

// The epilogues of a panel's vectors. A vector past the last channel block has a floor of 1: it is not stored.
template <int kVectors>
static void panel_epilogues(const Epilogue& epilogue, const Blocked& y, int64_t first_block, int64_t end_block,
                            TileEpilogue* out) {
  for (int v = 0; v < kVectors; ++v) {
    const int64_t k = (first_block + v) * kLanes;
    out[v] = tile_epilogue(epilogue, k, first_block + v < end_block ? y.C - k : 0);
    if (first_block + v >= end_block) out[v].floor = broadcast(1.0f);
  }
}

template <int kVectors>
static void direct_panels(const DirectArgs& p) {
  constexpr int kRows = register_rows(kRegisters, kVectors), kBlock = kDirectBlockC / kLanes;
  constexpr int kStep = 9 * kVectors * kLanes * kLanes;  // floats of packed weights per channel block
  const int64_t pixels = p.last_pixel - p.first_pixel, chunks = (pixels + kRows - 1) / kRows;
  const int lines = static_cast<int>((kStep / 9 / 16 + chunks - 1) / chunks);
  const int64_t k_blocks = p.k_blocks;
  for (int64_t panel = p.begin; panel < p.end; ++panel) {
    TileEpilogue epilogue[kVectors];
    const int64_t y_block = p.y_first + panel * kVectors;
    panel_epilogues<kVectors>(p.epilogue, p.y, y_block, p.y_first + k_blocks, epilogue);
    for (int64_t block = 0; block < p.c_blocks; block += kBlock) {
      const int64_t count = p.c_blocks - block < kBlock ? p.c_blocks - block : kBlock;
      const float* b = p.packed + (panel * p.c_blocks + block) * kStep;
      const float* const x = p.x.corner(p.n, p.x_first + block);
      float* const y = p.y.pixel(p.n, y_block, 0, 0);
      const float* next = b + count * kStep;
      const bool more = panel + 1 < p.end || block + count < p.c_blocks;
      const float* const next_end = more ? next + count * kStep : next;
      int64_t pixel = p.first_pixel, row = pixel / p.y.W, col = pixel % p.y.W;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t rows = (p.last_pixel - pixel + chunks - chunk - 1) / (chunks - chunk);
        const float* x_at[kRows];
        float* y_at[kRows];
        for (int64_t t = 0; t < rows; ++t) {
          x_at[t] = x + row * p.stride * p.x.pitch() + col * p.stride * kLanes;
          y_at[t] = y + row * p.y.pitch() + col * kLanes;
          if (++col == p.y.W) {
            col = 0;
            ++row;
          }
        }
        direct_rows<kRows, kVectors>(rows, p, x_at, b, count, p.sums + (pixel - p.first_pixel) * kVectors * kLanes,
                                     block == 0, block + count == p.c_blocks, y_at, epilogue, next,
                                     next < next_end ? lines : 0);
        next += lines * 16 * count * 9;
        pixel += rows;
      }
    }
  }
}

static void direct(const DirectArgs& p) {
  switch (p.vectors) {
    case 1: direct_panels<1>(p); break;
    case 2: direct_panels<2>(p); break;
    default: direct_panels<3>(p);
  }
  const int64_t last = p.y_first + p.k_blocks - 1, count = p.y.C - last * kLanes;
  if (count < kLanes && p.end == p.panels) {  // whole rows: their other pixels are zero there anyhow
    const int64_t row = p.first_pixel / p.y.W, end = (p.last_pixel - 1) / p.y.W + 1;
    clear_padding(p.y, p.y.pixel(p.n, last, row, 0), count, end - row);
  }
}

// --------------------------------------------------------------------------------------------------------------- stem

template <int kRows, int kVectors>
static void stem_block(const StemRow& p, const float* x, const float* b, float* y, const TileEpilogue* epilogue) {
  Vec sum[kRows][kVectors] = {};
  for (int64_t row = 0; row < p.C * 3; ++row, x += p.pitch) {
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s, b += kVectors * kLanes) {
      Vec weights[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        weights[v] = load(b + v * kLanes);
        pin(weights[v]);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kRows; ++t) {
        const Vec value = broadcast(x[t * p.stride + s]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[t][v] += value * weights[v];
      }
    }
  }
  const int64_t plane = p.y.plane();
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    if (epilogue[v].floor[0] > 0) break;
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t) store(y + v * plane + t * kLanes, finish(sum[t][v], epilogue[v]));
  }
}

template <int kRows, int kVectors>
static inline void stem_rows(int64_t rows, const StemRow& p, const float* x, const float* b, float* y,
                             const TileEpilogue* epilogue) {
  if (rows == kRows) {
    stem_block<kRows, kVectors>(p, x, b, y, epilogue);
  } else if constexpr (kRows > 1) {
    stem_rows<kRows - 1, kVectors>(rows, p, x, b, y, epilogue);
  }
}

template <int kVectors>
static void stem_panels(const StemRow& p) {
  constexpr int kRows = register_rows(kRegisters, kVectors);
  const int64_t chunks = (p.y.W + kRows - 1) / kRows;
  for (int64_t panel = 0; panel < p.panels; ++panel) {
    TileEpilogue epilogue[kVectors];
    panel_epilogues<kVectors>(p.epilogue, p.y, panel * kVectors, p.y.blocks(), epilogue);
    const float* b = p.packed + panel * p.C * 9 * kVectors * kLanes;
    float* y = p.y.pixel(p.n, panel * kVectors, p.p, 0);
    int64_t col = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t rows = (p.y.W - col + chunks - chunk - 1) / (chunks - chunk);
      stem_rows<kRows, kVectors>(rows, p, p.staged + col * p.stride, b, y + col * kLanes, epilogue);
      col += rows;
    }
  }
}

static void stem(const StemRow& p) {
  switch (p.vectors) {
    case 1: stem_panels<1>(p); break;
    case 2: stem_panels<2>(p); break;
    default: stem_panels<3>(p);
  }
  const int64_t last = p.y.blocks() - 1, count = p.y.C - last * kLanes;
  if (count < kLanes) clear_padding(p.y, p.y.pixel(p.n, last, p.p, 0), count, 1);
}
