// SPDX-License-Identifier: MIT
#include "cuda/pack_weights.cuh"
#include "cuda/pack_weights.h"

namespace repvgg::cuda {
namespace {

PackedLayout layout_of(const ConvProblem& prob) {
  const int element_bytes = prob.dtype == DType::kFloat32 ? 4 : 2;
  return {prob.groups, prob.group_C(), prob.group_K(), kChunkBytes / element_bytes};
}

template <MmaType kType>
void pack(const ConvProblem& prob, const PackArgs& args) {
  using T = PackWeightsTraits<kType>;
  const PackedLayout layout = layout_of(prob);
  const unsigned blocks = static_cast<unsigned>(layout.groups) * layout.chunks * layout.tiles;
  launch_kernel("pack weights", pack_weights_kernel<T>, {blocks, T::kThreads}, args.stream, layout,
                static_cast<int>(prob.group_C()), static_cast<int>(prob.group_K()), args.weight,
                static_cast<char*>(args.packed));
}

}  // namespace

int64_t mma_packed_bytes(const ConvProblem& prob) { return layout_of(prob).bytes(); }

void mma_pack(const ConvProblem& prob, const PackArgs& args) {
  prob.dtype == DType::kFloat32 ? pack<MmaType::kTF32>(prob, args) : pack<MmaType::kFloat16>(prob, args);
}

}  // namespace repvgg::cuda
