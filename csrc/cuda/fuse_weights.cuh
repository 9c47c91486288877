// SPDX-License-Identifier: MIT
// Folds many blocks with one launch, into plain weights, packed ones (packed_layout.h) or both. The table of blocks is
// a parameter of the kernel, by value: nothing has to be copied to the device first, kept alive or waited for, and a
// captured graph holds its own copy.
//
// A thread block owns 16 output channels x 16 input channels of one block, all 9 taps: rows of 144 taps. Everything is
// summed in double, in the order of the branches, and rounded once; for packed tf32 the float32 is rounded again, as
// pack_weights does. The 16 output channels are those of a fragment, so that what is packed goes through shared memory
// alone.
#pragma once

#include <algorithm>

#include "core/fold.h"
#include "cuda/device.cuh"
#include "cuda/packed_layout.h"

namespace repvgg::cuda {

constexpr int kFuseThreads = 96;
constexpr int kFuseBlocksPerSM = 6;  // the shared memory of sm_86
constexpr int kFuseVector = 4;       // taps that a thread sums at a time, where all rows begin at a multiple of it
constexpr int kFuseK = 16, kFuseC = 16, kFuseRow = kFuseC * 9;
constexpr int kFusePitch = packed_pitch(kFuseRow);  // of a staged output channel
static_assert(kFusePitch % 8 == 4, "8 rows begin in 8 different groups of 4 banks");

// A FoldProblem whose branches are [first_branch, first_branch + n_branches) of the table.
struct FoldJob {
  int64_t C;
  void *weight, *bias;  // weight: nullptr where it is not asked for
  char* packed;         // the same
  FoldBatchNorm post_bn;
  PackedLayout layout;  // of `packed`; without it one whose chunks are kFuseC channels
  DType weight_dtype, bias_dtype;
  int32_t group_K;  // output channels whose fragments are numbered together
  int32_t first_branch, n_branches;
  unsigned first_block;  // thread blocks from this one on are this job's
  bool vectors;          // C, and where the tensors lie, are multiples of kFuseVector

