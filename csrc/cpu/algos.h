// SPDX-License-Identifier: MIT
#pragma once

#include "core/conv_algo.h"

namespace repvgg::cpu {

// In order of preference. F.conv2d ("aten") comes after the last row: it belongs to ops/.
AlgoTable algos();

}  // namespace repvgg::cpu
