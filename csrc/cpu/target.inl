// SPDX-License-Identifier: MIT
// One instruction set's table of kernels. Included by target_*.cpp inside the namespace of that set, after
// RVG_VECTOR_BYTES, RVG_VECTOR_REGISTERS and RVG_BLOCK_VECTORS were defined.
// The order matters: vectors before what is written over them.
// clang-format off
#include "cpu/simd.inl"
#include "cpu/layout.inl"
#include "cpu/gemm.inl"
#include "cpu/winograd.inl"
#include "cpu/direct.inl"
#include "cpu/planar.inl"
#include "cpu/peak.inl"
// clang-format on

constexpr Target make_target(const char* name, bool (*supported)()) {
  return {name,
          supported,
          kLanes,
          kRegisters,
          kBlockVectors * kLanes,
          planar,
          gemm,
          {winograd_kernels<kPoints2, 1>(), winograd_kernels<kPoints4, 1>(), winograd_kernels<kPoints6, 1>(),
           winograd_kernels<kPoints4, 2>()},
          direct,
          stem,
          to_inner,
          from_inner,
          multiply_adds};
}
