// SPDX-License-Identifier: MIT
// The first layer of a network on tensor cores: x [N, C, H, W] or [N, H, W, C] with C <= 3, 16-bit, -> y [N, P, Q, K],
// stride 2.
//
// The 27 products of an output are one sum of 32: row r of the filter takes the products 10 r to 10 r + 8, in the order
// (s, c), the others are padding. Staged with its channels interleaved, the input has those 9 values next to each
// other, so that a B fragment is read from shared memory as it is, without an im2col. The layer moves far more bytes
// than the tensor cores could need: it is built to be simple.
#pragma once

#include "cuda/device.cuh"
#include "cuda/mma_output.h"

namespace repvgg::cuda {

constexpr int kStemRun = 10;                     // products of one row of the filter: 9 and one of padding
constexpr int kStemFragmentBytes = 2 * 32 * 16;  // 16 output channels: two A fragments

// Tap and channel of the product k: row r, element e = 3 s + c of its run.
struct StemProduct {
  int r, e;
  RVG_HOST_DEVICE explicit StemProduct(int k) : r(k / kStemRun), e(k % kStemRun) {}
  RVG_HOST_DEVICE bool padding() const { return r == 3 || e == 9; }
};

template <MmaType Type>
struct Conv3x3StemTraits {
  static constexpr MmaType kType = Type;
  static constexpr int kTilesM = 4, kTileK = 16 * kTilesM, kStride = 2;
  static constexpr int kThreads = 128, kBlocksPerSM = 4;
  static constexpr int kTileP = 4, kTileQ = 8 * kThreads / 32;  // a warp owns 8 columns
  static constexpr int kHaloH = (kTileP - 1) * kStride + 3, kHaloW = (kTileQ - 1) * kStride + 3;
  static constexpr int kPitch = (3 * kHaloW + 1 + 1) / 2 * 2;
  static_assert(kPitch % 2 == 0 && 3 * kStride % 2 == 0, "a pair of values is a word");
};

struct Conv3x3StemParams {
  const void* x;
  const void* packed;
  MmaOutputParams out;
  Layout layout;  // of x
  int C, H, W;
  int k_blocks, p_tiles, q_tiles;
};

// Stages tile and halo as [row][column][3], zeros outside the image and for channels that x does not have.
template <class T>
__device__ void conv3x3_stem_stage(const Conv3x3StemParams& params, int n, int p0, int q0, uint16_t* staged) {
  const int64_t image = static_cast<int64_t>(n) * params.C * params.H * params.W;
  const auto* const x = static_cast<const uint16_t*>(params.x) + image;
  const bool planes = params.layout == Layout::kNCHW;
  constexpr int kPixels = T::kHaloH * T::kHaloW;
  for (int i = static_cast<int>(threadIdx.x); i < 3 * kPixels; i += T::kThreads) {
    // What is contiguous in memory varies fastest.
    const int c = planes ? i / kPixels : i % 3;
    const int pixel = planes ? i % kPixels : i / 3;
    const int row = pixel / T::kHaloW, column = pixel % T::kHaloW;
    const int h = p0 * T::kStride + row - 1, w = q0 * T::kStride + column - 1;
    uint16_t value = 0;
    if (c < params.C && h >= 0 && h < params.H && w >= 0 && w < params.W) {
      value = x[planes ? (static_cast<int64_t>(c) * params.H + h) * params.W + w
                       : (static_cast<int64_t>(h) * params.W + w) * params.C + c];
    }
    staged[row * T::kPitch + 3 * column + c] = value;
  }
  // The last run of a row reads one value more, as padding.
  for (int row = static_cast<int>(threadIdx.x); row < T::kHaloH; row += T::kThreads) {
    for (int i = 3 * T::kHaloW; i < T::kPitch; ++i) staged[row * T::kPitch + i] = 0;
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksPerSM) conv3x3_stem_kernel(const Conv3x3StemParams params) {
  if (!can_multiply<T::kType>()) return;  // the row refuses
  RVG_SHARED(uint32_t, staged, [T::kHaloH * T::kPitch / 2]);
  int block = static_cast<int>(blockIdx.x);
  const int k16 = block % params.k_blocks * T::kTilesM;
  block /= params.k_blocks;
  const int q0 = block % params.q_tiles * T::kTileQ;
  block /= params.q_tiles;
  const int p0 = block % params.p_tiles * T::kTileP, n = block / params.p_tiles;
  const int lane = static_cast<int>(threadIdx.x) % 32, v = static_cast<int>(threadIdx.x) / 32 * 8 + lane / 4;

  const int fragments = (params.out.group_K + 15) / 16;
  uint32_t a[2][T::kTilesM][4];
#pragma unroll
  for (int i = 0; i < T::kTilesM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int fragment = min(k16 + i, fragments - 1);  // past the last: not stored
      load_global_16(a[half][i],
                     static_cast<const char*>(params.packed) + fragment * kStemFragmentBytes + (half * 32 + lane) * 16);
    }
  }
  wait_for_previous_kernel();  // it may have written x, not the weights
  conv3x3_stem_stage<T>(params, n, p0, q0, reinterpret_cast<uint16_t*>(staged));
  let_next_kernel_start();
  __syncthreads();  // the tile is complete

  // Products 2 (lane % 4) + 8 i and the next: where they are in the run of the lane's pixel, and which are padding.
  int word[4];
  uint32_t mask[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const StemProduct product(2 * (lane % 4) + 8 * i);
    word[i] = product.r == 3 ? 0 : (product.r * T::kPitch + 3 * T::kStride * v + product.e) / 2;
    mask[i] = product.r == 3 ? 0 : product.e == 8 ? 0xFFFFu : 0xFFFFFFFFu;
  }
  const MmaOutput<T::kType, T::kTilesM> output(params.out, n, p0, q0 + v, [&](int i) { return k16 + i; });
#pragma unroll
  for (int j = 0; j < T::kTileP; ++j) {
    uint32_t b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = staged[j * T::kStride * T::kPitch / 2 + word[i]] & mask[i];
    float sum[T::kTilesM][4] = {};
#pragma unroll
    for (int i = 0; i < T::kTilesM; ++i) {
      mma<T::kType>(sum[i], a[0][i], b[0], b[1]);
      mma<T::kType>(sum[i], a[1][i], b[2], b[3]);
    }
    output.store(j, sum);
  }
}

// Packs weights [K, C, 3, 3] as A fragments: block b packs fragment b, thread t lane t % 32 of half t / 32.
constexpr int kPackStemThreads = 64;

__global__ void __launch_bounds__(kPackStemThreads)
    pack_stem_kernel(int C, int K, const uint16_t* weight, char* packed) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, fragment = static_cast<int>(blockIdx.x);
  uint32_t a[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {  // registers of an A fragment: see device.cuh
    const int k = packed_channel(fragment, lane / 4 + e % 2 * 8, static_cast<int>(gridDim.x));
    uint32_t pair = 0;
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      const StemProduct product(thread / 32 * 16 + e / 2 * 8 + lane % 4 * 2 + low);
      const int s = product.e / 3, c = product.e % 3;
      if (k >= K || product.padding() || c >= C) continue;
      pair |= static_cast<uint32_t>(weight[((k * C + c) * 3 + product.r) * 3 + s]) << 16 * low;
    }
    a[e] = pair;
  }
  store_global_16(packed + fragment * kStemFragmentBytes + thread * 16, a[0], a[1], a[2], a[3]);
}

}  // namespace repvgg::cuda
