// SPDX-License-Identifier: MIT
// One row is one algorithm. Selection, tests, benchmarks, the CLI and the `algorithm=` argument all read the tables.
#pragma once

#include <cstddef>
#include <cstring>

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
  void* stream;  // cudaStream_t; unused on a CPU
};

struct ConvAlgo {
  const char* name;
  // Why this row cannot run the problem.
  Refusal (*refuse)(const ConvProblem&, const Device&);
  // Whether "auto" should take this row where it can run. Rows are asked in order of preference.
  bool (*prefer)(const ConvProblem&);
  // Throws std::runtime_error if the launch fails.
  void (*launch)(const ConvProblem&, const ConvArgs&);
};

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
