// SPDX-License-Identifier: MIT
// Direct 3x3 convolution in float32: x [N, C, H, W] or [N, H, W, C], weight [K, C/groups, 3, 3], y like x, zero
// padding 1.
//
// One block owns a kTileP x kTileQ tile of outputs of one image, for kBlockK output channels of one group. A ring of
// two buffers in shared memory holds kChunkC input channels each: the tile's input with its halo, and the weights.
// While one is summed, the next is copied. One thread owns kThreadK channels x kThreadQ neighbouring pixels of a row
// and keeps their sums in registers; a warp's threads read the same weights, so that these are broadcast.
//
// The sum of an output is one chain of fused multiply-adds in the order (c, r, s), whatever the tile: results do not
// depend on the tile, the layout or the batch, and can be reproduced exactly on a CPU with fmaf. Only if the input
// channels are split over several blocks (Conv3x3DirectSlices) it is a sum of such chains, in the order of the slices.
#pragma once

#include "core/conv_problem.h"
#include "core/epilogue.h"
#include "cuda/device.cuh"

namespace repvgg::cuda {

template <int TileP, int TileQ, int ThreadK, int Threads, int Stride, int BlocksPerSM>
struct Conv3x3DirectTraits {
  static constexpr int kTileP = TileP, kTileQ = TileQ, kThreadK = ThreadK, kThreads = Threads, kStride = Stride;
  static constexpr int kThreadQ = 8, kVector = 4;          // pixels of a thread; floats of a 16-byte access
  static constexpr int kRowSegments = kTileQ / kThreadQ;   // threads that share a row
  static constexpr int kSegments = kTileP * kRowSegments;  // and a tile
  static constexpr int kBlockK = kThreads / kSegments * kThreadK;
  static constexpr int kBlocksPerSM = BlocksPerSM;  // that fit the registers, and the shared memory from sm_75 on
  static constexpr int kChunkC = 2, kStages = 2;
  static_assert(kThreads % 32 == 0 && 32 % kSegments == 0 && kThreadK % kVector == 0, "threads cover the tile");

  // The staged input is split into Stride x Stride phases, so that the pixels one tap needs are neighbours for stride 2
  // as they are for stride 1: input row Stride * i + a, column Stride * j + b is element (i, j) of phase (a, b).
  static constexpr int kHaloH = (kTileP - 1) * Stride + 3, kHaloW = (kTileQ - 1) * Stride + 3;
  static constexpr int kPhaseH = (kHaloH + Stride - 1) / Stride;
  static constexpr int kPitch = kTileQ + kVector;  // a thread reads whole vectors: up to 4 columns past its own 8
  static_assert(kPitch % 8 == 4, "an odd number of vectors: the rows that are read at a time lie in different banks");
  static constexpr int kPhaseSize = kPhaseH * kPitch;
  // Rounded up so that the kChunkC channels of a pixel, neighbours in channels_last, are stored to different banks.
  static constexpr int kChannelSize = (Stride * Stride * kPhaseSize + 15) / 32 * 32 + 16;
  static_assert(kChannelSize >= Stride * Stride * kPhaseSize && kChunkC == 2, "16 banks for each of two channels");

  // Weights as [k / 4][tap of the chunk][k % 4]: a vector is one tap of four output channels.
  static constexpr int kTaps = kChunkC * 9;
  static constexpr int kStageX = kChunkC * kChannelSize, kStageW = kTaps * kBlockK;  // floats of a buffer