  // Thread blocks for one fragment's output channels.
  RVG_HOST_DEVICE int steps() const { return static_cast<int>((C + layout.padding + kFuseC - 1) / kFuseC); }
};

template <int kJobs, int kBranches>
struct FoldTable {
  static constexpr int kMaxJobs = kJobs;
  static_assert(kJobs >= 1 && kBranches >= kMaxBranches, "any block fits");
  int32_t n;
  FoldJob jobs[kJobs];
  FoldBranch branches[kBranches];
};

// A block alone is launched with few parameters, a model's blocks with as many as there may be: blocks of 3 branches
// fill them, others leave some of either.
using FoldTableOne = FoldTable<1, kMaxBranches>;
constexpr int fold_table_branches(int bytes) {
  constexpr int kOfBlock = 3, kBlockBytes = sizeof(FoldJob) + kOfBlock * sizeof(FoldBranch);
  return std::max(kMaxBranches, bytes / kBlockBytes * kOfBlock);
}
constexpr int fold_table_jobs(int bytes) {
  constexpr int kHeadBytes = alignof(FoldJob), kJobBytes = sizeof(FoldJob), kBranchBytes = sizeof(FoldBranch);
  return (bytes - kHeadBytes - fold_table_branches(bytes) * kBranchBytes) / kJobBytes;
}
template <int kBytes>
using FoldTableOf = FoldTable<fold_table_jobs(kBytes), fold_table_branches(kBytes)>;
using FoldTableMany = FoldTableOf<kMaxParameterBytes>;
static_assert(sizeof(FoldTableOne) <= 4096 && sizeof(FoldTableOf<4096>) <= 4096, "fit in parameters before CUDA 12.1");
static_assert(sizeof(FoldTableOf<32764>) <= 32764 && FoldTableOf<32764>::kMaxJobs == 67, "fit in those since then");

// Elements [i, i + kVector), of 16 bytes or 8 or 2 times 16 together where there are four.
template <int kVector>
__device__ __forceinline__ void fuse_weights_load(const FoldArray& from, int64_t i, double (&values)[kVector]) {
  if constexpr (kVector == kFuseVector) {
    uint32_t bits[4];
    switch (from.dtype) {
      case DType::kFloat64: {
        const auto* const data = static_cast<const double*>(from.data) + i;
        for (int half = 0; half < 2; ++half) {
          load_global_16(bits, data + 2 * half);
          memcpy(&values[2 * half], bits, sizeof bits);
        }
        return;
      }
      case DType::kFloat32:
        load_global_16(bits, static_cast<const float*>(from.data) + i);
        for (int e = 0; e < 4; ++e) values[e] = static_cast<double>(bits_float(bits[e]));
        return;
      default:
        load_global_8(bits[0], bits[1], static_cast<const uint16_t*>(from.data) + i);
        for (int e = 0; e < 4; ++e) {
          const auto element = static_cast<uint16_t>(bits[e / 2] >> e % 2 * 16);
          values[e] = from.dtype == DType::kFloat16 ? Float16::decode(element) : BFloat16::decode(element);
        }
    }
  } else {
    values[0] = from.at(i);
  }
}

// Elements rounded to a dtype of 16 or 32 bits; 0 for float64.
template <int kVector>
__device__ __forceinline__ void fuse_weights_round(DType dtype, const double (&values)[kVector],
                                                   uint32_t (&bits)[kVector]) {
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    switch (dtype) {
      case DType::kFloat64: bits[e] = 0; break;
      case DType::kFloat32: bits[e] = float_bits(static_cast<float>(values[e])); break;
      case DType::kFloat16: bits[e] = Float16::encode(values[e]); break;
      case DType::kBFloat16: bits[e] = BFloat16::encode(values[e]); break;
    }
  }
}

