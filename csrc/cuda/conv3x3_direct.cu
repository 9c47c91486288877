// SPDX-License-Identifier: MIT
// The exact float32 rows: `direct`, one chain of sums per output, and `direct_split`, where several blocks share the
// input channels of a tile. When they apply, which tile they take, how they are launched.
#include <algorithm>
#include <type_traits>

#include "core/conv_algo.h"
#include "cuda/algos.h"
#include "cuda/conv3x3_direct.cuh"
#include "cuda/gpu_rates.h"

namespace repvgg::cuda {
namespace {

constexpr int kTiles = 4;
constexpr int64_t kMaxGrid = 0x7FFFFFFF;
constexpr int kMaxSlices = 32, kSchedulers = 4;
constexpr int64_t kMaxRow = 1 << 26;  // elements: 17 rows are counted in an int

// Calls f(traits) with a tile of the menu: rows, columns, channels per thread, threads, stride, and blocks per
// multiprocessor as registers and the 64 KB of shared memory of sm_75 allow. 64 or 32 output channels; 64 for images
// that are 8 or 24 wide rather than 16 or 32; and little work per thread, for grids that do not fill the GPU.
template <class F>
auto with_tile(int tile, int stride, const F& f) {
  switch (tile + (stride == 1 ? 0 : kTiles)) {
    case 0: return f(Conv3x3DirectTraits<8, 16, 16, 64, 1, 4>{});
    case 1: return f(Conv3x3DirectTraits<8, 16, 16, 32, 1, 6>{});
    case 2: return f(Conv3x3DirectTraits<8, 8, 16, 32, 1, 5>{});
    case 3: return f(Conv3x3DirectTraits<8, 8, 4, 32, 1, 8>{});
    case 4: return f(Conv3x3DirectTraits<8, 16, 16, 64, 2, 2>{});
    case 5: return f(Conv3x3DirectTraits<8, 16, 16, 32, 2, 3>{});
    case 6: return f(Conv3x3DirectTraits<8, 8, 16, 32, 2, 3>{});
    default: return f(Conv3x3DirectTraits<8, 8, 4, 32, 2, 5>{});
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
int64_t tiles(const ConvProblem& prob) {
  return prob.N * ceil_div(prob.P(), T::kTileP) * ceil_div(prob.Q(), T::kTileQ) * prob.groups *
         ceil_div(prob.group_K(), T::kBlockK);
}

template <class T>
Conv3x3DirectShape shape_of(const ConvProblem& prob) {
  return {static_cast<int>(prob.H),
          static_cast<int>(prob.W),
          static_cast<int>(prob.P()),
          static_cast<int>(prob.Q()),
          prob.groups,
          static_cast<int>(prob.group_C()),
          static_cast<int>(prob.group_K()),
          static_cast<unsigned>(ceil_div(prob.P(), T::kTileP)),
          static_cast<unsigned>(ceil_div(prob.Q(), T::kTileQ)),
          static_cast<unsigned>(ceil_div(prob.group_K(), T::kBlockK)),
          prob.layout};
}

template <class T>
int64_t slice_bytes() {
  return int64_t{4} * T::kThreads * T::kThreadK * T::kThreadQ;
}

// What a thread issues per chunk of input channels: multiply-adds, loads from shared memory, copies, the loop.
template <class T>
double chunk_instructions() {
  constexpr int kMultiplyAdds = T::kChunkC * 9 * T::kThreadK * T::kThreadQ;
  constexpr int kLoads = T::kChunkC * 9 * T::kThreadK / 4 + T::kChunkC * 3 * (T::kStride == 1 ? 3 : 5);
  constexpr int kCopies = 5 * T::kListed / T::kPixelThreads + 2 * 9 * T::kRowsPerThread, kLoop = 47;
  return kMultiplyAdds + kLoads + kCopies + kLoop;
}

// In instructions of a scheduler, as estimated: what a block does before its first chunk; how long a fence and an
// arrival take; a 16-byte load that waits for L2; and the bytes that a multiprocessor writes and reads meanwhile.
constexpr double kSetUp = 300, kArrival = 1000, kReadInstructions = 10, kBytesPerInstruction = 32;

struct Choice {
  int tile, slices;
  double instructions;  // warp instructions that the busiest scheduler issues
};

// The tile, and how many slices of the input channels, for which the busiest scheduler has the least to do. All tiles
// give the same bits, all numbers of slices but 1 others.
Choice choose(const ConvProblem& prob, const Device& device, bool split) {
  const int64_t multiprocessors = rates_of(device).multiprocessors;
  Choice best = {-1, 1, 0};
  for (int tile = 0; tile < kTiles; ++tile) {
    with_tile(tile, prob.stride, [&](auto traits) {
      using T = decltype(traits);
      const int64_t chunks = ceil_div(prob.group_C(), T::kChunkC), blocks = tiles<T>(prob);
      const int64_t least = split ? std::min<int64_t>(2, chunks) : 1;
      const int64_t most = split ? std::min<int64_t>({kMaxSlices, chunks, kMaxGrid / std::max<int64_t>(blocks, 1)}) : 1;
      for (int64_t slices = least; slices <= std::max(least, most); ++slices) {
        const int64_t busiest = ceil_div(ceil_div(blocks * slices, multiprocessors) * T::kThreads / 32, kSchedulers);
        double instructions = static_cast<double>(ceil_div(chunks, slices)) * chunk_instructions<T>() + kSetUp;
        instructions *= static_cast<double>(busiest);
        // The slices' sums go through L2, and the last block of a tile reads them while nothing else of it runs.
        if (split) {
          const auto bytes = static_cast<double>(blocks * slices * slice_bytes<T>());
          instructions += 2 * bytes / static_cast<double>(multiprocessors) / kBytesPerInstruction + kArrival +
                          kReadInstructions * static_cast<double>(slices) * T::kThreadK * T::kThreadQ / 4;
        }
        if (best.tile < 0 || instructions < best.instructions) best = {tile, static_cast<int>(slices), instructions};
      }
    });
  }
  return best;
}

Refusal refuse(const ConvProblem& prob, const Device& device, bool split) {
  if (prob.dtype != DType::kFloat32) return "x must be float32";
  if (std::max({prob.H, prob.W, prob.C, prob.K}) > (1 << 30)) return "H, W and channels must be at most 2^30";
  if (prob.W * (prob.layout == Layout::kNHWC ? prob.C : 1) > kMaxRow) {
    return "a row of the image must have at most 2^26 elements (W, or W * C_in in channels_last)";
  }
  const Choice choice = choose(prob, device, split);
  return with_tile(choice.tile, prob.stride, [&](auto traits) -> Refusal {
    using T = decltype(traits);
    if (tiles<T>(prob) > kMaxGrid / choice.slices) return "the problem needs more than 2^31 - 1 thread blocks";
    if (device.present && !has_code(conv3x3_direct_kernel<T>)) {
      return "repvgg_cuda was built without code for this GPU: rebuild with TORCH_CUDA_ARCH_LIST for it";
    }
    return nullptr;
  });
}

// Predicted, not measured: what the busiest scheduler issues, or the bytes of one pass.
double cost(const ConvProblem& prob, const Device& device, bool split) {
  constexpr double kWarp = 32;
  const GpuRates gpu = rates_of(device);
  const double clocks = kWarp * kSchedulers / float32_lanes(device);  // of an instruction of a warp
  const double issue = choose(prob, device, split).instructions * clocks / gpu.hertz;
  const double bytes = 4.0 * static_cast<double>(prob.N * (prob.K * prob.P() * prob.Q() + prob.C * prob.H * prob.W) +
                                                 prob.K * prob.group_C() * 9);
  return (split ? 2 : 1) * kLaunchSeconds + std::max(issue, bytes / gpu.memory_bytes);
}

LaunchPlan plan(const ConvProblem& prob, const Device& device, bool split) {
  const Choice choice = choose(prob, device, split);
  return with_tile(choice.tile, prob.stride, [&](auto traits) {
    using T = decltype(traits);
    return LaunchPlan{tiles<T>(prob) * choice.slices,
                      T::kThreads,
                      T::kSharedBytes,
                      T::kBlockK,
                      T::kTileP,
                      T::kTileQ,
                      1,
                      choice.slices,
                      T::kBlocksPerSM};
  });
}

// The slices' sums, and behind them how many have arrived.
int64_t workspace(const ConvProblem& prob, const Device& device) {
  const Choice choice = choose(prob, device, /*split=*/true);
  return with_tile(choice.tile, prob.stride, [&](auto traits) {
    using T = decltype(traits);
    return tiles<T>(prob) * (choice.slices * slice_bytes<T>() + int64_t{sizeof(unsigned)});
  });
}

void launch(const ConvProblem& prob, const ConvArgs& args, bool split) {
  const Choice choice = choose(prob, args.device, split);
  with_tile(choice.tile, prob.stride, [&](auto traits) {
    using T = decltype(traits);
    const int64_t n = tiles<T>(prob);
    Conv3x3DirectSlices slices = {choice.slices, nullptr, nullptr};
    if (split) {
      slices.partial = static_cast<float*>(args.workspace);
      slices.arrived =
          reinterpret_cast<unsigned*>(static_cast<char*>(args.workspace) + n * choice.slices * slice_bytes<T>());
      fill_zero(slices.arrived, n * static_cast<int64_t>(sizeof(unsigned)), args.stream);
    }
    const Epilogue epilogue{static_cast<const float*>(args.bias), prob.activation};
    launch_kernel(split ? "conv3x3 direct_split" : "conv3x3 direct", conv3x3_direct_kernel<T>,
                  {static_cast<unsigned>(n * choice.slices), T::kThreads, T::kSharedBytes}, args.stream,
                  shape_of<T>(prob), static_cast<const float*>(args.x), static_cast<const float*>(args.weight),
                  epilogue, slices, static_cast<float*>(args.y));
  });
}

}  // namespace

extern const ConvAlgo kConv3x3Direct = {
    "direct",
    [](const ConvProblem& prob, const Device& device) { return refuse(prob, device, false); },
    [](const ConvProblem& prob, const Device& device, bool) { return cost(prob, device, false); },
    no_bytes,
    no_pack,
    no_workspace,
    [](const ConvProblem& prob, const ConvArgs& args) { launch(prob, args, false); },
    [](const ConvProblem& prob, const Device& device) { return plan(prob, device, false); },
};

extern const ConvAlgo kConv3x3DirectSplit = {
    "direct_split",
    [](const ConvProblem& prob, const Device& device) { return refuse(prob, device, true); },
    [](const ConvProblem& prob, const Device& device, bool) { return cost(prob, device, true); },
    no_bytes,
    no_pack,
    workspace,
    [](const ConvProblem& prob, const ConvArgs& args) { launch(prob, args, true); },
    [](const ConvProblem& prob, const Device& device) { return plan(prob, device, true); },
};

}  // namespace repvgg::cuda
