// SPDX-License-Identifier: MIT
// The CPU table. It has no rows yet: on a CPU "auto" runs F.conv2d.
#include "cpu/algos.h"

namespace repvgg::cpu {

AlgoTable algos() { return {nullptr, 0}; }

}  // namespace repvgg::cpu
