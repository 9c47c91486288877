// SPDX-License-Identifier: MIT
// The register-blocked matrix product under the Winograd rows. Included once per target, inside its namespace, after
// simd.inl: no #include, no free names.

constexpr int kGemmBlockC = 128;  // channels added up before the sums go back to memory: the panel stays in L1

// kRows tiles x kVectors vectors of output channels. Channels are added in ascending order, one multiply-add each,
// however the work is cut: so results do not depend on it.
template <int kRows, int kVectors>
static RVG_INLINE void gemm_block(const float* a, int64_t a_stride, const float* b, int64_t c_blocks, float* m,
                                  int64_t m_stride, bool accumulate, const float* next, int next_lines) {
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
        // With three, one may be an operand in memory: that saves an instruction, and loads are not yet the bound.
        if (kVectors < 3 || v + 1 < kVectors) pin(weights[v]);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kRows; ++t) {
        const Vec value = broadcast(a[t * kLanes + c]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[t][v] += value * weights[v];
      }
    }
    // Each sum back into its own register: else g++ moves them by way of the stack, in the longest chain there is.
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) pin(sum[t][v]);
    }
    for (int line = 0; line < next_lines; ++line, next += 16) __builtin_prefetch(next, 0, 2);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t) store(m + v * m_stride + t * kLanes, sum[t][v]);
  }
}

// A panel's channels that are added up at a time, and what is fetched meanwhile: `lines` cache lines per channel block
// of a chunk of tiles, while `next` is before `next_end`.
struct GemmStep {
  const float* a;
  const float* b;
  float* m;
  int64_t stride, c_blocks;
  bool accumulate;
  const float* next;
  const float* next_end;
  int lines;
};

// Tiles [begin, end) in chunks of kRows.
template <int kRows, int kVectors>
static void gemm_chunks(GemmStep* p, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; tile += kRows) {
    gemm_block<kRows, kVectors>(p->a + tile * kLanes, p->stride, p->b, p->c_blocks, p->m + tile * kLanes, p->stride,
                                p->accumulate, p->next, p->next < p->next_end ? p->lines : 0);
    p->next += p->lines * 16 * p->c_blocks;
  }
}

// gemm_chunks of `rows` tiles, 1 <= rows <= kRows.
template <int kRows, int kVectors>
static void gemm_rows(int64_t rows, GemmStep* p, int64_t begin, int64_t end) {
  if (rows == kRows) {
    gemm_chunks<kRows, kVectors>(p, begin, end);
  } else if constexpr (kRows > 1) {
    gemm_rows<kRows - 1, kVectors>(rows, p, begin, end);
  }
}

template <int kVectors>
static void gemm_panel(const GemmPanel& p) {
  constexpr int kRows = register_rows(kRegisters, kVectors);
  constexpr int kBlock = kGemmBlockC / kLanes, kStep = kVectors * kLanes * kLanes;  // floats of b per channel block
  const int64_t stride = p.tiles * kLanes;
  // Chunks of even height: those of `rows` tiles, then, from tile `lower` on, those of one less.
  const int64_t chunks = (p.tiles + kRows - 1) / kRows, rows = (p.tiles + chunks - 1) / chunks;
  const int64_t lower = (p.tiles - (rows - 1) * chunks) * rows;
  // What is fetched for the next panel is spread over the chunks.
  const int lines = p.next == nullptr ? 0 : static_cast<int>((kStep / 16 + chunks - 1) / chunks);
  for (int64_t block = 0; block < p.c_blocks; block += kBlock) {
    const int64_t count = p.c_blocks - block < kBlock ? p.c_blocks - block : kBlock;
    const float* const next = p.next == nullptr ? nullptr : p.next + block * kStep;
    const float* const next_end = p.next == nullptr ? nullptr : next + count * kStep;
    GemmStep step = {p.a + block * stride, p.b + block * kStep, p.m, stride, count, block > 0, next, next_end, lines};
    gemm_rows<kRows, kVectors>(rows, &step, 0, lower);
    if (lower < p.tiles) gemm_rows<kRows, kVectors>(rows - 1, &step, lower, p.tiles);
  }
}

static void gemm(const GemmPanel& panel, int vectors) {
  switch (vectors) {
    case 1: return gemm_panel<1>(panel);
    case 2: return gemm_panel<2>(panel);
    default: return gemm_panel<3>(panel);
  }
}
