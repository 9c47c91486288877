// SPDX-License-Identifier: MIT
// The transforms of the Winograd rows (core/winograd_points.h has the formulas), one vector of channels at a time.
// Included once per target, inside its namespace, after simd.inl: no #include, no free names.
//
// A scheme is a set of points and the parity split of a stride of 2. With kStride = 1, tiles of class n have 2 n + 2
// inputs and 2 n outputs in each dimension. With kStride = 2 (polyphase) the filter's taps 0 and 2 meet the even
// inputs: 2 n + 2 of them make 2 n + 1 outputs; tap 1 meets the odd ones and is multiplied directly. The index past the
// points stands for these direct products: 2 n + 1 per tile instead of one.

template <int kStride>
constexpr int tile_outputs(int n) {
  return 2 * n + kStride - 1;
}

template <const WinogradPoints& kSet, int kStride>
constexpr int scheme_points() {
  return kSet.points() + kStride - 1;
}

// t = B^T d.
template <const WinogradPoints& kSet, int n>
static RVG_INLINE void input_1d(const Vec* d, Vec* t) {
  constexpr WinogradInput table = winograd_input(kSet, n);
  Vec zero = d[2 * n], infinity = d[2 * n + 1];
#pragma GCC unroll 8
  for (int i = n - 1; i >= 0; --i) {
    zero += table.all[i] * d[2 * i];
    infinity += table.all[i] * d[2 * i + 1];
  }
  t[0] = table.dropped_zero * zero;
  t[2 * n + 1] = infinity;
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) {
    Vec even = d[2 * n], odd = d[2 * n - 1];
#pragma GCC unroll 8
    for (int i = n - 2; i >= 0; --i) {
      even += table.part[k][i] * d[2 * i + 2];
      odd += table.part[k][i] * d[2 * i + 1];
    }
    even = table.dropped[k] * even;
    const float q = table.q[k] * table.dropped[k];
    t[1 + 2 * k] = even + q * odd;
    t[2 + 2 * k] = even - q * odd;
  }
}

// y (+)= A^T m. `direct`: products that are outputs already, or nullptr.
template <const WinogradPoints& kSet, int n, int kOutputs>
static RVG_INLINE void output_1d(const Vec* m, const Vec* direct, Vec* y) {
  constexpr WinogradOutput table = winograd_output(kSet);
  Vec sum[n + 1], difference[n + 1];
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) {
    sum[k] = m[1 + 2 * k] + m[2 + 2 * k];
    difference[k] = m[1 + 2 * k] - m[2 + 2 * k];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kOutputs; ++r) {
    const Vec* pairs = r % 2 ? difference : sum;
    Vec value = direct ? direct[r] : Vec{};
    bool first = direct == nullptr;
    if (r == 0) {
      value = first ? m[0] : value + m[0];
      first = false;
    }
    if (r == kOutputs - 1) {
      value = first ? m[2 * n + 1] : value + m[2 * n + 1];
      first = false;
    }
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
      value = first ? table.power[k][r] * pairs[k] : value + table.power[k][r] * pairs[k];
      first = false;
    }
    y[r] = value;
  }
}

// The point of transformed value i of a tile of class n: its last value belongs to infinity.
template <const WinogradPoints& kSet, int n>
constexpr int point_of(int i) {
  return i == 2 * n + 1 ? kSet.points() - 1 : i;
}

// Where a tile's values of point (i, j) go: base[i * points + j] + column * kLanes; direct products of the rows lie
// `pitch[j]` apart.
struct TileBuffers {
  float* base[kMaxPoints * kMaxPoints];
  int64_t pitch[kMaxPoints];
};

// Fetches `rows` x `cols` pixels into the cache: rows of a plane are too short for the processor to see a stream.
template <int rows, int cols, bool kWrite>
static RVG_INLINE void prefetch_pixels(const float* x, int64_t pitch) {
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols * kLanes; j += 16) __builtin_prefetch(x + i * pitch + j, kWrite);
  }
}

// Inputs of the tile whose first one is at x. The inputs of the tile below are fetched meanwhile.
template <const WinogradPoints& kSet, int kStride, int nr, int nc>
static void input_tile(const float* x, int64_t pitch, const TileBuffers& v, int64_t col, int64_t direct_col) {
  constexpr int kPoints = scheme_points<kSet, kStride>(), kDirect = kPoints - 1;
  constexpr int kRows = 2 * nr + 2, kCols = 2 * nc + 2;
  constexpr int kRowsIn = kStride == 1 ? kRows : 2 * kRows - 1, kOdd = kRows - 1, kOddCols = kCols - 1;
  constexpr int kNewRows = kStride * tile_outputs<kStride>(nr), kNewCols = kStride * tile_outputs<kStride>(nc);
  prefetch_pixels<kNewRows, kNewCols, false>(x + kRowsIn * pitch + kStride * kLanes, pitch);
  Vec t[kRowsIn][kCols];
#pragma GCC unroll 16
  for (int i = 0; i < kRowsIn; ++i) {
    Vec d[kCols];
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) d[j] = load(x + i * pitch + j * kStride * kLanes);
    input_1d<kSet, nc>(d, t[i]);
  }