  // What a thread copies: one channel of every kPixelThreads-th pixel; every kChunkC-th tap of some output channels.
  static constexpr int kPixelThreads = kThreads / kChunkC, kWeightRows = kThreads / kChunkC;
  static constexpr int kRowsPerThread = kBlockK / kWeightRows;
  static constexpr int kHalo = kHaloH * kHaloW;
  static constexpr int kListed = (kHalo + kPixelThreads - 1) / kPixelThreads * kPixelThreads;
  static_assert(kBlockK % kWeightRows == 0, "threads share the weights evenly");
  // Shared memory: the buffers of x, those of the weights, the list of pixels, the Conv3x3DirectTile.
  static constexpr int kListAt = kStages * (kStageX + kStageW) * 4, kTileAt = kListAt + kListed * 8;
  static constexpr int kSharedBytes = kTileAt + 32;
  static_assert(kSharedBytes <= 48 * 1024, "needs no leave for more shared memory");
};

// What the kernel needs of a ConvProblem, computed once: a GPU divides slowly. A block is one of
// [N, p_tiles, q_tiles, groups, k_blocks, slices], the last one varying fastest.
struct Conv3x3DirectShape {
  int H, W, P, Q, groups, group_C, group_K;
  unsigned p_tiles, q_tiles, k_blocks;
  Layout layout;

  __device__ bool planar() const { return layout == Layout::kNCHW; }
};

// The input channels of a tile in `count` slices, each summed by a block of its own. With one slice the rest is unused.
struct Conv3x3DirectSlices {
  int count;
  unsigned* arrived;  // [tiles], zero before the launch: the slices that are complete
  float* partial;     // [tiles, count, outputs of a tile]
};

// Where the block works. Neighbours in time share their input in L2.
struct Conv3x3DirectTile {
  unsigned index;  // of the tile, whose slices share it
  int slice, n, p0, q0;
  int group, k0;  // k0: first channel within the group
};
static_assert(sizeof(Conv3x3DirectTile) <= 32, "has its place in shared memory");

template <class T>
__device__ Conv3x3DirectTile conv3x3_direct_tile(const Conv3x3DirectShape& shape, unsigned block, int slices) {
  const auto next = [&block](unsigned extent) {
    const unsigned rest = block % extent;
    block /= extent;
    return static_cast<int>(rest);
  };
  Conv3x3DirectTile tile;
  tile.slice = next(static_cast<unsigned>(slices));
  tile.index = block;
  tile.k0 = next(shape.k_blocks) * T::kBlockK;
  tile.group = next(static_cast<unsigned>(shape.groups));
  tile.q0 = next(shape.q_tiles) * T::kTileQ;
  tile.p0 = next(shape.p_tiles) * T::kTileP;
  tile.n = static_cast<int>(block);
  return tile;
}

// The outputs of a thread within its tile.
template <class T>
struct Conv3x3DirectThread {
  int p, q, k;  // first of its pixels, first of its channels

