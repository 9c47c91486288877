// SPDX-License-Identifier: MIT
// Blocks into tables, tables into launches: one for as many blocks as a kernel's parameters hold.
#include <algorithm>
#include <memory>

#include "cuda/algos.h"
#include "cuda/fuse_weights.cuh"

namespace repvgg::cuda {
namespace {

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool takes_vectors(const FoldProblem& prob) {
  bool vectors = prob.C % kFuseVector == 0 && is_aligned(prob.weight);
  for (int i = 0; i < prob.n_branches; ++i) {
    if (prob.branches[i].kind == FoldKind::kConv3x3) vectors = vectors && is_aligned(prob.branches[i].kernel.data);
  }
  return vectors;
}

FoldJob make_job(const FoldProblem& prob, int32_t first_branch, unsigned first_block) {
  // Without packed weights groups mean nothing: all output channels fill fragments one after another.
  const int32_t groups = prob.packed == nullptr ? 1 : prob.groups;
  const int chunk_C = prob.packed != nullptr && prob.weight_dtype == DType::kFloat32 ? kChunkBytes / 4 : kFuseC;
  FoldJob job{};
  job.C = prob.C;
  job.weight = prob.weight;
  job.bias = prob.bias;
  job.packed = static_cast<char*>(prob.packed);
  job.post_bn = prob.post_bn;
  job.group_K = static_cast<int32_t>(prob.K / groups);
  job.layout = PackedLayout(groups, prob.C, job.group_K, chunk_C);
  job.weight_dtype = prob.weight_dtype;
  job.bias_dtype = prob.bias_dtype;
  job.first_branch = first_branch;
  job.n_branches = prob.n_branches;
  job.first_block = first_block;
  job.vectors = takes_vectors(prob);
  return job;
}

// Appends the problem to the table; false if it does not fit any more.
template <class Table>
bool append(const FoldProblem& prob, Table* table, unsigned* blocks, int32_t* branches) {
  constexpr auto kBranches = static_cast<int32_t>(sizeof table->branches / sizeof *table->branches);
  constexpr int64_t kMaxGrid = 0x7FFFFFFF;
  const FoldJob job = make_job(prob, *branches, *blocks);
  const int64_t more = int64_t{job.layout.groups} * job.layout.tiles * job.steps();
  if (table->n == Table::kMaxJobs || *branches + prob.n_branches > kBranches || *blocks + more > kMaxGrid) return false;
  table->jobs[table->n++] = job;
  for (int i = 0; i < prob.n_branches; ++i) table->branches[(*branches)++] = prob.branches[i];
  *blocks += static_cast<unsigned>(more);
  return true;
}

// Launches the first problems, as many as fit, and returns how many.
template <class Table>
int launch_first(const FoldProblem* problems, int n, void* stream) {
  const auto table = std::make_unique<Table>();
  unsigned blocks = 0;
  int32_t branches = 0;
  int count = 0;
  while (count < n && append(problems[count], table.get(), &blocks, &branches)) ++count;
  if (count == 0) throw std::runtime_error("fuse_weights: a block has more weights than a grid has blocks for");
  launch_kernel("fuse_weights", fuse_weights_kernel<Table>, {blocks, kFuseThreads}, stream, *table);
  return count;
}

}  // namespace

void fuse_weights(const FoldProblem* problems, int n, void* stream) {
  constexpr int64_t kMostChannels = 1 << 30;  // a PackedLayout counts in int
  for (int i = 0; i < n; ++i) {
    if (std::max(problems[i].K, problems[i].C) > kMostChannels) {
      throw std::runtime_error("fuse_weights: a block has more than 2^30 channels; fold it on the CPU");
    }
  }
  for (int done = 0; done < n;) {
    done += n - done == 1 ? launch_first<FoldTableOne>(problems + done, 1, stream)
                          : launch_first<FoldTableMany>(problems + done, n - done, stream);
  }
}

}  // namespace repvgg::cuda
