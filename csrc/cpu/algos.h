// SPDX-License-Identifier: MIT
#pragma once

#include "core/conv_algo.h"

namespace repvgg::cpu {

// In order of preference. F.conv2d ("aten") comes after the last row: it belongs to ops/.
AlgoTable algos();

// The instruction set whose kernels run here: the most capable that this CPU has, or at most REPVGG_CUDA_CPU_ISA.
const char* target_name();

// Name i of the instruction sets this CPU has, from the least capable; nullptr past the last.
const char* supported_target(int i);

// Does `rounds` rounds of multiply-adds in registers and nothing else, in one thread. Returns their operations.
double multiply_adds(int64_t rounds);

}  // namespace repvgg::cpu
