// SPDX-License-Identifier: MIT
// The register-blocked matrix product under the Winograd rows. Included once per target, inside its namespace, after
// simd.inl: no #include, no free names.

constexpr int kGemmBlockC = 128;  // channels added up before the sums go back to memory: the panel stays in L1

// kRows tiles x kVectors vectors of output channels. Channels are added in ascending order, one multiply-add each,
// however the work is cut: so results do not depend on it.
template <int kRows, int kVectors>
static void gemm_block(const float* a, int64_t a_stride, const float* b, int64_t c_blocks, float* m, int64_t m_stride,
                       bool accumulate, const float* next, int next_lines) {
  Vec sum[kRows][kVectors] = {};
  if (accumulate) {
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[t][v] = load(m + v * m_stride + t * kLanes);
    }
  }
  for (int64_t block = 0; block < c_blocks; ++block, a += a_stride, b += kVectors * kLanes * kLanes) {
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
        const Vec value = broadcast(a[t * kLanes + c]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[t][v] += value * weights[v];
      }
    }
    for (int line = 0; line < next_lines; ++line, next += 16) __builtin_prefetch(next, 0, 2);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t) store(m + v * m_stride + t * kLanes, sum[t][v]);
  }
}

// gemm_block for `rows` tiles, 1 <= rows <= kRows.
template <int kRows, int kVectors>
static inline void gemm_rows(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t c_blocks, float* m,
                             int64_t m_stride, bool accumulate, const float* next, int next_lines) {
  if (rows == kRows) {
    gemm_block<kRows, kVectors>(a, a_stride, b, c_blocks, m, m_stride, accumulate, next, next_lines);
  } else if constexpr (kRows > 1) {
    gemm_rows<kRows - 1, kVectors>(rows, a, a_stride, b, c_blocks, m, m_stride, accumulate, next, next_lines);
  }
}

template <int kVectors>
static void gemm_panel(const GemmPanel& p) {
  constexpr int kRows = register_rows(kRegisters, kVectors);
  constexpr int kBlock = kGemmBlockC / kLanes, kStep = kVectors * kLanes * kLanes;  // floats of b per channel block
  const int64_t stride = p.tiles * kLanes;
  const int64_t chunks = (p.tiles + kRows - 1) / kRows;
  // What is fetched for the next panel is spread over the chunks: so many cache lines per channel block and chunk.
  const int lines = static_cast<int>((kStep / 16 + chunks - 1) / chunks);
  for (int64_t block = 0; block < p.c_blocks; block += kBlock) {
    const int64_t count = p.c_blocks - block < kBlock ? p.c_blocks - block : kBlock;
    const float* next = p.next + block * kStep;
    const float* const next_end = next + count * kStep;
    int64_t tile = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t rows = (p.tiles - tile + chunks - chunk - 1) / (chunks - chunk);  // of even height
      const bool fetch = p.next != nullptr && next < next_end;
      gemm_rows<kRows, kVectors>(rows, p.a + block * stride + tile * kLanes, stride, p.b + block * kStep, count,
                                 p.m + tile * kLanes, stride, block > 0, next, fetch ? lines : 0);
      next += lines * 16 * count;
      tile += rows;
    }
  }
}

static void gemm(const GemmPanel& panel, int vectors) {
  switch (vectors) {
    case 1: return gemm_panel<1>(panel);
    case 2: return gemm_panel<2>(panel);
    default: return gemm_panel<3>(panel);
  }
}
