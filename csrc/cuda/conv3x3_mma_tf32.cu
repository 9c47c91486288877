// SPDX-License-Identifier: MIT
// The tensor-core kernels of one type.
#include "cuda/conv3x3_mma.cuh"

namespace repvgg::cuda {

extern const Conv3x3MmaEntry kConv3x3MmaTF32[kMmaTileCount] = {
    conv3x3_mma_entry<MmaType::kTF32, 0>(),  conv3x3_mma_entry<MmaType::kTF32, 1>(),
    conv3x3_mma_entry<MmaType::kTF32, 2>(),  conv3x3_mma_entry<MmaType::kTF32, 3>(),
    conv3x3_mma_entry<MmaType::kTF32, 4>(),  conv3x3_mma_entry<MmaType::kTF32, 5>(),
    conv3x3_mma_entry<MmaType::kTF32, 6>(),  conv3x3_mma_entry<MmaType::kTF32, 7>(),
    conv3x3_mma_entry<MmaType::kTF32, 8>(),  conv3x3_mma_entry<MmaType::kTF32, 9>(),
    conv3x3_mma_entry<MmaType::kTF32, 10>(), conv3x3_mma_entry<MmaType::kTF32, 11>(),
    conv3x3_mma_entry<MmaType::kTF32, 12>(), conv3x3_mma_entry<MmaType::kTF32, 13>()};

}  // namespace repvgg::cuda
