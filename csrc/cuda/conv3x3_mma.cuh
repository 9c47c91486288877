// SPDX-License-Identifier: MIT
// 3x3 convolution on tensor cores: x [N, H, W, C] * weight -> y [N, P, Q, K], zero padding 1, bias and ReLU fused.
// float16 or bfloat16, or float32 multiplied as tf32; sums are float32.
//
// One block owns kTileK output channels x a tile of kTileP x kTileQ pixels. As a matrix product: operand A is the
// weights, 16 channels a fragment; operand B is the pixels, 8 neighbours of a row a fragment; the sum runs over chunks
// of 32 bytes of input channels, for each chunk over the columns s of the filter, for each column over its rows r.
//
//   halo     The tile's input with its border, one chunk of channels, is copied to shared memory once per chunk and
//            read for all 9 taps: a tap shifts the address. Two buffers. Pixels outside the image are zeroed once and
//            never copied.
//   weights  Packed in the order of A fragments (packed_layout.h): 16 bytes a lane and tap, copied as they lie, by
//            columns s of the filter, into a ring of three; of two where three are too much for two blocks of a
//            multiprocessor. Six columns, those of two chunks, are a whole number of rounds: slots are constants.
//   reuse    The rows that a warp's outputs need for one column s are loaded once: the taps r = 0, 1, 2 of that column
//            take other rows of the same registers.
//
// With kJoined the images of the batch are joined along their rows, so that a tile need not end where an image ends: 14
// columns fill tiles of 16. Four columns lie between two images in shared memory, of which two are their zero borders.
#pragma once

#include <climits>

#include "cuda/device.cuh"
#include "cuda/mma_output.h"
#include "cuda/mma_tiles.h"

namespace repvgg::cuda {

// The numbers of an MmaTile as template arguments, so that they are in the kernel's name.
template <MmaType Type, int TilesM, int WarpsM, int Rows, int WarpsP, int WarpsQ, int Stride, bool Joined>
struct Conv3x3MmaTraits {
  static constexpr MmaTile kTile{TilesM, WarpsM, Rows, WarpsP, WarpsQ, Stride, Joined, false, false};
  static constexpr MmaType kType = Type;
  static constexpr int kTilesM = TilesM, kWarpsM = WarpsM, kRows = Rows, kWarpsP = WarpsP, kWarpsQ = WarpsQ;
  static constexpr int kStride = Stride, kJoinGap = MmaTile::kJoinGap;
  static constexpr bool kJoined = Joined;
  static constexpr int kTileK = kTile.tile_k(), kTileP = kTile.tile_p(), kTileQ = kTile.tile_q();
  static constexpr int kThreads = kTile.threads(), kBlocksPerSM = 2;
  static constexpr int kElementBytes = Type == MmaType::kTF32 ? 4 : 2, kChunkC = kChunkBytes / kElementBytes;
  static_assert(kThreads == 128, "4 warps: 2 blocks leave each thread the 255 registers it can have");
  static_assert(!kJoined || kStride == 1, "images are joined for stride 1 only");
  static_assert(kTilesM % 2 == 0 || kWarpsM <= 2, "the odd tiles of two warps are a pair");

  static constexpr int kHaloW = kTile.halo_w(), kHaloBytes = kTile.halo_bytes();
  static constexpr int kOddColumns = kTileQ + 1;  // for stride 2 the even columns of a row lie before the odd ones
  static constexpr int kHaloPixels = kTile.halo_h() * kHaloW;
  static constexpr int kHaloCopies = (2 * kHaloPixels + kThreads - 1) / kThreads;  // of 16 bytes, per thread
  static constexpr int kRing = kTile.ring(), kStageBytes = kTile.stage_bytes();
  static constexpr int kWeightCopies = (kStageBytes / 16 + kThreads - 1) / kThreads;
  static constexpr int kSharedBytes = kTile.shared_bytes();
  static_assert(kSharedBytes <= 64 * 1024, "fits on every GPU from sm_75 on");

