// SPDX-License-Identifier: MIT
// The tensor-core kernels of one type, compiled beside those of the others.
#include "cuda/conv3x3_mma_entry.h"

namespace repvgg::cuda {

const Conv3x3MmaEntry& conv3x3_mma_tf32(int tile) {
  return conv3x3_mma_entry_of<MmaType::kTF32>(tile, std::make_integer_sequence<int, kMmaTileCount>());
}

}  // namespace repvgg::cuda
