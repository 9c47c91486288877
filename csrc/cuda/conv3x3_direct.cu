// SPDX-License-Identifier: MIT
// The exact float32 row: when it applies, how it is launched.
#include <type_traits>

#include "core/conv_algo.h"
#include "cuda/algos.h"
#include "cuda/conv3x3_direct.cuh"

namespace repvgg::cuda {
namespace {

template <class T>
int64_t grid_size(const ConvProblem& prob) {
  const int64_t k_blocks = (prob.group_K() + T::kBlockK - 1) / T::kBlockK;
  const int64_t p_tiles = (prob.P() + T::kTileP - 1) / T::kTileP, q_tiles = (prob.Q() + T::kTileQ - 1) / T::kTileQ;
  return prob.N * p_tiles * q_tiles * prob.groups * k_blocks;
}

// Calls f(traits) with the tile for this problem: 16 wide where 32 would leave half of its last column of tiles empty.
template <class F>
auto with_traits(const ConvProblem& prob, const F& f) {
  const bool narrow = (prob.Q() - 1) % 32 < 16;
  const auto with_layout = [&](auto layout) {
    constexpr Layout kLayout = decltype(layout)::value;
    if (prob.stride == 1) {
      return narrow ? f(Conv3x3DirectTraits<16, 1, kLayout>{}) : f(Conv3x3DirectTraits<32, 1, kLayout>{});
    }
    return narrow ? f(Conv3x3DirectTraits<16, 2, kLayout>{}) : f(Conv3x3DirectTraits<32, 2, kLayout>{});
  };
  return prob.layout == Layout::kNCHW ? with_layout(std::integral_constant<Layout, Layout::kNCHW>{})
                                      : with_layout(std::integral_constant<Layout, Layout::kNHWC>{});
}

Refusal refuse(const ConvProblem& prob, const Device& device) {
  if (prob.dtype != DType::kFloat32) return "x must be float32";
  // Coordinates within an image are int, offsets int64_t; the grid has one dimension.
  if (prob.H > (1 << 30) || prob.W > (1 << 30)) return "H and W must be at most 2^30";
  const int64_t grid = with_traits(prob, [&](auto traits) { return grid_size<decltype(traits)>(prob); });
  if (grid > 0x7FFFFFFF) return "the problem needs more than 2^31 - 1 thread blocks";
  const bool code = !device.present ||
                    with_traits(prob, [](auto traits) { return has_code(conv3x3_direct_kernel<decltype(traits)>); });
  if (!code) return "repvgg_cuda was built without code for this GPU: rebuild with TORCH_CUDA_ARCH_LIST for it";
  return nullptr;
}

// Unmeasured: by the byte and FLOP floors a direct kernel can win where few channels are summed, so that launches and
// memory traffic rule; where sums are long cuDNN has Winograd kernels.
double cost(const ConvProblem& prob, const Device& device, bool) {
  return aten_cost(prob, device) * (prob.group_C() <= 32 ? 0.9 : 1.1);
}

LaunchPlan plan(const ConvProblem& prob, const Device&) {
  return with_traits(prob, [&](auto traits) {
    using T = decltype(traits);
    return LaunchPlan{grid_size<T>(prob), T::kThreads, T::kSharedBytes, T::kBlockK, T::kTileP, T::kTileQ, 1, 1,
                      T::kBlocksPerSM};
  });
}

void launch(const ConvProblem& prob, const ConvArgs& args) {
  with_traits(prob, [&](auto traits) {
    using T = decltype(traits);
    const Epilogue epilogue{static_cast<const float*>(args.bias), prob.activation};
    launch_kernel("conv3x3 direct", conv3x3_direct_kernel<T>, {static_cast<unsigned>(grid_size<T>(prob)), T::kThreads},
                  args.stream, prob, static_cast<const float*>(args.x), static_cast<const float*>(args.weight),
                  epilogue, static_cast<float*>(args.y));
  });
}

}  // namespace

extern const ConvAlgo kConv3x3Direct = {"direct", refuse, cost, no_bytes, no_pack, no_workspace, launch, plan};

}  // namespace repvgg::cuda
