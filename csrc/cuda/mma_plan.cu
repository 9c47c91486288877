// SPDX-License-Identifier: MIT
// The model: a block's time for a chunk of channels is little more than the longest of what its products take on the
// tensor cores, its reads and copies in shared memory, its copies from L2. Blocks share the multiprocessors evenly, the
// fullest one decides; memory traffic bounds the whole. Constants in clocks are estimates.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/gpu_rates.h"
#include "cuda/mma_plan.h"

namespace repvgg::cuda {
namespace {

constexpr double kBlockClocks = 1500;       // of a block's beginning and end, where they are not hidden
constexpr double kHiddenBlockClocks = 200;  // the same beside other blocks
constexpr double kStageClocks = 100;        // of a barrier and the first loads behind it, one for each column
constexpr double kIssued = 0.965;           // of the tensor cores' clocks, by a model of the compiled code
constexpr double kSharedBytesPerClock = 128;
constexpr double kL2Faster = 2.5;  // than memory: where partial sums stay

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Reads and writes each tensor once.
double bytes_moved(const ConvProblem& prob) {
  const double element = prob.dtype == DType::kFloat32 ? 4 : 2;
  return element * (static_cast<double>(prob.N) * (prob.C * prob.H * prob.W + prob.K * prob.P() * prob.Q()) +
                    static_cast<double>(prob.K * prob.group_C() * 9));
}

double outputs(const ConvProblem& prob) { return static_cast<double>(prob.N * prob.P() * prob.Q() * prob.K); }

// Clocks of a multiprocessor for one chunk of one block.
double chunk_clocks(const MmaTile& tile, const ConvProblem& prob, const GpuRates& gpu) {
  const bool tf32 = prob.dtype == DType::kFloat32;
  const double products = 9.0 * tile.tile_k() * tile.tile_p() * tile.tile_q() * (tf32 ? 8 : 16);
  const double copied = tile.halo_bytes() + 3 * tile.stage_bytes();
  const int warps = tile.threads() / 32, pixel_rows = (tile.rows - 1) * tile.stride + 3;
  const double read = 3.0 * warps * (3 * tile.tiles_m * kTapBytes + pixel_rows * 8 * kChunkBytes);
  const double tensor = products / (tf32 ? gpu.mma_products / 2 : gpu.mma_products);
  // The fourth power: what is far from the longest hides behind it, what is near gets in its way.
  const double shared = (copied + read) / kSharedBytesPerClock, l2 = copied / gpu.l2_bytes;
  return std::pow(std::pow(tensor, 4) + std::pow(shared, 4) + std::pow(l2, 4), 0.25);
}

}  // namespace

bool mma_tile_fits(const MmaTile& tile, const ConvProblem& prob) {
  if (tile.stride != prob.stride) return false;
  if (prob.dtype == DType::kFloat32 && !tile.tf32) return false;
  if (tile.joined && (prob.N < 2 || prob.W < MmaTile::kMinJoinedW || prob.N * prob.W > 1 << 30)) return false;
  // What a block copies lies within 2^31 bytes of its first pixel.
  const int64_t rows = tile.joined ? tile.max_images() * prob.H : tile.halo_h();
  if (rows * prob.W * prob.C * (prob.dtype == DType::kFloat32 ? 4 : 2) > 0x7FFFFFFF) return false;
  // Pairs of fragments begin at multiples of 32 channels.
  return tile.tile_k() % 32 == 0 || prob.group_K() <= tile.tile_k();
}

MmaPlan plan_mma_tile(int index, int split, const ConvProblem& prob, const Device& device) {
  const GpuRates gpu = rates_of(device);
  const MmaTile& tile = kMmaTiles[index];
  const int64_t chunks = ceil_div(prob.group_C(), prob.dtype == DType::kFloat32 ? 8 : 16);
  MmaPlan plan;
  plan.tile = index;
  plan.split_chunks = static_cast<int>(ceil_div(chunks, split));
  plan.split = static_cast<int>(ceil_div(chunks, plan.split_chunks));
  plan.k_blocks = static_cast<int>(ceil_div(prob.group_K(), tile.tile_k()));
  plan.p_tiles = static_cast<int>(ceil_div(prob.P(), tile.tile_p()));
  plan.q_tiles = static_cast<int>(ceil_div(tile.joined ? prob.N * prob.Q() : prob.Q(), tile.tile_q()));
  plan.tiles = int64_t{plan.k_blocks} * prob.groups * plan.q_tiles * plan.p_tiles * (tile.joined ? 1 : prob.N);

  const double busiest = static_cast<double>(ceil_div(plan.blocks(), gpu.multiprocessors));
  const double together = std::min<double>(
      {busiest, MmaPlan::kBlocksPerSM, std::floor(gpu.shared_kib * 1024.0 / (tile.shared_bytes() + 1024))});
  const double alone = chunk_clocks(tile, prob, gpu);
  const double chunk = std::max(alone, (alone + 3 * kStageClocks) / together) / kIssued;
  double seconds =
      (busiest * plan.split_chunks * chunk + kBlockClocks + kHiddenBlockClocks * std::max(0.0, busiest - 2)) /
      gpu.hertz;
  seconds = std::max(seconds, bytes_moved(prob) / gpu.memory_bytes) + kLaunchSeconds;
  if (plan.split > 1) {  // the parts are written and read, by one more launch
    seconds += 2.0 * static_cast<double>(plan.workspace_bytes()) / (kL2Faster * gpu.memory_bytes) + kLaunchSeconds;
  }
  plan.seconds = seconds;
  return plan;
}

MmaPlan plan_mma(const ConvProblem& prob, const Device& device) {
  const int64_t chunks = ceil_div(prob.group_C(), prob.dtype == DType::kFloat32 ? 8 : 16);
  MmaPlan best;
  for (int index = 0; index < kMmaTileCount; ++index) {
    const MmaTile& tile = kMmaTiles[index];
    if (!mma_tile_fits(tile, prob)) continue;
    for (const int split : {1, 2, 3, 4, 6, 8, 12, 16}) {
      if (split > 1 && (!tile.split || split > chunks)) break;
      const MmaPlan plan = plan_mma_tile(index, split, prob, device);
      if (best.tile < 0 || plan.seconds < best.seconds) best = plan;
    }
  }
  return best;
}

double implicit_gemm_seconds(const ConvProblem& prob, const Device& device, int passes) {
  const GpuRates gpu = rates_of(device);
  const int64_t pixels = prob.N * prob.P() * prob.Q(), k16 = 9 * ceil_div(prob.group_C(), 16);
  double best = std::numeric_limits<double>::infinity();
  constexpr int kTiles[][2] = {{256, 128}, {128, 256}, {128, 128}, {128, 64}, {64, 128}, {64, 64}, {128, 32}};
  for (const auto& [m, n] : kTiles) {
    for (const int split : {1, 2, 4, 8}) {
      const double blocks =
          static_cast<double>(ceil_div(pixels, m) * ceil_div(prob.group_K(), n) * prob.groups * split);
      const double clocks = std::max(m * n * 16 / gpu.gemm_products, (m + n) * 32 / gpu.l2_bytes);
      const double busiest =
          std::max(1.0, static_cast<double>(ceil_div(static_cast<int64_t>(blocks), gpu.multiprocessors)));
      double seconds = (busiest * static_cast<double>(ceil_div(k16, split)) * clocks + kBlockClocks) / gpu.hertz;
      if (split > 1) seconds += 8 * split * outputs(prob) / (kL2Faster * gpu.memory_bytes);
      best = std::min(best, seconds);
    }
  }
  constexpr double kFitsL2 = 20e6;
  const double pass = 2 * 2 * outputs(prob);
  const double pass_rate = gpu.memory_bytes * (pass < 2 * kFitsL2 ? kL2Faster : 1);
  return std::max(best, bytes_moved(prob) / gpu.memory_bytes) + kLaunchSeconds +
         passes * (pass / pass_rate + kLaunchSeconds);
}

}  // namespace repvgg::cuda
