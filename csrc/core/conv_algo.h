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
  int threads;  // CPU threads to use; unused on a GPU
  // Of a GPU: compute capability, 80 for 8.0, and number of multiprocessors. 0: unknown, or no GPU.
  int capability = 0, multiprocessors = 0;
};

// How a row would launch on a GPU: what `explain`, the performance model and the tests read.
struct LaunchPlan {
  int64_t blocks;
  int threads, shared_bytes;   // of a block
  int tile_k, tile_p, tile_q;  // outputs that a block computes: channels, rows, columns
  int images;                  // images that share a tile's row
  int split;                   // blocks that share the sum over the input channels
  int blocks_per_sm = 1;       // that the kernel is compiled to have registers for on a multiprocessor, at least
};

// Calls f(0) ... f(n - 1), each once, on up to as many CPU threads as there are, and waits for them.
using ParallelFor = std::function<void(int64_t n, const std::function<void(int64_t)>& f)>;

struct ConvArgs {
  const void* x;
  const void* weight;  // OIHW
  const void* packed;  // what the row's pack wrote; nullptr where packed_bytes is 0
  const void* bias;    // [K] or nullptr
  DType bias_dtype;    // that of x, or float32 where x has 16 bits
  void* y;
  void* workspace;  // as many bytes as the row asked for, uninitialised
  void* stream;     // cudaStream_t; unused on a CPU
  Device device;    // the one that the workspace was measured for
  ParallelFor parallel_for;
  bool just_packed = false;  // `packed` is written by the launch before this one
};

struct PackArgs {
  const void* weight;  // OIHW, in the device's memory
  void* packed;        // as many bytes as the row asked for, in the device's memory, at a multiple of 64
  void* stream;        // cudaStream_t; unused on a CPU
  ParallelFor parallel_for;
};

// How launch reads x and writes y: in the layout of the problem, whichever that is; or channels_last, whatever the
// problem says, so that the caller converts; or from the problem's layout to channels_last.
enum class RowLayout { kAsProblem, kNHWC, kToNHWC };

struct ConvAlgo {
  const char* name;
  // Why this row cannot run the problem.
  Refusal (*refuse)(const ConvProblem&, const Device&);
  // The predicted time in seconds; "auto" takes the row that is fastest. `packed`: the weights are packed already.
  double (*cost)(const ConvProblem&, const Device&, bool packed);
  // The size of the weights in this row's own order, 0 where it reads them as they are. The same for every N, H, W.
  int64_t (*packed_bytes)(const ConvProblem&);
  void (*pack)(const ConvProblem&, const PackArgs&);
  // Bytes of workspace that launch needs on this device.
  int64_t (*workspace)(const ConvProblem&, const Device&);
  // Throws std::runtime_error if the launch fails.
  void (*launch)(const ConvProblem&, const ConvArgs&);
  // How launch would do it; nullptr on a CPU.
  LaunchPlan (*plan)(const ConvProblem&, const Device&) = nullptr;
  RowLayout layout = RowLayout::kAsProblem;
  // On a GPU: fuse_weights can write what `pack` would make of the folded weight.
  bool folds_packed = false;
};

inline int64_t no_bytes(const ConvProblem&) { return 0; }
inline void no_pack(const ConvProblem&, const PackArgs&) {}
inline int64_t no_workspace(const ConvProblem&, const Device&) { return 0; }

struct AlgoTable {
  const ConvAlgo* const* rows;
  int size;
  // The predicted time of F.conv2d, the caller's last resort.
  double (*aten_cost)(const ConvProblem&, const Device&);

  const ConvAlgo* find(const char* name) const {
    for (int i = 0; i < size; ++i) {
      if (std::strcmp(rows[i]->name, name) == 0) return rows[i];
    }
    return nullptr;
  }

  // What "auto" runs; nullptr: no row, the caller takes its last resort. `packed`: weights will be packed once, so that
  // packing costs nothing; rows whose packed weights take more than `max_packed_bytes` are passed over.
  const ConvAlgo* select(const ConvProblem& prob, const Device& device, bool packed, int64_t max_packed_bytes) const {
    const ConvAlgo* best = nullptr;
    double least = size > 0 ? aten_cost(prob, device) : 0;
    for (int i = 0; i < size; ++i) {
      if (rows[i]->refuse(prob, device) != nullptr || rows[i]->packed_bytes(prob) > max_packed_bytes) continue;
      const double cost = rows[i]->cost(prob, device, packed);
      if (cost < least) {
        least = cost;
        best = rows[i];
      }
    }
    return best;
  }
};

}  // namespace repvgg
