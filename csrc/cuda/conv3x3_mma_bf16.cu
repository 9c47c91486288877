// SPDX-License-Identifier: MIT
// The tensor-core kernels of one type.
#include "cuda/conv3x3_mma.cuh"

namespace repvgg::cuda {

extern const Conv3x3MmaEntry kConv3x3MmaBFloat16[kMmaTileCount] = {
    conv3x3_mma_entry<MmaType::kBFloat16, 0>(),  conv3x3_mma_entry<MmaType::kBFloat16, 1>(),
    conv3x3_mma_entry<MmaType::kBFloat16, 2>(),  conv3x3_mma_entry<MmaType::kBFloat16, 3>(),
    conv3x3_mma_entry<MmaType::kBFloat16, 4>(),  conv3x3_mma_entry<MmaType::kBFloat16, 5>(),
    conv3x3_mma_entry<MmaType::kBFloat16, 6>(),  conv3x3_mma_entry<MmaType::kBFloat16, 7>(),
    conv3x3_mma_entry<MmaType::kBFloat16, 8>(),  conv3x3_mma_entry<MmaType::kBFloat16, 9>(),
    conv3x3_mma_entry<MmaType::kBFloat16, 10>(), conv3x3_mma_entry<MmaType::kBFloat16, 11>(),
    conv3x3_mma_entry<MmaType::kBFloat16, 12>(), conv3x3_mma_entry<MmaType::kBFloat16, 13>()};

}  // namespace repvgg::cuda
