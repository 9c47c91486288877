# SPDX-License-Identifier: MIT
"""How many blocks of a kernel a multiprocessor holds (CUDA C++ Programming Guide, "Compute Capabilities", tables of
technical specifications)."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
REGISTERS = 64 * KIB  # of a multiprocessor, of every architecture here
WARP = 32


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor; bytes of shared memory."""

    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    reserved_per_block: int = KIB
    shared_unit: int = 128


LIMITS = {
    75: Limits(32, 16, 64 * KIB, 64 * KIB, reserved_per_block=0, shared_unit=256),
    80: Limits(64, 32, 164 * KIB, 163 * KIB),
    86: Limits(48, 16, 100 * KIB, 99 * KIB),
    87: Limits(48, 16, 164 * KIB, 163 * KIB),
    89: Limits(48, 24, 100 * KIB, 99 * KIB),
    90: Limits(64, 32, 228 * KIB, 227 * KIB),
    100: Limits(64, 32, 228 * KIB, 227 * KIB),
    103: Limits(64, 32, 228 * KIB, 227 * KIB),
    120: Limits(48, 24, 100 * KIB, 99 * KIB),
    121: Limits(48, 24, 100 * KIB, 99 * KIB),
}


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_per_sm(arch: int, registers: int, threads: int, shared: int) -> int:
    """`registers` of a thread, `shared` bytes of a block, static and dynamic; 0 where the block does not fit."""
    limits = LIMITS[arch]
    warps = -(-threads // WARP)
    # Registers are given to warps in units of 256; the four schedulers of a multiprocessor own a quarter each.
    warps_by_registers = REGISTERS // 4 // _round_up(max(registers, 1) * WARP, 256) * 4
    blocks = min(limits.blocks, limits.warps // warps, warps_by_registers // warps)
    if shared > limits.shared_per_block:
        return 0
    used = _round_up(shared + limits.reserved_per_block, limits.shared_unit)
    return min(blocks, limits.shared // used) if used else blocks