  __device__ explicit Conv3x3DirectThread(int thread) {
    const int segment = thread % T::kSegments;
    k = thread / T::kSegments * T::kThreadK;
    q = segment % T::kRowSegments * T::kThreadQ;
    p = segment / T::kRowSegments;
    // Eight threads read their vectors at a time. Rows 0, 1, 4, 5 of two segments each lie in different banks, rows
    // 0, 1, 2, 3 would not.
    static_assert(T::kRowSegments <= 2, "a wider tile has an order of rows of its own");
    if (T::kRowSegments == 2) p = (p & ~6) | (p & 2) << 1 | (p & 4) >> 1;
  }
};

// Element (n, c, h, w) of a dense tensor with C channels.
__device__ inline int64_t tensor_offset(Layout layout, int64_t n, int64_t c, int64_t h, int64_t w, int64_t C, int64_t H,
                                        int64_t W) {
  return layout == Layout::kNCHW ? ((n * C + c) * H + h) * W + w : ((n * H + h) * W + w) * C + c;
}

// A pixel of the halo: where its first channel is, from the tile's first pixel inside the image on, and where it goes.
struct alignas(8) Conv3x3DirectPixel {
  int from;  // kOutside: it is padding
  int to;
  static constexpr int kOutside = -1;
};

// The copies of a thread, chunk by chunk. What lies outside the image or the group is zeroed once in both buffers and
// never copied.
template <class T>
class Conv3x3DirectCopies {
 public:
  __device__ Conv3x3DirectCopies(const Conv3x3DirectShape& shape, const Conv3x3DirectTile& tile, const float* x,
                                 const float* weight, int c_begin, float* memory)
      : pixels_(reinterpret_cast<Conv3x3DirectPixel*>(memory + T::kListAt / 4)) {
    const int thread = static_cast<int>(threadIdx.x);
    const int h0 = tile.p0 * T::kStride - 1, w0 = tile.q0 * T::kStride - 1;
    list_pixels(shape, h0, w0, memory);

    // What is contiguous in memory varies fastest with the thread.
    c_ = shape.planar() ? thread / T::kPixelThreads : thread % T::kChunkC;
    pixel_ = shape.planar() ? thread % T::kPixelThreads : thread / T::kChunkC;
    const int64_t C = static_cast<int64_t>(shape.groups) * shape.group_C;
    const int64_t first_c = static_cast<int64_t>(tile.group) * shape.group_C + c_begin;
    from_x_ = x + tensor_offset(shape.layout, tile.n, first_c + c_, max(h0, 0), max(w0, 0), C, shape.H, shape.W);
    step_x_ = T::kChunkC * (shape.planar() ? static_cast<int64_t>(shape.H) * shape.W : 1);
    to_x_ = shared_address(memory + c_ * T::kChannelSize);

    tap_ = thread % T::kChunkC;
    const int k = thread / T::kChunkC, left_k = shape.group_K - tile.k0 - k;
    rows_ = min((left_k + T::kWeightRows - 1) / T::kWeightRows, T::kRowsPerThread);
    step_row_ = static_cast<int64_t>(shape.group_C) * 9 * T::kWeightRows;
    const int64_t first_row = static_cast<int64_t>(tile.group) * shape.group_K + tile.k0 + k;
    from_w_ = weight + (first_row * shape.group_C + c_begin) * 9 + tap_;
    float* const to_w = memory + T::kStages * T::kStageX + k / 4 * T::kTaps * 4 + tap_ * 4 + k % 4;
    to_w_ = shared_address(to_w);
    for (int row = max(rows_, 0); row < T::kRowsPerThread; ++row) {
      for (int i = 0; i < T::kStages * 9; ++i) {
        to_w[i / 9 * T::kStageW + row * kSharedRow + i % 9 * T::kChunkC * 4] = 0.0f;
      }
    }
  }

  // Starts copying the next chunk, of `count` channels, to a buffer. The list of pixels must be complete.
  __device__ __forceinline__ void start(int buffer, int count) {
    if (c_ < count) {
      const SharedAddress to = to_x_ + static_cast<unsigned>(buffer * T::kStageX * 4);
      constexpr int kPixels = T::kListed / T::kPixelThreads, kAtATime = 6;
#pragma unroll
      for (int first = 0; first < kPixels; first += kAtATime) {
        Conv3x3DirectPixel pixels[kAtATime];
#pragma unroll
        for (int i = 0; i < kAtATime && first + i < kPixels; ++i) {
          pixels[i] = pixels_[pixel_ + (first + i) * T::kPixelThreads];
        }
#pragma unroll
        for (int i = 0; i < kAtATime && first + i < kPixels; ++i) {
          copy_async_4_if(pixels[i].from != Conv3x3DirectPixel::kOutside, to + pixels[i].to, from_x_ + pixels[i].from);
        }
      }
    }
    const SharedAddress to = to_w_ + static_cast<unsigned>(buffer * T::kStageW * 4);
#pragma unroll
    for (int row = 0; row < T::kRowsPerThread; ++row) {
      const float* const from = from_w_ + row * step_row_;
      const int taps = row < rows_ ? count * 9 - tap_ : 0;
#pragma unroll
      for (int i = 0; i < 9; ++i) {
        copy_async_4_if(i * T::kChunkC < taps, to + static_cast<unsigned>(row * kSharedRow + i * T::kChunkC * 4) * 4,
                        from + i * T::kChunkC);
      }
    }
    from_x_ += step_x_;
    from_w_ += T::kTaps;
    commit_copies();
  }

