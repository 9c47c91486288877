// SPDX-License-Identifier: MIT
// The CUDA table: the rows in order of preference.
#include "cuda/algos.h"

namespace repvgg::cuda {

extern const ConvAlgo kConv3x3Direct;

AlgoTable algos() {
  static const ConvAlgo* const rows[] = {&kConv3x3Direct};
  return {rows, static_cast<int>(sizeof rows / sizeof *rows)};
}

}  // namespace repvgg::cuda
