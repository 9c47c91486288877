// SPDX-License-Identifier: MIT
// One row is one algorithm. Selection, tests, benchmarks, the CLI and the `algorithm=` argument all read the tables.
#pragma once

#include <cstring>
#include <functional>

#include "core/conv_problem.h"

namespace repvgg {

using Refusal = const char*;  // nullptr: accepted; else the user reads this

// Where the problem would run. On a machine without the device `present` is false: only what the problem itself says
// can then be judged.
struct Device {
  bool present;
  int index;
};

struct ConvArgs {
  const void* x;
  const void* weight;  // OIHW
  const void* bias;    // [K] or nullptr; the dtype of x
  void* y;
  void* workspace;  // as many bytes as the row asked for, uninitialised
  void* stream;     // cudaStream_t; unused on a CPU
  int threads;      // CPU threads to use; unused on a GPU
  // Calls f(0) ... f(n - 1), each once, on up to `threads` CPU threads, and waits for them.
  std::function<void(int64_t n, const std::function<void(int64_t)>& f)> parallel_for;
};

struct ConvAlgo {
  const char* name;
  // Why this row cannot run the problem.
  Refusal (*refuse)(const ConvProblem&, const Device&);
  // Whether "auto" should take this row where it can run. Rows are asked in order of preference.
  bool (*prefer)(const ConvProblem&);
  // Bytes of workspace that launch needs with so many threads.
  int64_t (*workspace)(const ConvProblem&, int threads);
  // Throws std::runtime_error if the launch fails.
  void (*launch)(const ConvProblem&, const ConvArgs&);
};

inline int64_t no_workspace(const ConvProblem&, int) { return 0; }

struct AlgoTable {
  const ConvAlgo* const* rows;
  int size;

  const ConvAlgo* find(const char* name) const {
    for (int i = 0; i < size; ++i) {
      if (std::strcmp(rows[i]->name, name) == 0) return rows[i];
    }
    return nullptr;
  }

  // What "auto" runs; nullptr: no row, the caller takes its last resort.
  const ConvAlgo* select(const ConvProblem& prob, const Device& device) const {
    for (int i = 0; i < size; ++i) {
      if (rows[i]->prefer(prob) && rows[i]->refuse(prob, device) == nullptr) return rows[i];
    }
    return nullptr;
  }
};

}  // namespace repvgg