  // Rows of the halo that a warp's outputs need, two to a load.
  static constexpr int kPixelRows = (kRows - 1) * kStride + 3, kPixelLoads = (kPixelRows + 1) / 2;
};

// Which outputs a block owns. Channel blocks vary fastest, then groups: blocks that run together share their pixels.
template <class T>
struct Conv3x3MmaTile {
  int k16, group;  // first block of 16 channels, within the group
  int p0;          // first row
  int n, q0;       // image and first column; with kJoined those of the tile's first pixel
  int W;

  __device__ Conv3x3MmaTile(const Conv3x3MmaParams& params, int index) : W(params.W) {
    k16 = index % params.k_blocks * (T::kTileK / 16);
    index /= params.k_blocks;
    group = index % params.groups;
    index /= params.groups;
    q0 = index % params.q_tiles * T::kTileQ;
    index /= params.q_tiles;
    p0 = index % params.p_tiles * T::kTileP;
    n = index / params.p_tiles;
    if constexpr (T::kJoined) {
      n = q0 / W;
      q0 -= n * W;
    }
  }

  // Image, relative to n, and column of the tile's v-th pixel in a row.
  __device__ int image_of(int v) const { return T::kJoined ? (q0 + v) / W : 0; }
  __device__ int column_of(int v) const { return q0 + v - image_of(v) * W; }
};

// A pixel's chunk is 32 bytes of the halo. Its halves are swapped in every other four columns: then any 8 neighbours of
// a row lie in different banks, and rows need no padding. `image` gaps lie before the column.
template <class T>
__device__ __forceinline__ int conv3x3_mma_swap(int column, int image) {
  return (column - T::kJoinGap * image) >> 2 & 1;
}

// --------------------------------------------------------------------------------- producer: copies to shared memory

// Thread t copies the 16 bytes t, t + kThreads, ... of the halo and of a column of weights.
template <class T>
struct Conv3x3MmaProducer {
  static constexpr int kOutside = INT_MIN;

  const char* weight;  // the thread's first bytes of the next column
  uint32_t column_stride;
  const char* x;             // the next chunk of the tile's first pixel
  int from[T::kHaloCopies];  // what the thread copies, in bytes from there; kOutside the image
  uint32_t padding;          // bit j: in the next chunk from[j] is padding
  SharedAddress to;          // of the first copy into the first buffer

  // Zeroes what lies outside the image, in both buffers.
  __device__ __forceinline__ Conv3x3MmaProducer(const Conv3x3MmaParams& params, const Conv3x3MmaTile<T>& tile,
                                                int first_chunk, SharedAddress shared)
      : padding(0), to(shared + threadIdx.x * 16) {
    const int thread = static_cast<int>(threadIdx.x);
    const PackedLayout layout(params.groups, params.group_C, params.group_K, T::kChunkC);
    weight =
        static_cast<const char*>(params.packed) + layout.offset(tile.group, first_chunk, 0, tile.k16) + thread * 16;
    column_stride = static_cast<uint32_t>(layout.column_stride());

    const int first_h = tile.p0 * T::kStride, first_w = tile.q0 * T::kStride;
    const int pixel_bytes = params.C * T::kElementBytes;
    const int64_t first = (static_cast<int64_t>(tile.n) * params.H + first_h) * params.W + first_w;
    x = static_cast<const char*>(params.x) + first * pixel_bytes +
        (tile.group * params.group_C + first_chunk * T::kChunkC - layout.padding) * T::kElementBytes;
    const bool padded = first_chunk == 0 && layout.padding > 0;  // then it is the lower half of the chunk
#pragma unroll
    for (int j = 0; j < T::kHaloCopies; ++j) {
      const int pixel = (thread + j * T::kThreads) / 2, row = pixel / T::kHaloW, column = pixel % T::kHaloW;
      int image = 0, h = first_h + row - 1, w = first_w + column - 1;
      if constexpr (T::kJoined) {
        image = (tile.q0 + column) / (params.W + T::kJoinGap);
        w -= image * (params.W + T::kJoinGap);
      } else if constexpr (T::kStride == 2) {
        w += column < T::kOddColumns ? column : column - 2 * T::kOddColumns + 1;
      }
      const int half = thread % 2 ^ conv3x3_mma_swap<T>(column, image);
      if (padded && half == 0) padding |= 1u << j;
      from[j] = ((image * params.H + h - first_h) * params.W + w - first_w) * pixel_bytes + half * 16;
      if (pixel >= T::kHaloPixels) {
        from[j] = kOutside;
      } else if (h < 0 || h >= params.H || w < 0 || w >= params.W || tile.n + image >= params.N) {
        from[j] = kOutside;
        store_shared_16(to + j * T::kThreads * 16, 0, 0, 0, 0);
        store_shared_16(to + j * T::kThreads * 16 + T::kHaloBytes, 0, 0, 0, 0);
      }
    }
  }

