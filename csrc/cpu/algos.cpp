// SPDX-License-Identifier: MIT
// The CPU table: the rows in order of preference.
#include "cpu/algos.h"

namespace repvgg::cpu {

extern const ConvAlgo kConv3x3Direct;

AlgoTable algos() {
  static const ConvAlgo* const rows[] = {&kConv3x3Direct};
  return {rows, static_cast<int>(sizeof rows / sizeof *rows)};
}

}  // namespace repvgg::cpu
