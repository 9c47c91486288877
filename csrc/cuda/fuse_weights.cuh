// SPDX-License-Identifier: MIT
// Folds many blocks with one launch. The table of blocks is a parameter of the kernel, by value: nothing has to be
// copied to the device first, kept alive or waited for, and a captured graph holds its own copy.
//
// A thread block owns one output channel of one block: kernel [C, 3, 3], that is C * 9 taps which lie in a row, and the
// bias. Everything is summed in double, in the order of the branches, and rounded once.
#pragma once

#include "core/fold.h"
#include "cuda/device.cuh"

namespace repvgg::cuda {

constexpr int kFuseThreads = 128;
constexpr int kFuseBlocksPerSM = 8;  // 64 registers a thread
constexpr int kFuseVector = 4;       // taps that a thread sums at a time, where all rows begin at a multiple of it
static_assert(kFuseThreads > kMaxBranches, "one thread per branch, and one for the BatchNorm on the sum");

// A FoldProblem whose branches are [first_branch, first_branch + n_branches) of the table.
struct FoldJob {
  int64_t K, C;
  void *weight, *bias;
  FoldBatchNorm post_bn;
  DType weight_dtype, bias_dtype;
  int32_t first_branch, n_branches;
  unsigned first_block;  // thread blocks [first_block, first_block + K) are this job's
  bool vectors;          // C, and where the tensors lie, are multiples of kFuseVector
};

template <int kJobs, int kBranches>
struct FoldTable {
  static constexpr int kMaxJobs = kJobs;
  static_assert(kBranches >= kMaxBranches, "any block fits");
  int32_t n;
  FoldJob jobs[kJobs];
  FoldBranch branches[kBranches];
};
// A block alone is launched with few parameters; the family's models fit one launch with many.
using FoldTableOne = FoldTable<1, kMaxBranches>;
using FoldTableMany = FoldTable<kMaxParameterBytes / 512, kMaxParameterBytes / 160>;
static_assert(sizeof(FoldTableOne) <= 4096 && sizeof(FoldTableMany) <= kMaxParameterBytes, "fit a kernel's parameters");

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

template <int kVector>
__device__ __forceinline__ void fuse_weights_store(void* to, DType dtype, int64_t i, const double (&values)[kVector]) {
  if constexpr (kVector == kFuseVector) {
    uint32_t bits[4];
    switch (dtype) {
      case DType::kFloat64:
        for (int half = 0; half < 2; ++half) {
          memcpy(bits, &values[2 * half], sizeof bits);
          store_global_16(static_cast<double*>(to) + i + 2 * half, bits[0], bits[1], bits[2], bits[3]);
        }
        return;
      case DType::kFloat32:
        for (int e = 0; e < 4; ++e) bits[e] = float_bits(static_cast<float>(values[e]));
        store_global_16(static_cast<float*>(to) + i, bits[0], bits[1], bits[2], bits[3]);
        return;
      default: {
        const auto encode = [dtype](double value) -> uint32_t {
          return dtype == DType::kFloat16 ? Float16::encode(value) : BFloat16::encode(value);
        };
        store_global_8(static_cast<uint16_t*>(to) + i, encode(values[0]) | encode(values[1]) << 16,
                       encode(values[2]) | encode(values[3]) << 16);
      }
    }
  } else {
    store_double(to, dtype, i, values[0]);
  }
}

// Taps [i, i + kVector) of the row of output channel k. scales: of the branches.
template <int kVector, class Table>
__device__ __forceinline__ void fuse_weights_taps(const Table& table, const FoldJob& job, const double* scales,
                                                  double post_scale, int64_t k, int64_t i) {
  constexpr int kCentre = 4;
  // The centre tap among these, if any, belongs to this input channel.
  const int64_t c = (i + 8 - kCentre) / 9;
  const int64_t centre = c * 9 + kCentre - i;
  double sums[kVector] = {};
  for (int b = 0; b < job.n_branches; ++b) {
    const FoldBranch& branch = table.branches[job.first_branch + b];
    if (branch.kind == FoldKind::kConv3x3) {
      double values[kVector];
      fuse_weights_load<kVector>(branch.kernel, k * job.C * 9 + i, values);
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums[e] += values[e] * scales[b];
    } else if (centre < kVector) {
      double value = 0.0;
      if (branch.kind == FoldKind::kConv1x1) value = branch.kernel.at(k * job.C + c) * scales[b];
      if (branch.kind == FoldKind::kIdentity && c == fold_identity_channel(k, job.C)) value = scales[b];
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums[e] += e == centre ? value : 0.0;
    }
  }
#pragma unroll
  for (int e = 0; e < kVector; ++e) sums[e] *= post_scale;
  fuse_weights_store<kVector>(job.weight, job.weight_dtype, k * job.C * 9 + i, sums);
}

template <class Table>
__global__ void __launch_bounds__(kFuseThreads, kFuseBlocksPerSM)
    fuse_weights_kernel(const __grid_constant__ Table table) {
  RVG_SHARED(double, scales, [kMaxBranches]);
  RVG_SHARED(double, biases, [kMaxBranches]);
  RVG_SHARED(FoldAffine, post, [1]);
  const int thread = static_cast<int>(threadIdx.x);
  int found = 0, end = table.n;  // the last job whose blocks begin at this one or before
  while (end - found > 1) {
    const int middle = (found + end) / 2;
    (table.jobs[middle].first_block <= blockIdx.x ? found : end) = middle;
  }
  const FoldJob& job = table.jobs[found];
  const int64_t k = blockIdx.x - job.first_block;

  if (thread < job.n_branches) {
    const FoldBranch& branch = table.branches[job.first_branch + thread];
    const FoldAffine affine = fold_affine(branch.bn, k);
    scales[thread] = affine.scale;
    biases[thread] = fold_bias(branch, affine, k);
  }
  if (thread == kMaxBranches) post[0] = fold_affine(job.post_bn, k);
  __syncthreads();  // what belongs to the channel is complete

  if (thread == 0) {
    double bias = 0.0;
    for (int b = 0; b < job.n_branches; ++b) bias += biases[b];
    store_double(job.bias, job.bias_dtype, k, bias * post[0].scale + post[0].shift);
  }
  if (job.vectors) {
    for (int64_t i = thread * kFuseVector; i < job.C * 9; i += kFuseThreads * kFuseVector) {
      fuse_weights_taps<kFuseVector>(table, job, scales, post[0].scale, k, i);
    }
  } else {
    for (int64_t i = thread; i < job.C * 9; i += kFuseThreads) {
      fuse_weights_taps<1>(table, job, scales, post[0].scale, k, i);
    }
  }
}

}  // namespace repvgg::cuda