  // Starts copying the next column of weights.
  __device__ __forceinline__ void load_weights(int slot) {
    constexpr int kCopies = T::kStageBytes / 16;
#pragma unroll
    for (int j = 0; j < T::kWeightCopies; ++j) {
      if ((j + 1) * T::kThreads <= kCopies || static_cast<int>(threadIdx.x) + j * T::kThreads < kCopies) {
        copy_async_16(to + 2 * T::kHaloBytes + slot * T::kStageBytes + j * T::kThreads * 16,
                      weight + j * T::kThreads * 16);
      }
    }
    weight += column_stride;
  }

  // Starts copying the halo of the next chunk.
  __device__ __forceinline__ void load_halo(SharedAddress buffer) {
    const SharedAddress first = to + buffer;
#pragma unroll
    for (int j = 0; j < T::kHaloCopies; ++j) {
      from[j] = computed_again(from[j]);  // else 2 registers hold each address
      if (from[j] != kOutside) copy_async_16(first + j * T::kThreads * 16, x + from[j]);
    }
    x += kChunkBytes;
  }

  // The same for the block's first chunk, into the first buffer.
  __device__ __forceinline__ void load_first_halo() {
#pragma unroll
    for (int j = 0; j < T::kHaloCopies; ++j) {
      const bool channels = (padding >> j & 1) == 0;
      if (from[j] != kOutside && channels) copy_async_16(to + j * T::kThreads * 16, x + from[j]);
      if (from[j] != kOutside && !channels) store_shared_16(to + j * T::kThreads * 16, 0, 0, 0, 0);
    }
    x += kChunkBytes;
  }
};

// ------------------------------------------------------------------------------------------------ consumer: fragments

template <class T>
struct Conv3x3MmaWarp {
  int lane, m, p, q;  // the warp's place among the block's

  __device__ __forceinline__ Conv3x3MmaWarp() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    lane = static_cast<int>(threadIdx.x) % 32;
    m = warp % T::kWarpsM;
    q = warp / T::kWarpsM % T::kWarpsQ;
    p = warp / T::kWarpsM / T::kWarpsQ;
  }

  // The block's fragment of 16 channels that is the warp's i-th. Fragments 2 j and 2 j + 1 are a pair, which one warp
  // takes; where a warp has an odd number of them, the last ones of two warps are a pair.
  __device__ __forceinline__ int fragment(int i) const {
    constexpr int kPaired = T::kTilesM / 2 * 2;
    return i < kPaired ? m * kPaired + i : T::kWarpsM * kPaired + m;
  }
};

template <class T>
struct Conv3x3MmaConsumer {
  using Pixels = uint32_t[T::kPixelLoads][4];  // B fragments of two rows a load
  using Weights = uint32_t[T::kTilesM][4];
  using Sums = float[T::kRows][T::kTilesM][4];

  SharedAddress pixels[3];              // what the lane gives ldmatrix for column s
  SharedAddress weights, last_weights;  // of the warp's first fragment; of its last, where their number is odd

