// SPDX-License-Identifier: MIT
// Blocks into tables, tables into launches: one for as many blocks as a kernel's parameters hold.
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

// Appends the problem to the table; false if it does not fit any more.
template <class Table>
bool append(const FoldProblem& prob, Table* table, unsigned* blocks, int32_t* branches) {
  constexpr auto kBranches = static_cast<int32_t>(sizeof table->branches / sizeof *table->branches);
  constexpr int64_t kMaxGrid = 0x7FFFFFFF;
  if (table->n == Table::kMaxJobs || *branches + prob.n_branches > kBranches || *blocks + prob.K > kMaxGrid)
    return false;
  table->jobs[table->n++] = {
      prob.K,          prob.C,    prob.weight,     prob.bias, prob.post_bn,       prob.weight_dtype,
      prob.bias_dtype, *branches, prob.n_branches, *blocks,   takes_vectors(prob)};
  for (int i = 0; i < prob.n_branches; ++i) table->branches[(*branches)++] = prob.branches[i];
  *blocks += static_cast<unsigned>(prob.K);
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
  if (count == 0) throw std::runtime_error("fuse_weights: a block has more output channels than a grid has blocks");
  launch_kernel("fuse_weights", fuse_weights_kernel<Table>, {blocks, kFuseThreads}, stream, *table);
  return count;
}

}  // namespace

void fuse_weights(const FoldProblem* problems, int n, void* stream) {
  for (int done = 0; done < n;) {
    done += n - done == 1 ? launch_first<FoldTableOne>(problems + done, 1, stream)
                          : launch_first<FoldTableMany>(problems + done, n - done, stream);
  }
}

}  // namespace repvgg::cuda