#pragma GCC unroll 8
  for (int j = 0; j < kCols; ++j) {
    const int pj = point_of<kSet, nc>(j);
    Vec d[kRows], u[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) d[i] = t[i * kStride][j];
    input_1d<kSet, nr>(d, u);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) store(v.base[point_of<kSet, nr>(i) * kPoints + pj] + col * kLanes, u[i]);
    if constexpr (kStride == 2) {
      float* out = v.base[kDirect * kPoints + pj] + col * kLanes;
#pragma GCC unroll 8
      for (int i = 0; i < kOdd; ++i) store(out + i * v.pitch[pj], t[2 * i + 1][j]);
    }
  }
  if constexpr (kStride == 2) {
#pragma GCC unroll 1
    for (int j = 0; j < kOddCols; ++j) {
      const float* column = x + (2 * j + 1) * kLanes;
      Vec d[kRows], u[kRows];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) d[i] = load(column + 2 * i * pitch);
      input_1d<kSet, nr>(d, u);
      const int64_t at = (direct_col + j) * kLanes;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) store(v.base[point_of<kSet, nr>(i) * kPoints + kDirect] + at, u[i]);
      float* out = v.base[kDirect * kPoints + kDirect] + at;
#pragma GCC unroll 8
      for (int i = 0; i < kOdd; ++i) store(out + i * v.pitch[kDirect], load(column + (2 * i + 1) * pitch));
    }
  }
}

struct TileEpilogue {
  Vec bias, floor;
};

// The epilogue's order: the sum, then the bias, then the floor; a NaN stays.
static RVG_INLINE Vec finish(Vec sum, const TileEpilogue& epilogue) {
  const Vec v = sum + epilogue.bias;
  return v < epilogue.floor ? epilogue.floor : v;
}

// Writes the valid outputs of a tile to y. Where the tile below will be written is fetched meanwhile.
template <const WinogradPoints& kSet, int kStride, int nr, int nc>
static void output_tile(const TileBuffers& m, int64_t col, int64_t direct_col, float* y, int64_t pitch, int64_t rows,
                        int64_t cols, const TileEpilogue& epilogue) {
  constexpr int kPoints = scheme_points<kSet, kStride>(), kDirect = kPoints - 1;
  constexpr int kRows = 2 * nr + 2, kCols = 2 * nc + 2;
  constexpr int kRowsOut = tile_outputs<kStride>(nr), kColsOut = tile_outputs<kStride>(nc);
  prefetch_pixels<kRowsOut, kColsOut, true>(y + kRowsOut * pitch, pitch);
  Vec t[kRowsOut][kCols], direct[kRowsOut][kColsOut];
#pragma GCC unroll 8
  for (int j = 0; j < kCols; ++j) {
    const int pj = point_of<kSet, nc>(j);
    Vec u[kRows], products[kRowsOut], sums[kRowsOut];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) u[i] = load(m.base[point_of<kSet, nr>(i) * kPoints + pj] + col * kLanes);
    if constexpr (kStride == 2) {
      const float* in = m.base[kDirect * kPoints + pj] + col * kLanes;
#pragma GCC unroll 8
      for (int i = 0; i < kRowsOut; ++i) products[i] = load(in + i * m.pitch[pj]);
    }
    output_1d<kSet, nr, kRowsOut>(u, kStride == 2 ? products : nullptr, sums);
#pragma GCC unroll 8
    for (int i = 0; i < kRowsOut; ++i) t[i][j] = sums[i];
  }
  if constexpr (kStride == 2) {
#pragma GCC unroll 1
    for (int j = 0; j < kColsOut; ++j) {
      const int64_t at = (direct_col + j) * kLanes;
      Vec u[kRows], products[kRowsOut], sums[kRowsOut];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) u[i] = load(m.base[point_of<kSet, nr>(i) * kPoints + kDirect] + at);
      const float* in = m.base[kDirect * kPoints + kDirect] + at;
#pragma GCC unroll 8
      for (int i = 0; i < kRowsOut; ++i) products[i] = load(in + i * m.pitch[kDirect]);
      output_1d<kSet, nr, kRowsOut>(u, products, sums);
#pragma GCC unroll 8
      for (int i = 0; i < kRowsOut; ++i) direct[i][j] = sums[i];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRowsOut; ++i) {
    if (i >= rows) break;
    Vec sums[kColsOut];
    output_1d<kSet, nc, kColsOut>(t[i], kStride == 2 ? direct[i] : nullptr, sums);
#pragma GCC unroll 8
    for (int j = 0; j < kColsOut; ++j) {
      if (j < kColsOut - 1 || j < cols) store(y + i * pitch + j * kLanes, finish(sums[j], epilogue));
    }
  }
}