 private:
  static constexpr int kSharedRow = T::kWeightRows / 4 * T::kTaps * 4;  // from one of a thread's rows to its next
  static_assert(T::kWeightRows % 4 == 0, "a thread's rows have one place in their vectors");

  // The halo whose pixel (0, 0) is pixel (h0, w0) of the image.
  __device__ void list_pixels(const Conv3x3DirectShape& shape, int h0, int w0, float* memory) const {
    const int step = shape.planar() ? 1 : shape.groups * shape.group_C, step_row = shape.W * step;
    for (int at = static_cast<int>(threadIdx.x); at < T::kListed; at += T::kThreads) {
      const int row = at / T::kHaloW, column = at % T::kHaloW, h = h0 + row, w = w0 + column;
      const bool inside = at < T::kHalo && h >= 0 && h < shape.H && w >= 0 && w < shape.W;
      const int phase = row % T::kStride * T::kStride + column % T::kStride;
      const int to = phase * T::kPhaseSize + row / T::kStride * T::kPitch + column / T::kStride;
      pixels_[at] = {inside ? (h - max(h0, 0)) * step_row + (w - max(w0, 0)) * step : Conv3x3DirectPixel::kOutside,
                     to * 4};
      if (inside || at >= T::kHalo) continue;
      for (int i = 0; i < T::kStages * T::kChunkC; ++i) {
        memory[i / T::kChunkC * T::kStageX + i % T::kChunkC * T::kChannelSize + to] = 0.0f;
      }
    }
  }

  Conv3x3DirectPixel* const pixels_;  // [kListed], shared
  const float *from_x_, *from_w_;
  int64_t step_x_, step_row_;
  SharedAddress to_x_, to_w_;
  int c_, pixel_, tap_, rows_;
};

// Adds one input channel to the sums. x: the thread's first pixel in phase (0, 0), w: tap (0, 0) of its first channels.
template <class T>
__device__ __forceinline__ void conv3x3_direct_accumulate(SharedAddress x, SharedAddress w,
                                                          float (&sum)[T::kThreadK][T::kThreadQ]) {
  constexpr int S = T::kStride, kVector = T::kVector;
#pragma unroll
  for (int r = 0; r < 3; ++r) {
    uint32_t pixel[S][T::kThreadQ / kVector + 1][kVector];  // [phase of the column][neighbour]
#pragma unroll
    for (int b = 0; b < S; ++b) {
      const int row = (r % S * S + b) * T::kPhaseSize + r / S * T::kPitch;
#pragma unroll
      for (int v = 0; v < T::kThreadQ / kVector + 1; ++v) {
        if (v * kVector < T::kThreadQ + (2 - b) / S) load_shared_16(pixel[b][v], x + (row + v * kVector) * 4);
      }
    }
#pragma unroll
    for (int s = 0; s < 3; ++s) {
#pragma unroll
      for (int k = 0; k < T::kThreadK; k += kVector) {
        uint32_t tap[kVector];
        load_shared_16(tap, w + (k * T::kTaps + (r * 3 + s) * kVector) * 4);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
#pragma unroll
          for (int j = 0; j < T::kThreadQ; ++j) {
            const int at = j + s / S;
            sum[k + i][j] =
                fmaf(bits_float(tap[i]), bits_float(pixel[s % S][at / kVector][at % kVector]), sum[k + i][j]);
          }
        }
      }
    }
  }
}

