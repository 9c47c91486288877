// SPDX-License-Identifier: MIT
// Between dense tensors and the inner layout. Included once per target, inside its namespace, after simd.inl: no
// #include, no free names.

// Zeroes the channels from `count` on, in `rows` rows of pixels that start at y.
static void clear_padding(const Blocked& y, float* row, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i, row += y.pitch()) {
    for (int64_t w = 0; w < y.W; ++w) {
      for (int64_t c = count; c < kLanes; ++c) row[w * kLanes + c] = 0.0f;
    }
  }
}

// Where a row's next vector of pixels begins: the last one ends with the row, over pixels that are done already.
static RVG_INLINE int64_t next_vector(int64_t w, int64_t W) {
  return w + 2 * kLanes <= W || w + kLanes == W ? w + kLanes : W - kLanes;
}

static void planes_to_inner(const Reorder& p, int64_t channels) {
  const int64_t W = p.inner.W, plane = p.inner.H * W;
  const float* base = p.dense + (p.n * p.inner.C + p.block * kLanes) * plane;
  for (int64_t h = p.begin; h < p.end; ++h) {
    const float* x = base + h * W;
    float* out = p.inner.pixel(p.n, p.block, h, 0);
    if (channels < kLanes || W < kLanes) {
      for (int64_t w = 0; w < W; ++w) {
        for (int64_t c = 0; c < kLanes; ++c) out[w * kLanes + c] = c < channels ? x[c * plane + w] : 0.0f;
      }
      continue;
    }
    for (int64_t w = 0; w < W; w = next_vector(w, W)) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) v[c] = load(x + c * plane + w);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(out + (w + i) * kLanes, v[i]);
    }
  }
}

static void planes_from_inner(const Reorder& p, int64_t channels) {
  const int64_t W = p.inner.W, plane = p.inner.H * W;
  float* base = p.dense + (p.n * p.inner.C + p.block * kLanes) * plane;
  for (int64_t h = p.begin; h < p.end; ++h) {
    float* y = base + h * W;
    const float* in = p.inner.pixel(p.n, p.block, h, 0);
    if (channels < kLanes || W < kLanes) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t w = 0; w < W; ++w) y[c * plane + w] = in[w * kLanes + c];
      }
      continue;
    }
    for (int64_t w = 0; w < W; w = next_vector(w, W)) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) v[i] = load(in + (w + i) * kLanes);
      transpose(v);
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) store(y + c * plane + w, v[c]);
    }
  }
}

static int64_t block_channels(const Reorder& p) {
  const int64_t left = p.inner.C - p.block * kLanes;
  return left < kLanes ? left : kLanes;
}

static void to_inner(const Reorder& p) {
  const int64_t channels = block_channels(p), C = p.inner.C, W = p.inner.W;
  if (p.layout == Layout::kNCHW) return planes_to_inner(p, channels);
  for (int64_t h = p.begin; h < p.end; ++h) {
    const float* x = p.dense + (p.n * p.inner.H + h) * W * C + p.block * kLanes;
    float* out = p.inner.pixel(p.n, p.block, h, 0);
    for (int64_t w = 0; w < W; ++w) {
      store(out + w * kLanes, channels == kLanes ? load(x + w * C) : load_first(x + w * C, channels));
    }
  }
}

static void from_inner(const Reorder& p) {
  const int64_t channels = block_channels(p), C = p.inner.C, W = p.inner.W;
  if (p.layout == Layout::kNCHW) return planes_from_inner(p, channels);
  for (int64_t h = p.begin; h < p.end; ++h) {
    float* y = p.dense + (p.n * p.inner.H + h) * W * C + p.block * kLanes;
    const float* in = p.inner.pixel(p.n, p.block, h, 0);
    for (int64_t w = 0; w < W; ++w) {
      if (channels == kLanes) {
        store(y + w * C, load(in + w * kLanes));
      } else {
        for (int64_t c = 0; c < channels; ++c) y[w * C + c] = in[w * kLanes + c];
      }
    }
  }
}