// The buffers of the tiles in row `r` of the block, for channel block c of the buffer.
template <const WinogradPoints& kSet, int kStride>
static inline void row_buffers(const PointBuffers& buffers, int64_t c, int64_t r, int64_t before, TileBuffers* out) {
  constexpr int kPoints = scheme_points<kSet, kStride>();
  for (int j = 0; j < kPoints; ++j) out->pitch[j] = buffers.col_count[j] * kLanes;
  for (int i = 0; i < kPoints; ++i) {
    const int64_t row = kStride == 2 && i == kPoints - 1 ? before : r;
    for (int j = 0; j < kPoints; ++j) {
      const int64_t cols = buffers.col_count[j];
      out->base[i * kPoints + j] =
          buffers.data + buffers.offset[i * kPoints + j] + (c * buffers.row_count[i] + row) * cols * kLanes;
    }
  }
}

template <const WinogradPoints& kSet, int kStride, int nr>
static void input_row(const InputTransform& p, const TileBlock& tiles, const float* x, const TileBuffers& v) {
  for (int64_t col = 0; col < tiles.n_cols; ++col) {
    const Tile& tile = tiles.cols[col];
    const float* at = x + tile.start * kStride * kLanes;
    const int64_t pitch = p.x.pitch();
    switch (tile.cls) {
      case 0:
        if constexpr (kStride == 2) input_tile<kSet, kStride, nr, 0>(at, pitch, v, col, tile.before);
        break;
      case 1: input_tile<kSet, kStride, nr, 1>(at, pitch, v, col, tile.before); break;
      case 2:
        if constexpr (kSet.pairs >= 2) input_tile<kSet, kStride, nr, 2>(at, pitch, v, col, tile.before);
        break;
      default:
        if constexpr (kSet.pairs >= 3) input_tile<kSet, kStride, nr, 3>(at, pitch, v, col, tile.before);
    }
  }
}

template <const WinogradPoints& kSet, int kStride>
static void winograd_input_transform(const InputTransform& p) {
  TileBuffers v;
  for (int64_t c = p.begin; c < p.end; ++c) {
    for (int64_t r = 0; r < p.tiles.n_rows; ++r) {
      const Tile& row = p.tiles.rows[r];
      row_buffers<kSet, kStride>(p.v, c, r, row.before, &v);
      const float* x = p.x.corner(row.image, p.first + c) + row.start * kStride * p.x.pitch();
      switch (row.cls) {
        case 0:
          if constexpr (kStride == 2) input_row<kSet, kStride, 0>(p, p.tiles, x, v);
          break;
        case 1: input_row<kSet, kStride, 1>(p, p.tiles, x, v); break;
        case 2:
          if constexpr (kSet.pairs >= 2) input_row<kSet, kStride, 2>(p, p.tiles, x, v);
          break;
        default:
          if constexpr (kSet.pairs >= 3) input_row<kSet, kStride, 3>(p, p.tiles, x, v);
      }
    }
  }
}

template <const WinogradPoints& kSet, int kStride, int nr>
static void output_row(const OutputTransform& p, const Tile& row, float* y, const TileBuffers& m,
                       const TileEpilogue& epilogue) {
  for (int64_t col = 0; col < p.tiles.n_cols; ++col) {
    const Tile& tile = p.tiles.cols[col];
    float* at = y + tile.start * kLanes;
    const int64_t pitch = p.y.pitch();
    switch (tile.cls) {
      case 0:
        if constexpr (kStride == 2) {
          output_tile<kSet, kStride, nr, 0>(m, col, tile.before, at, pitch, row.valid, tile.valid, epilogue);
        }
        break;
      case 1: output_tile<kSet, kStride, nr, 1>(m, col, tile.before, at, pitch, row.valid, tile.valid, epilogue); break;
      case 2:
        if constexpr (kSet.pairs >= 2) {
          output_tile<kSet, kStride, nr, 2>(m, col, tile.before, at, pitch, row.valid, tile.valid, epilogue);
        }
        break;
      default:
        if constexpr (kSet.pairs >= 3) {
          output_tile<kSet, kStride, nr, 3>(m, col, tile.before, at, pitch, row.valid, tile.valid, epilogue);
        }
    }
  }
}