// Hands over the sums of one slice. The block that completes a tile adds them up, in the order of the slices whatever
// the order in which they came, and goes on with the result; for the others this is false, and the end.
template <class T>
__device__ bool conv3x3_direct_join(const Conv3x3DirectTile& tile, const Conv3x3DirectSlices& slices, float* memory,
                                    float (&sum)[T::kThreadK][T::kThreadQ]) {
  constexpr int kVector = T::kVector, kVectors = T::kThreadK * T::kThreadQ / kVector;
  constexpr int64_t kSliceSize = T::kThreads * T::kThreadK * T::kThreadQ;
  float* const first = slices.partial + tile.index * slices.count * kSliceSize + threadIdx.x * kVector;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const float* const part = &sum[i * kVector / T::kThreadQ][i * kVector % T::kThreadQ];
    store_global_16(first + tile.slice * kSliceSize + i * T::kThreads * kVector, float_bits(part[0]),
                    float_bits(part[1]), float_bits(part[2]), float_bits(part[3]));
  }
  __threadfence();
  __syncthreads();  // the slice is complete, and visible to whoever sees the arrival
  int* const complete = reinterpret_cast<int*>(memory);  // nobody reads a chunk any more
  if (threadIdx.x == 0)
    *complete = atomicAdd(slices.arrived + tile.index, 1u) + 1 == static_cast<unsigned>(slices.count);
  __syncthreads();  // the block knows whether it came last
  if (!*complete) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < T::kThreadK * T::kThreadQ; ++i) sum[i / T::kThreadQ][i % T::kThreadQ] = 0.0f;
#pragma unroll 1
  for (int slice = 0; slice < slices.count; ++slice) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float* const part = &sum[i * kVector / T::kThreadQ][i * kVector % T::kThreadQ];
      uint32_t bits[kVector];
      load_global_16_written(bits, first + slice * kSliceSize + i * T::kThreads * kVector);
#pragma unroll
      for (int j = 0; j < kVector; ++j) part[j] += bits_float(bits[j]);
    }
  }
  return true;
}

template <int kVector>
__device__ __forceinline__ void conv3x3_direct_store_vector(float* to, const float (&v)[4]) {
  if constexpr (kVector == 4) {
    store_global_16(to, float_bits(v[0]), float_bits(v[1]), float_bits(v[2]), float_bits(v[3]));
  } else {
    *to = v[0];
  }
}

// Stores the outputs that exist, kVector neighbours in memory at a time: they exist together.
template <class T, int kVector, bool kPlanar>
__device__ void conv3x3_direct_store(float* to, int64_t step, int count_k, int count_q,
                                     const float (&sum)[T::kThreadK][T::kThreadQ]) {
  constexpr int kOuter = kPlanar ? T::kThreadK : T::kThreadQ, kInner = kPlanar ? T::kThreadQ : T::kThreadK;
  const int outer = kPlanar ? count_k : count_q, inner = kPlanar ? count_q : count_k;
#pragma unroll
  for (int a = 0; a < kOuter; ++a, to += step) {
    if (a >= outer) break;
#pragma unroll
    for (int b = 0; b < kInner; b += kVector) {
      if (b >= inner) break;
      float v[4];
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = kPlanar ? sum[a][b + i] : sum[b + i][a];
      conv3x3_direct_store_vector<kVector>(to + b, v);
    }
  }
}

