// SPDX-License-Identifier: MIT
// The kernels of conv3x3_mma.cuh by type and tile: one instance of each for every tile of the menu. Included by the
// file that compiles a type.
#pragma once

#include <utility>

#include "cuda/conv3x3_mma.cuh"

namespace repvgg::cuda {

template <MmaType kType, int kIndex>
using Conv3x3MmaTraitsOf =
    Conv3x3MmaTraits<kType, kMmaTiles[kIndex].tiles_m, kMmaTiles[kIndex].warps_m, kMmaTiles[kIndex].rows,
                     kMmaTiles[kIndex].warps_p, kMmaTiles[kIndex].warps_q, kMmaTiles[kIndex].stride,
                     kMmaTiles[kIndex].joined>;

template <MmaType kType, int kIndex>
constexpr Conv3x3MmaEntry conv3x3_mma_entry() {
  constexpr MmaTile kTile = kMmaTiles[kIndex];
  if constexpr (kType == MmaType::kTF32 && !kTile.tf32) {
    return {nullptr, nullptr};
  } else {
    using T = Conv3x3MmaTraitsOf<kType, kIndex>;
    return {[] { return has_code(conv3x3_mma_kernel<T>); },
            [](const Conv3x3MmaParams& params, bool overlap, bool overlap_sum, void* stream) {
              const auto tiles = static_cast<unsigned>(params.tiles);
              launch_kernel("conv3x3 mma", conv3x3_mma_kernel<T>,
                            {tiles * params.split, T::kThreads, T::kSharedBytes, overlap}, stream, params);
              if constexpr (kTile.split) {
                if (params.split == 1) return;
                launch_kernel("conv3x3 mma, sum of the parts", conv3x3_mma_sum_kernel<T>,
                              {tiles * T::kRows, T::kThreads, 0, overlap_sum}, stream, params);
              }
            }};
  }
}

template <MmaType kType, int... kIndices>
const Conv3x3MmaEntry& conv3x3_mma_entry_of(int tile, std::integer_sequence<int, kIndices...>) {
  static constexpr Conv3x3MmaEntry kEntries[] = {conv3x3_mma_entry<kType, kIndices>()...};
  return kEntries[tile];
}

}  // namespace repvgg::cuda