// The part of the epilogue of output channels [k, k + lanes), zeros past the last channel.
static inline TileEpilogue tile_epilogue(const Epilogue& epilogue, int64_t k, int64_t count) {
  return {epilogue.bias ? load_first(epilogue.bias + k, count) : Vec{}, broadcast(epilogue.channel(0).floor)};
}

template <const WinogradPoints& kSet, int kStride>
static void winograd_output_transform(const OutputTransform& p) {
  TileBuffers m;
  for (int64_t block = p.begin; block < p.end; ++block) {
    const int64_t k = (p.first + block) * kLanes;
    const TileEpilogue epilogue = tile_epilogue(p.epilogue, k, p.y.C - k);
    for (int64_t r = 0; r < p.tiles.n_rows; ++r) {
      const Tile& row = p.tiles.rows[r];
      row_buffers<kSet, kStride>(p.m, block - p.begin, r, row.before, &m);
      float* y = p.y.pixel(row.image, p.first + block, row.start, 0);
      switch (row.cls) {
        case 0:
          if constexpr (kStride == 2) output_row<kSet, kStride, 0>(p, row, y, m, epilogue);
          break;
        case 1: output_row<kSet, kStride, 1>(p, row, y, m, epilogue); break;
        case 2:
          if constexpr (kSet.pairs >= 2) output_row<kSet, kStride, 2>(p, row, y, m, epilogue);
          break;
        default:
          if constexpr (kSet.pairs >= 3) output_row<kSet, kStride, 3>(p, row, y, m, epilogue);
      }
      if (p.y.C - k < kLanes) clear_padding(p.y, y, p.y.C - k, row.valid);
    }
  }
}

// U = G g G^T in float64, rounded once.
template <const WinogradPoints& kSet, int kStride, int kVectors>
static void winograd_weight_panels(const WeightTransform& p) {
  constexpr WinogradWeight table = winograd_weight(kSet, kStride == 2);
  constexpr int kPoints = scheme_points<kSet, kStride>(), kWidth = kVectors * kLanes;
  const int64_t c_padded = (p.C + kLanes - 1) / kLanes * kLanes;
  const int64_t panels = (p.K + kWidth - 1) / kWidth;
  for (int64_t panel = p.begin; panel < p.end; ++panel) {
    for (int64_t c = 0; c < c_padded; ++c) {
      double g[9][kWidth] = {}, rows[kPoints][3][kWidth];
      const int64_t count = c < p.C ? p.K - panel * kWidth : 0;
      for (int64_t k = 0; k < kWidth && k < count; ++k) {
        const float* w = p.weight + ((panel * kWidth + k) * p.C + c) * 9;
        for (int t = 0; t < 9; ++t) g[t][k] = w[t];
      }
      for (int i = 0; i < kPoints; ++i) {
        for (int s = 0; s < 3; ++s) {
          for (int k = 0; k < kWidth; ++k) {
            rows[i][s][k] = table.g[i][0] * g[s][k] + table.g[i][1] * g[3 + s][k] + table.g[i][2] * g[6 + s][k];
          }
        }
      }
      for (int i = 0; i < kPoints; ++i) {
        for (int j = 0; j < kPoints; ++j) {
          float* out = p.packed + (((i * kPoints + j) * panels + panel) * c_padded + c) * kWidth;
          const double (*row)[kWidth] = rows[i];
          for (int k = 0; k < kWidth; ++k) {
            out[k] =
                static_cast<float>(table.g[j][0] * row[0][k] + table.g[j][1] * row[1][k] + table.g[j][2] * row[2][k]);
          }
        }
      }
    }
  }
}

template <const WinogradPoints& kSet, int kStride>
static void winograd_weight_transform(const WeightTransform& p) {
  switch (p.vectors) {
    case 1: return winograd_weight_panels<kSet, kStride, 1>(p);
    case 2: return winograd_weight_panels<kSet, kStride, 2>(p);
    default: return winograd_weight_panels<kSet, kStride, 3>(p);
  }
}

template <const WinogradPoints& kSet, int kStride>
constexpr WinogradKernels winograd_kernels() {
  return {winograd_input_transform<kSet, kStride>, winograd_output_transform<kSet, kStride>,
          winograd_weight_transform<kSet, kStride>};
}