// Writes elements [i, i + kVector): of float64 the values, else their roundings.
template <int kVector>
__device__ __forceinline__ void fuse_weights_store(void* to, DType dtype, int64_t i, const double (&values)[kVector],
                                                   const uint32_t (&bits)[kVector]) {
  if (dtype == DType::kFloat64) {
    double* const at = static_cast<double*>(to) + i;
    if constexpr (kVector == kFuseVector) {
      uint32_t halves[4];
      for (int half = 0; half < 2; ++half) {
        memcpy(halves, &values[2 * half], sizeof halves);
        store_global_16(at + 2 * half, halves[0], halves[1], halves[2], halves[3]);
      }
    } else {
      *at = values[0];
    }
  } else if (dtype == DType::kFloat32) {
    uint32_t* const at = static_cast<uint32_t*>(to) + i;
    if constexpr (kVector == kFuseVector) {
      store_global_16(at, bits[0], bits[1], bits[2], bits[3]);
    } else {
      *at = bits[0];
    }
  } else {
    uint16_t* const at = static_cast<uint16_t*>(to) + i;
    if constexpr (kVector == kFuseVector) {
      store_global_8(at, bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
    } else {
      *at = static_cast<uint16_t>(bits[0]);
    }
  }
}

// What belongs to the thread block's output channels.
struct FuseChannels {
  double scales[kMaxBranches][kFuseK];  // of the branches
  FoldAffine post[kFuseK];
};

// The sums of taps [i, i + kVector) of output channel k, which is row `row` of the thread block's.
template <int kVector, class Table>
__device__ __forceinline__ void fuse_weights_sum(const Table& table, const FoldJob& job, const FuseChannels& channels,
                                                 int row, int64_t k, int64_t i, double (&sums)[kVector]) {
  constexpr int kCentre = 4;
  // The centre tap among these, if any, belongs to this input channel.
  const int64_t c = (i + 8 - kCentre) / 9;
  const int64_t centre = c * 9 + kCentre - i;
  for (int b = 0; b < job.n_branches; ++b) {
    const FoldBranch& branch = table.branches[job.first_branch + b];
    const double scale = channels.scales[b][row];
    if (branch.kind == FoldKind::kConv3x3) {
      double values[kVector];
      fuse_weights_load<kVector>(branch.kernel, k * job.C * 9 + i, values);
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums[e] += values[e] * scale;
    } else if (centre < kVector) {
      double value = 0.0;
      if (branch.kind == FoldKind::kConv1x1) value = branch.kernel.at(k * job.C + c) * scale;
      if (branch.kind == FoldKind::kIdentity && c == fold_identity_channel(k, job.C)) value = scale;
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums[e] += e == centre ? value : 0.0;
    }
  }
#pragma unroll
  for (int e = 0; e < kVector; ++e) sums[e] *= channels.post[row].scale;
}

// Which part of a job a thread block owns.
struct FusePart {
  int group, tile, step;

  __device__ __forceinline__ FusePart(const FoldJob& job, int index) {
    step = index % job.steps();
    index /= job.steps();
    tile = index % job.layout.tiles;
    group = index / job.layout.tiles;
  }
  // The output channel of a fragment's row; -1: there is none.
  __device__ __forceinline__ int64_t channel(const FoldJob& job, int row) const {
    const int k = packed_channel(tile, row, job.layout.tiles);
    return k < job.group_K ? static_cast<int64_t>(group) * job.group_K + k : -1;
  }
};

// Where the i-th taps lie that a thread folds at a time. With vectors a warp takes 32 of a row's 36; the last 4 of all
// rows come behind, those of two rows that lie in different banks side by side: shared memory serves 8 lanes at a time.
template <int kVector>
__device__ __forceinline__ void fuse_weights_place(int i, int& row, int& at) {
  if constexpr (kVector == 1) {
    row = i / kFuseRow;
    at = i % kFuseRow;
  } else {
    constexpr int kVectors = kFuseRow / kVector, kLast = kVectors - 32;
    static_assert(kLast == 4 && kFusePitch / kVector % 8 * 4 % 8 == 4, "rows 4 apart begin 4 vectors apart");
    const int last = i - kFuseK * 32, pair = last / kLast;
    row = last < 0 ? i / 32 : (pair & 8) | (pair & 1) << 2 | (pair >> 1 & 3);
    at = (last < 0 ? i % 32 : 32 + last % kLast) * kVector;
  }
}

// Folds the thread block's taps, kVector at a time: into the plain weight, and for packed ones into `staged`, [row of
// the fragment][input channel][tap], where rows end and padding begins zeros.
template <int kVector, class Table>
__device__ __forceinline__ void fuse_weights_taps(const Table& table, const FoldJob& job, const FusePart& part,
                                                  const FuseChannels& channels, uint32_t* staged) {
  const int64_t first = (static_cast<int64_t>(part.step) * kFuseC - job.layout.padding) * 9;  // negative: padding
  for (int i = static_cast<int>(threadIdx.x); i < kFuseK * kFuseRow / kVector; i += kFuseThreads) {
    int row, at;
    fuse_weights_place<kVector>(i, row, at);
    const int64_t k = part.channel(job, row), tap = first + at;
    double sums[kVector] = {};
    uint32_t bits[kVector] = {};
    if (k >= 0 && tap >= 0 && tap < job.C * 9) {
      fuse_weights_sum<kVector>(table, job, channels, row, k, tap, sums);
      fuse_weights_round<kVector>(job.weight_dtype, sums, bits);
      if (job.weight != nullptr) {
        fuse_weights_store<kVector>(job.weight, job.weight_dtype, k * job.C * 9 + tap, sums, bits);
      }
    }
    if (job.packed == nullptr) continue;
    if (job.weight_dtype == DType::kFloat32) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) bits[e] = round_tf32(bits_float(bits[e]));
    }
    uint32_t* const to = staged + row * kFusePitch + at;
    if constexpr (kVector == kFuseVector) {
      store_shared_16(shared_address(to), bits[0], bits[1], bits[2], bits[3]);
    } else {
      *to = bits[0];
    }
  }
}

