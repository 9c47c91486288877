// SPDX-License-Identifier: MIT
// The stem row: when it applies, how it is launched.
#include "cuda/algos.h"
#include "cuda/conv3x3_stem.cuh"
#include "cuda/gpu_rates.h"

namespace repvgg::cuda {
namespace {

int fragments(const ConvProblem& prob) { return static_cast<int>((prob.K + 15) / 16); }

template <class T>
int64_t grid_size(const ConvProblem& prob) {
  return prob.N * ((prob.P() + T::kTileP - 1) / T::kTileP) * ((prob.Q() + T::kTileQ - 1) / T::kTileQ) *
         ((fragments(prob) + T::kTilesM - 1) / T::kTilesM);
}

template <class F>
auto with_traits(const ConvProblem& prob, const F& f) {
  return prob.dtype == DType::kFloat16 ? f(Conv3x3StemTraits<MmaType::kFloat16>{})
                                       : f(Conv3x3StemTraits<MmaType::kBFloat16>{});
}

Refusal refuse(const ConvProblem& prob, const Device& device) {
  if (prob.dtype != DType::kFloat16 && prob.dtype != DType::kBFloat16) return "x must be float16 or bfloat16";
  if (prob.groups != 1) return "groups must be 1";
  if (prob.stride != 2) return "stride must be 2";
  if (prob.C > 3) return "in_channels must be at most 3";
  if (prob.K % 8 != 0) return "out_channels must be a multiple of 8";
  if (device.capability > 0 && device.capability < 75) return "needs a GPU of compute capability 7.5 or later";
  if (device.capability > 0 && device.capability < 80 && prob.dtype == DType::kBFloat16) {
    return "bfloat16 needs a GPU of compute capability 8.0 or later";
  }
  if (prob.N > 1 << 30 || prob.H > 1 << 28 || prob.W > 1 << 28 || prob.K > 1 << 24) return "an extent is too large";
  if (with_traits(prob, [&](auto traits) { return grid_size<decltype(traits)>(prob); }) > 0x7FFFFFFF) {
    return "the problem needs more than 2^31 - 1 thread blocks";
  }
  const bool code =
      !device.present || with_traits(prob, [](auto traits) { return has_code(conv3x3_stem_kernel<decltype(traits)>); });
  if (!code) return "repvgg_cuda was built without code for this GPU: rebuild with TORCH_CUDA_ARCH_LIST for it";
  return nullptr;
}

// It reads and writes each tensor once, at a share of the memory's rate that is a guess.
double cost(const ConvProblem& prob, const Device& device, bool packed) {
  constexpr double kShare = 0.75;
  const double bytes =
      2.0 * static_cast<double>(prob.N) * static_cast<double>(prob.C * prob.H * prob.W + prob.K * prob.P() * prob.Q());
  double seconds = bytes / (kShare * rates_of(device).memory_bytes) + kLaunchSeconds;
  if (!packed) seconds += kLaunchSeconds;
  // In a network the next layer reads channels_last. Alone, y has to be converted.
  return seconds + (prob.layout == Layout::kNCHW ? 2 * bytes / rates_of(device).memory_bytes + kLaunchSeconds : 0);
}

int64_t packed_bytes(const ConvProblem& prob) { return int64_t{fragments(prob)} * kStemFragmentBytes; }

void pack(const ConvProblem& prob, const PackArgs& args) {
  launch_kernel("pack weights of the stem", pack_stem_kernel,
                {static_cast<unsigned>(fragments(prob)), static_cast<unsigned>(kPackStemThreads)}, args.stream,
                static_cast<int>(prob.C), static_cast<int>(prob.K), static_cast<const uint16_t*>(args.weight),
                static_cast<char*>(args.packed));
}

LaunchPlan plan(const ConvProblem& prob, const Device&) {
  return with_traits(prob, [&](auto traits) {
    using T = decltype(traits);
    return LaunchPlan{grid_size<T>(prob), T::kThreads, T::kHaloH * T::kPitch * 2, T::kTileK, T::kTileP, T::kTileQ, 1, 1,
                      T::kBlocksPerSM};
  });
}

void launch(const ConvProblem& prob, const ConvArgs& args) {
  with_traits(prob, [&](auto traits) {
    using T = decltype(traits);
    const int K = static_cast<int>(prob.K), P = static_cast<int>(prob.P()), Q = static_cast<int>(prob.Q());
    const Conv3x3StemParams params = {
        args.x,
        args.packed,
        {args.y, args.bias, args.bias_dtype, prob.activation, static_cast<int>(prob.N), P, Q, K, K, /*group=*/0},
        prob.layout,
        static_cast<int>(prob.C),
        static_cast<int>(prob.H),
        static_cast<int>(prob.W),
        (fragments(prob) + T::kTilesM - 1) / T::kTilesM,
        (P + T::kTileP - 1) / T::kTileP,
        (Q + T::kTileQ - 1) / T::kTileQ};
    launch_kernel(
        "conv3x3 stem", conv3x3_stem_kernel<T>,
        {static_cast<unsigned>(grid_size<T>(prob)), T::kThreads, 0, args.device.capability >= 90 && !args.just_packed},
        args.stream, params);
  });
}

}  // namespace

extern const ConvAlgo kConv3x3Stem = {"stem",       refuse, cost, packed_bytes,      pack,
                                      no_workspace, launch, plan, RowLayout::kToNHWC};

}  // namespace repvgg::cuda
