// SPDX-License-Identifier: MIT
// The epilogue of tensor-core kernels: bias, activation, rounding, and the way from fragments to y [N, P, Q, K].
//
// Rows of a fragment are output channels, columns are pixels: a lane holds neighbouring pixels of a channel. A
// transposition in the warp gives it neighbouring channels of a pixel: 4 of one fragment, 8 of a pair, thanks to the
// order in which channels are packed (packed_channel).
#pragma once

#include "core/epilogue.h"
#include "cuda/device.cuh"
#include "cuda/packed_layout.h"

namespace repvgg::cuda {

struct MmaOutputParams {
  void* y;
  const void* bias;  // [K] or nullptr
  DType bias_dtype;
  Activation activation;
  int N, P, Q, K, group_K, group;
};

// A warp's kTilesM fragments of 16 channels, for 8 neighbouring pixels of each of some rows.
template <MmaType kType, int kTilesM>
class MmaOutput {
 public:
  // This lane's pixel, lane / 4 of the warp's 8, is (n, first_p + j, q) for row j; fragment_of(i): which fragment of
  // the group the i-th one is. Fragments i and i + 1 of even i are a pair, or i is the warp's last.
  template <class FragmentOf>
  __device__ __forceinline__ MmaOutput(const MmaOutputParams& params, int n, int first_p, int q,
                                       const FragmentOf& fragment_of)
      : fragments_((params.group_K + 15) / 16), channels_(params.group_K), first_p_(first_p), P_(params.P) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    floor_ = params.activation == Activation::kRelu ? 0.0f : -INFINITY;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      fragment_[i] = fragment_of(i);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int k = packed_channel(fragment_[i], lane / 4 + 8 * h, fragments_);
        const bool present = params.bias != nullptr && k < channels_;
        bias_[i][h] = present ? load_float(params.bias, params.bias_dtype, params.group * channels_ + k) : 0.0f;
      }
    }
    row_bytes_ = static_cast<int64_t>(params.Q) * params.K * kElementBytes;
    const int64_t k = (static_cast<int64_t>(n) * P_ * params.Q + q) * params.K + params.group * channels_;
    y_ = q < params.Q && n < params.N ? static_cast<char*>(params.y) + k * kElementBytes : nullptr;
  }

  // Row j. All lanes call it: they transpose together.
  __device__ __forceinline__ void store(int j, const float (&sum)[kTilesM][4]) const {
#pragma unroll
    for (int i = 0; i < kTilesM; i += 2) {
      uint32_t words[2][kWords] = {};
      finish(sum[i], bias_[i], words[0]);
      if (i + 1 < kTilesM) finish(sum[i + 1], bias_[i + 1], words[1]);
      const bool paired = i + 1 < kTilesM && fragment_[i] + 1 < fragments_;
      const int k = packed_channel(fragment_[i], 2 * (threadIdx.x % 4), fragments_);  // the first of the lane's 4 or 8
      if (y_ == nullptr || first_p_ + j >= P_ || k >= channels_) continue;
      char* const to = y_ + (first_p_ + j) * row_bytes_ + k * kElementBytes;
      if constexpr (kElementBytes == 4) {
        store_global_16(to, words[0][0], words[0][1], words[0][2], words[0][3]);
        if (paired) store_global_16(to + 16, words[1][0], words[1][1], words[1][2], words[1][3]);
      } else if (paired) {
        store_global_16(to, words[0][0], words[0][1], words[1][0], words[1][1]);
      } else {
        store_global_8(to, words[0][0], words[0][1]);
      }
    }
  }

 private:
  static constexpr int kElementBytes = kType == MmaType::kTF32 ? 4 : 2;
  static constexpr int kWords = kElementBytes;  // of 4 channels

  // One fragment, finished: 4 neighbouring channels of pixel lane / 4.
  __device__ __forceinline__ void finish(const float (&sum)[4], const float (&bias)[2],
                                         uint32_t (&words)[kWords]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Epilogue::Channel activate{bias[h], floor_};
      const float low = activate(sum[2 * h]), high = activate(sum[2 * h + 1]);
      if constexpr (kElementBytes == 2) {
        words[h] = movmatrix_trans(pack_pair<kType>(low, high));
      } else {  // 32 bits are transposed as two halves
        const uint32_t a = float_bits(low), b = float_bits(high);
        const uint32_t lower = movmatrix_trans((a & 0xFFFFu) | b << 16);
        const uint32_t upper = movmatrix_trans(a >> 16 | (b & 0xFFFF0000u));
        words[2 * h] = (lower & 0xFFFFu) | upper << 16;
        words[2 * h + 1] = lower >> 16 | (upper & 0xFFFF0000u);
      }
    }
  }

  float bias_[kTilesM][2], floor_;  // of rows lane / 4 and lane / 4 + 8 of each fragment
  int fragment_[kTilesM], fragments_, channels_;
  int first_p_, P_;
  int64_t row_bytes_;
  char* y_;  // the lane's pixel in row 0 of the image, first channel of the group; nullptr outside
};

}  // namespace repvgg::cuda
