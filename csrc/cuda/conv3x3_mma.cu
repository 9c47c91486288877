// SPDX-License-Identifier: MIT
// The tensor-core rows: when they apply, which tile they take, how they are launched.
#include <limits>

#include "cuda/algos.h"
#include "cuda/gpu_rates.h"
#include "cuda/mma_plan.h"
#include "cuda/mma_tiles.h"
#include "cuda/pack_weights.h"

namespace repvgg::cuda {
namespace {

const Conv3x3MmaEntry& entry_of(const ConvProblem& prob, int tile) {
  if (prob.dtype == DType::kFloat16) return conv3x3_mma_float16(tile);
  return prob.dtype == DType::kBFloat16 ? conv3x3_mma_bfloat16(tile) : conv3x3_mma_tf32(tile);
}

// What both rows ask for; `channels` is a copy of 16 bytes.
Refusal refuse_common(const ConvProblem& prob, const Device& device, int channels) {
  if (prob.group_C() % channels != 0 || prob.group_K() % channels != 0) {
    return channels == 8 ? "in_channels and out_channels must be multiples of 8 in each group"
                         : "in_channels and out_channels must be multiples of 4 in each group";
  }
  // Coordinates, channels and the grid are int, offsets in memory int64_t.
  constexpr int64_t kMost = 1 << 30;
  if (prob.N > kMost || prob.H > kMost || prob.W > kMost || prob.C > kMost / 64 || prob.K > kMost / 64 ||
      mma_packed_bytes(prob) / kTapColumnBytes > kMost) {
    return "an extent is too large";
  }
  const MmaPlan plan = plan_mma(prob, device);
  if (plan.tile < 0) return "the rows of an image are too long";
  if (plan.blocks() > std::numeric_limits<int>::max()) return "the problem needs more than 2^31 - 1 thread blocks";
  if (device.present && !entry_of(prob, plan.tile).has_code()) {
    return "repvgg_cuda was built without code for this GPU: rebuild with TORCH_CUDA_ARCH_LIST for it";
  }
  return nullptr;
}

// Of a GPU at hand or described; not of one that is unknown.
bool older_than(const Device& device, int capability) {
  return device.capability > 0 && device.capability < capability;
}

Refusal refuse(const ConvProblem& prob, const Device& device) {
  if (prob.dtype != DType::kFloat16 && prob.dtype != DType::kBFloat16) return "x must be float16 or bfloat16";
  if (older_than(device, 75)) return "needs a GPU of compute capability 7.5 or later";
  if (prob.dtype == DType::kBFloat16 && older_than(device, 80)) {
    return "bfloat16 needs a GPU of compute capability 8.0 or later";
  }
  return refuse_common(prob, device, 8);
}

Refusal refuse_tf32(const ConvProblem& prob, const Device& device) {
  if (prob.dtype != DType::kFloat32) return "x must be float32";
  if (older_than(device, 80)) return "needs a GPU of compute capability 8.0 or later";
  return refuse_common(prob, device, 4);
}

double cost(const ConvProblem& prob, const Device& device, bool packed) {
  double seconds = plan_mma(prob, device).seconds;
  const double bytes_per_second = rates_of(device).memory_bytes;
  if (!packed) seconds += 2 * static_cast<double>(mma_packed_bytes(prob)) / bytes_per_second + kLaunchSeconds;
  if (prob.layout == Layout::kNCHW) {  // x and y are converted
    const auto elements = static_cast<double>(prob.N * (prob.C * prob.H * prob.W + prob.K * prob.P() * prob.Q()));
    seconds += 2 * 2 * elements / bytes_per_second + 2 * kLaunchSeconds;
  }
  return seconds;
}

// Only where it is asked for: tf32 keeps 10 bits of each factor, and "auto" is exact for float32.
double cost_tf32(const ConvProblem&, const Device&, bool) { return std::numeric_limits<double>::infinity(); }

int64_t workspace(const ConvProblem& prob, const Device& device) { return plan_mma(prob, device).workspace_bytes(); }

LaunchPlan plan(const ConvProblem& prob, const Device& device) { return plan_mma(prob, device).launch_plan(prob); }

void launch(const ConvProblem& prob, const ConvArgs& args) { launch_mma(prob, args, plan_mma(prob, args.device)); }

}  // namespace

void launch_mma(const ConvProblem& prob, const ConvArgs& args, const MmaPlan& plan) {
  Conv3x3MmaParams params;
  params.x = args.x;
  params.packed = args.packed;
  params.bias = args.bias;
  params.y = args.y;
  params.partial = static_cast<float*>(args.workspace);
  params.bias_dtype = args.bias_dtype;
  params.activation = prob.activation;
  params.N = static_cast<int>(prob.N);
  params.C = static_cast<int>(prob.C);
  params.H = static_cast<int>(prob.H);
  params.W = static_cast<int>(prob.W);
  params.K = static_cast<int>(prob.K);
  params.P = static_cast<int>(prob.P());
  params.Q = static_cast<int>(prob.Q());
  params.groups = prob.groups;
  params.group_C = static_cast<int>(prob.group_C());
  params.group_K = static_cast<int>(prob.group_K());
  params.k_blocks = plan.k_blocks;
  params.p_tiles = plan.p_tiles;
  params.q_tiles = plan.q_tiles;
  params.tiles = static_cast<int>(plan.tiles);
  params.split = plan.split;
  params.split_chunks = plan.split_chunks;
  const bool overlap = args.device.capability >= 90;  // reads weights before the launch ahead has ended
  entry_of(prob, plan.tile).launch(params, overlap && !args.just_packed, overlap, args.stream);
}

constexpr bool kFoldsPacked = true;
extern const ConvAlgo kConv3x3Mma = {"mma",     refuse, cost, mma_packed_bytes, mma_pack,
                                     workspace, launch, plan, RowLayout::kNHWC, kFoldsPacked};
extern const ConvAlgo kConv3x3MmaTF32 = {"mma_tf32", refuse_tf32, cost_tf32, mma_packed_bytes, mma_pack,
                                         workspace,  launch,      plan,      RowLayout::kNHWC, kFoldsPacked};

}  // namespace repvgg::cuda
