// SPDX-License-Identifier: MIT
// Consecutive layers in one call: between them activations stay in the inner layout (cpu/blocked.h).
#pragma once

#include <cstdint>

#include "core/conv_algo.h"

namespace repvgg::cpu {

struct ChainLayer {
  ConvProblem prob;  // prob.layout is not read
  const ConvAlgo* algo;
  const void* packed;  // what algo->pack wrote
  const float* bias;   // [K] or nullptr
};

// How many of the `n` layers, from the first on, can run as one chain: 0 if the first runs on a row that is not one of
// the inner layout. Row "stem" reads the dense input: it only begins a chain.
int chain_length(const ChainLayer* layers, int n);

// Bytes of workspace that run_chain needs.
int64_t chain_workspace(const ChainLayer* layers, int n, int threads);

struct ChainArgs {
  const float* x;  // of layers[0], in x_layout, dense
  float* y;        // of layers[n - 1], in y_layout, dense
  Layout x_layout, y_layout;
  void* workspace;  // uninitialised
  int threads;
  ParallelFor parallel_for;
};

// Runs layers [0, n), all of which chain_length accepted. The same bits come out as layer by layer.
void run_chain(const ChainLayer* layers, int n, const ChainArgs& args);

}  // namespace repvgg::cpu