// Writes the fragments of the thread block: one chunk of 16 channels, or two of 8.
template <int kElementBytes>
__device__ __forceinline__ void fuse_weights_pack(const FoldJob& job, const FusePart& part, const uint32_t* staged) {
  constexpr int kChunkC = kChunkBytes / kElementBytes, kChunks = kFuseC / kChunkC;
  const int lane = static_cast<int>(threadIdx.x) % 32, s = static_cast<int>(threadIdx.x) / 32;
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = part.step * kChunks + i;
    if (chunk >= job.layout.chunks) return;
    char* const to = job.packed + job.layout.offset(part.group, chunk, s, part.tile) + lane * 16;
    for (int r = 0; r < 3; ++r) {
      uint32_t a[4];
      for (int e = 0; e < 4; ++e) {
        a[e] = packed_register<kElementBytes>(staged + i * kChunkC * 9, kFusePitch, r * 3 + s, lane, e);
      }
      store_global_16(to + r * kTapBytes, a[0], a[1], a[2], a[3]);
    }
  }
}

template <class Table>
__global__ void __launch_bounds__(kFuseThreads, kFuseBlocksPerSM)
    fuse_weights_kernel(const __grid_constant__ Table table) {
  RVG_SHARED(FuseChannels, channels, [1]);
  RVG_SHARED(uint32_t, staged, [kFuseK * kFusePitch]);
  const int thread = static_cast<int>(threadIdx.x);
  int found = 0, end = table.n;  // the last job whose blocks begin at this one or before
  while (end - found > 1) {
    const int middle = (found + end) / 2;
    (table.jobs[middle].first_block <= blockIdx.x ? found : end) = middle;
  }
  const FoldJob& job = table.jobs[found];
  const FusePart part(job, static_cast<int>(blockIdx.x - job.first_block));

  // One more than there are branches: the BatchNorm on the sum.
  for (int i = thread; i < kFuseK * (job.n_branches + 1); i += kFuseThreads) {
    const int row = i % kFuseK, b = i / kFuseK;
    const int64_t k = part.channel(job, row);
    if (k < 0) continue;
    if (b < job.n_branches) {
      channels->scales[b][row] = fold_affine(table.branches[job.first_branch + b].bn, k).scale;
    } else {
      channels->post[row] = fold_affine(job.post_bn, k);
    }
  }
  __syncthreads();  // what belongs to the channels is complete

  if (part.step == 0 && thread < kFuseK) {
    const int64_t k = part.channel(job, thread);
    double bias = 0.0;
    for (int b = 0; k >= 0 && b < job.n_branches; ++b) {
      const FoldBranch& branch = table.branches[job.first_branch + b];
      bias += fold_bias(branch, fold_affine(branch.bn, k), k);
    }
    const FoldAffine& post = channels->post[thread];
    if (k >= 0) store_double(job.bias, job.bias_dtype, k, bias * post.scale + post.shift);
  }
  if (job.vectors) {
    fuse_weights_taps<kFuseVector>(table, job, part, *channels, staged);
  } else {
    fuse_weights_taps<1>(table, job, part, *channels, staged);
  }
  if (job.packed == nullptr) return;

  __syncthreads();  // the taps are staged
  if (job.weight_dtype == DType::kFloat32) {
    fuse_weights_pack<4>(job, part, staged);
  } else {
    fuse_weights_pack<2>(job, part, staged);
  }
  if (blockIdx.x == job.first_block) {
    char* const slack = job.packed + job.layout.bytes() - job.layout.slack();
    for (int64_t i = thread * 16; i < job.layout.slack(); i += kFuseThreads * 16) {
      store_global_16(slack + i, 0, 0, 0, 0);
    }
  }
}

}  // namespace repvgg::cuda