// Bias, activation and the stores, of 16 bytes each where the tensor allows it.
template <class T>
__device__ void conv3x3_direct_finish(const Conv3x3DirectShape& shape, const Conv3x3DirectTile& tile,
                                      const Conv3x3DirectThread<T>& mine, const Epilogue& epilogue, float* y,
                                      float (&sum)[T::kThreadK][T::kThreadQ]) {
  const int p = tile.p0 + mine.p, q = tile.q0 + mine.q;
  const int count_k = shape.group_K - tile.k0 - mine.k, count_q = shape.Q - q;  // outputs that exist, or more
  if (p >= shape.P || count_q <= 0 || count_k <= 0) return;
  const int64_t k = static_cast<int64_t>(tile.group) * shape.group_K + tile.k0 + mine.k;
#pragma unroll
  for (int i = 0; i < T::kThreadK; ++i) {
    if (i >= count_k) break;
    const Epilogue::Channel channel = epilogue.channel(k + i);
#pragma unroll
    for (int j = 0; j < T::kThreadQ; ++j) sum[i][j] = channel(sum[i][j]);
  }

  const int64_t K = static_cast<int64_t>(shape.groups) * shape.group_K;
  float* const to = y + tensor_offset(shape.layout, tile.n, k, p, q, K, shape.P, shape.Q);
  const bool aligned = (shape.planar() ? shape.Q : shape.group_K) % 4 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
  if (shape.planar()) {
    const int64_t plane = static_cast<int64_t>(shape.P) * shape.Q;
    if (aligned) {
      conv3x3_direct_store<T, 4, true>(to, plane, count_k, count_q, sum);
    } else {
      conv3x3_direct_store<T, 1, true>(to, plane, count_k, count_q, sum);
    }
  } else if (aligned) {
    conv3x3_direct_store<T, 4, false>(to, K, count_k, count_q, sum);
  } else {
    conv3x3_direct_store<T, 1, false>(to, K, count_k, count_q, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSM)
    conv3x3_direct_kernel(const Conv3x3DirectShape shape, const float* x, const float* weight, const Epilogue epilogue,
                          const Conv3x3DirectSlices slices, float* y) {
  float* const memory = reinterpret_cast<float*>(dynamic_shared());
  const Conv3x3DirectThread<T> mine(static_cast<int>(threadIdx.x));
  const int chunks = (shape.group_C + T::kChunkC - 1) / T::kChunkC;
  const auto slice_begin = [&](int slice) {  // the first slices are a chunk longer where they are not equal
    return min((slice * (chunks / slices.count) + min(slice, chunks % slices.count)) * T::kChunkC, shape.group_C);
  };
  const Conv3x3DirectTile tile = conv3x3_direct_tile<T>(shape, blockIdx.x, slices.count);
  auto* const kept = reinterpret_cast<Conv3x3DirectTile*>(memory + T::kTileAt / 4);
  if (threadIdx.x == 0) *kept = tile;  // while the sums need the registers
  const int c_begin = slice_begin(tile.slice), c_end = slice_begin(tile.slice + 1);
  Conv3x3DirectCopies<T> copies(shape, tile, x, weight, c_begin, memory);
  __syncthreads();  // the list of pixels is complete, and so is the tile
  copies.start(0, min(T::kChunkC, c_end - c_begin));

  float sum[T::kThreadK][T::kThreadQ] = {};
  const SharedAddress x_mine = shared_address(memory + mine.p * T::kPitch + mine.q);
  const SharedAddress w_mine = shared_address(memory + T::kStages * T::kStageX + mine.k * T::kTaps);
  int buffer = 0;
#pragma unroll 1
  for (int c0 = c_begin; c0 < c_end; c0 += T::kChunkC, buffer ^= 1) {
    wait_copies<0>();
    __syncthreads();  // the chunk is complete, and the one before it is read: its buffer is free
    if (c0 + T::kChunkC < c_end) copies.start(buffer ^ 1, min(T::kChunkC, c_end - c0 - T::kChunkC));
    const int count = min(T::kChunkC, c_end - c0);
    SharedAddress x_chunk = x_mine + static_cast<unsigned>(buffer * T::kStageX * 4);
    SharedAddress w_chunk = w_mine + static_cast<unsigned>(buffer * T::kStageW * 4);
#pragma unroll 1
    for (int c = 0; c < count; ++c, x_chunk += T::kChannelSize * 4, w_chunk += 9 * T::kVector * 4) {
      conv3x3_direct_accumulate<T>(x_chunk, w_chunk, sum);
    }
  }

  if (slices.count > 1 && !conv3x3_direct_join<T>(*kept, slices, memory, sum)) return;
  conv3x3_direct_finish<T>(shape, *kept, mine, epilogue, y, sum);
}

}  // namespace repvgg::cuda
