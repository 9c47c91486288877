// SPDX-License-Identifier: MIT
// A row of the table that runs on the inner layout: what the chain asks of it, and how it runs alone.
#pragma once

#include "core/conv_algo.h"
#include "cpu/blocked.h"
#include "cpu/target.h"

namespace repvgg::cpu {

struct BlockedLayer {
  ConvProblem prob;    // N: the images of this pass
  Blocked x, y;        // x is unused where the row reads_dense
  const float* dense;  // x for the row that reads_dense, in dense_layout
  Layout dense_layout;
  const float* packed;
  const float* bias;
  float* scratch;
  int threads;
  const ParallelFor* parallel_for;

  Epilogue epilogue() const { return {bias, prob.activation}; }

  // Calls f(thread) for every thread.
  template <class F>
  void each_thread(const F& f) const {
    if (threads == 1) return f(int64_t{0});
    (*parallel_for)(threads, f);
  }
};

struct BlockedRow {
  const ConvAlgo* algo;
  bool reads_dense;
  int64_t (*scratch)(const ConvProblem&, int threads);  // floats
  void (*run)(const BlockedLayer&);
};

// nullptr: the row does not run on the inner layout.
const BlockedRow* find_blocked_row(const ConvAlgo* algo);

// ConvAlgo's workspace and launch: a chain of one layer.
int64_t blocked_workspace(const ConvAlgo& algo, const ConvProblem& prob, int threads);
void blocked_launch(const ConvAlgo& algo, const ConvProblem& prob, const ConvArgs& args);

// What every row of the inner layout refuses.
Refusal refuse_blocked(const ConvProblem& prob);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }
// Part i of n equal parts of [0, size) starts here.
inline int64_t part(int64_t size, int64_t i, int64_t n) { return size * i / n; }

// Channel blocks and panels of one group.
struct GroupBlocks {
  int64_t c_blocks, k_blocks, panels;
  int vectors;

  explicit GroupBlocks(const ConvProblem& prob)
      : c_blocks(ceil_div(prob.group_C(), target().lanes)),
        k_blocks(ceil_div(prob.group_K(), target().lanes)),
        panels(ceil_div(k_blocks, panel_vectors(k_blocks))),
        vectors(panel_vectors(k_blocks)) {}

  int64_t width() const { return int64_t{vectors} * target().lanes; }  // channels per panel
  int64_t channels() const { return c_blocks * target().lanes; }       // C rounded up
  int64_t weights() const { return panels * width() * channels(); }    // per tap or point
};

}  // namespace repvgg::cpu