  __device__ __forceinline__ Conv3x3MmaConsumer(const Conv3x3MmaTile<T>& tile, const Conv3x3MmaWarp<T>& warp,
                                                SharedAddress shared) {
    const int v = warp.q * 8 + warp.lane % 8, half = warp.lane / 8 % 2, image = tile.image_of(v);
    const int row = warp.p * T::kRows * T::kStride + warp.lane / 16;
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      const int column = T::kStride == 2 ? v + s / 2 + s % 2 * T::kOddColumns : v + s + image * T::kJoinGap;
      pixels[s] = shared + (row * T::kHaloW + column) * kChunkBytes + (half ^ conv3x3_mma_swap<T>(column, image)) * 16;
    }
    const SharedAddress ring = shared + 2 * T::kHaloBytes + warp.lane * 16;
    weights = ring + warp.fragment(0) * kTapColumnBytes;
    last_weights = ring + warp.fragment(T::kTilesM - 1) * kTapColumnBytes;
  }

  __device__ __forceinline__ void load_pixels(Pixels& b, int s, SharedAddress buffer) const {
    constexpr int kTwoRows = 2 * T::kHaloW * kChunkBytes;
#pragma unroll
    for (int j = 0; j < T::kPixelRows / 2; ++j) ldmatrix_x4(b[j], pixels[s] + buffer + j * kTwoRows);
    if constexpr (T::kPixelRows % 2 == 1) {  // one row more: the next may belong to the other buffer
      constexpr int kLast = T::kPixelLoads - 1;
      ldmatrix_x2(b[kLast][0], b[kLast][1], pixels[s] + buffer + kLast * kTwoRows);
    }
  }

  __device__ __forceinline__ void load_weights(Weights& a, int slot, int r) const {
#pragma unroll
    for (int i = 0; i < T::kTilesM; ++i) {
      const bool odd = T::kTilesM % 2 == 1 && i == T::kTilesM - 1;
      const SharedAddress fragment = odd ? last_weights : weights + i * kTapColumnBytes;
      load_shared_16(a[i], fragment + slot * T::kStageBytes + r * kTapBytes);
    }
  }

  // One tap: row r of the filter takes the rows r, r + stride, ... that were loaded for its column.
  __device__ __forceinline__ static void multiply(Sums& sum, const Weights& a, const Pixels& b, int r) {
#pragma unroll
    for (int j = 0; j < T::kRows; ++j) {
      const int row = j * T::kStride + r;
#pragma unroll
      for (int i = 0; i < T::kTilesM; ++i) {
        mma<T::kType>(sum[j][i], a[i], b[row / 2][row % 2 * 2], b[row / 2][row % 2 * 2 + 1]);
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------------------ epilogue

template <class T>
using Conv3x3MmaOutput = MmaOutput<T::kType, T::kTilesM>;

template <class T>
__device__ __forceinline__ Conv3x3MmaOutput<T> conv3x3_mma_output(const Conv3x3MmaParams& params,
                                                                  const Conv3x3MmaTile<T>& tile) {
  const Conv3x3MmaWarp<T> warp;
  const int v = warp.q * 8 + warp.lane / 4;
  return {{params.y, params.bias, params.bias_dtype, params.activation, params.N, params.P, params.Q, params.K,
           params.group_K, tile.group},
          tile.n + tile.image_of(v),
          tile.p0 + warp.p * T::kRows,
          tile.column_of(v),
          [&](int i) { return tile.k16 + warp.fragment(i); }};
}

// Where a split block leaves the sums of the thread's row j, fragment i.
template <class T>
__device__ __forceinline__ float* conv3x3_mma_partial(const Conv3x3MmaParams& params, int tile, int part, int j,
                                                      int i) {
  const int64_t fragment = ((static_cast<int64_t>(tile) * params.split + part) * T::kRows + j) * T::kTilesM + i;
  return params.partial + (fragment * T::kThreads + threadIdx.x) * 4;
}

// ------------------------------------------------------------------------------------------------------------- kernels

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSM) conv3x3_mma_kernel(const Conv3x3MmaParams params) {
  if (!can_multiply<T::kType>()) return;  // no row launches it there
  using Consumer = Conv3x3MmaConsumer<T>;
  const SharedAddress shared = shared_address(dynamic_shared());
  const int index = static_cast<int>(blockIdx.x) % params.tiles, part = static_cast<int>(blockIdx.x) / params.tiles;
  const int all_chunks = (params.group_C + T::kChunkC - 1) / T::kChunkC;
  const int first_chunk = part * params.split_chunks, chunks = min(params.split_chunks, all_chunks - first_chunk);
  const Conv3x3MmaTile<T> tile(params, index);
  const Conv3x3MmaWarp<T> warp;
  const Consumer consumer(tile, warp, shared);
  Conv3x3MmaProducer<T> producer(params, tile, first_chunk, shared);

  // Copies travel in groups, of which the newest may be on its way while a column is summed. In a ring of three that is
  // the column after next, with the halo that begins behind column 2. In a ring of two nothing is that far ahead but
  // the halo, in a group of its own.
  producer.load_weights(0);
  wait_for_previous_kernel();  // it may have written x, not the weights
  producer.load_first_halo();
  commit_copies();
  producer.load_weights(1);
  commit_copies();
  if (T::kRing == 3) producer.load_weights(2);
  if (chunks > 1) producer.load_halo(T::kHaloBytes);
  commit_copies();
  let_next_kernel_start();

  typename Consumer::Sums sum = {};
  typename Consumer::Pixels b[2];
  typename Consumer::Weights a[2];
  wait_copies<2>();
  __syncthreads();  // the first halo, its zero border and column 0 of the weights are complete
  consumer.load_pixels(b[0], 0, 0);
  consumer.load_weights(a[0], 0, 0);
  SharedAddress buffer = 0;
#pragma unroll 1
  for (int c = 0; c < chunks; c += 2) {
    // Two chunks x three columns, unrolled: fragments are loaded one tap ahead, into the registers that are free.
#pragma unroll
    for (int stage = 0; stage < 6; ++stage) {
      const int s = stage % 3, chunk = c + stage / 3;
      if (stage == 3 && chunk >= chunks) break;
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        const int tap = stage * 3 + r;
        if (r < 2) {
          consumer.load_weights(a[(tap + 1) & 1], stage % T::kRing, r + 1);
        } else {
          wait_copies<1>();
          __syncthreads();  // the next column is complete; this one is in registers, so its slot is free, and after
                            // column 2 the chunk's halo
          if (chunk + (s + T::kRing) / 3 < chunks) producer.load_weights(stage % T::kRing);
          if (T::kRing == 2) commit_copies();
          if (s == 2 && chunk + 2 < chunks) producer.load_halo(buffer);
          commit_copies();
          if (s == 2) buffer = T::kHaloBytes - buffer;
          consumer.load_pixels(b[(stage + 1) & 1], (s + 1) % 3, buffer);  // after the last column: not used
          consumer.load_weights(a[(tap + 1) & 1], (stage + 1) % T::kRing, 0);
        }
        Consumer::multiply(sum, a[tap & 1], b[stage & 1], r);
      }
    }
  }

  if (params.split == 1) {
    const auto output = conv3x3_mma_output<T>(params, Conv3x3MmaTile<T>(params, computed_again(index)));
#pragma unroll
    for (int j = 0; j < T::kRows; ++j) output.store(j, sum[j]);
    return;
  }
#pragma unroll
  for (int j = 0; j < T::kRows; ++j) {
#pragma unroll
    for (int i = 0; i < T::kTilesM; ++i) {
      const float (&f)[4] = sum[j][i];
      store_global_16(conv3x3_mma_partial<T>(params, index, part, j, i), float_bits(f[0]), float_bits(f[1]),
                      float_bits(f[2]), float_bits(f[3]));
    }
  }
}

// Adds the parts of split sums, in their order, and finishes them. Block b takes row b % kRows of the warps of tile
// b / kRows: a thread meets the sums it would have had without a split.
template <class T>
__global__ void __launch_bounds__(T::kThreads) conv3x3_mma_sum_kernel(const Conv3x3MmaParams params) {
  if (!can_multiply<T::kType>()) return;
  const int index = static_cast<int>(blockIdx.x) / T::kRows, j = static_cast<int>(blockIdx.x) % T::kRows;
  wait_for_previous_kernel();  // the parts are complete
  let_next_kernel_start();
  const auto output = conv3x3_mma_output<T>(params, Conv3x3MmaTile<T>(params, index));
  float sum[T::kTilesM][4] = {};
  for (int part = 0; part < params.split; ++part) {
#pragma unroll
    for (int i = 0; i < T::kTilesM; ++i) {
      const float* from = conv3x3_mma_partial<T>(params, index, part, j, i);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[i][e] += from[e];
    }
  }
  output.store(j, sum);
}

}  // namespace repvgg::cuda
