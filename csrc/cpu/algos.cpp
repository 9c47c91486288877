// SPDX-License-Identifier: MIT
// The CPU table.
#include "cpu/algos.h"

#include "cpu/cost.h"

namespace repvgg::cpu {

extern const ConvAlgo kPlanarAlgo, kStemAlgo, kWinograd4Algo, kWinograd2Algo, kPolyphaseAlgo, kDirectAlgo,
    kWinograd6Algo;

AlgoTable algos() {
  static const ConvAlgo* const rows[] = {&kPlanarAlgo,    &kStemAlgo,   &kWinograd4Algo, &kWinograd2Algo,
                                         &kPolyphaseAlgo, &kDirectAlgo, &kWinograd6Algo};
  return {rows, static_cast<int>(sizeof rows / sizeof *rows), aten_cost};
}

}  // namespace repvgg::cpu
