# SPDX-License-Identifier: MIT
"""GPUs as data: what a multiprocessor holds, what a few GPUs can do at most, and how a kernel's launch fills them.

So ``explain`` and the performance model can speak of a GPU that is not at hand. Limits are those of the CUDA C++
Programming Guide, "Technical Specifications per Compute Capability"; peaks are the vendor's, of its data sheets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from repvgg_cuda.branches import require

REGISTERS_PER_SM = 65536
THREADS_PER_BLOCK = 1024


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor of some compute capability holds. ``reserved_bytes``: of shared memory, for each block."""

    blocks: int
    threads: int
    shared_bytes: int
    shared_bytes_per_block: int
    fp32_lanes: int
    reserved_bytes: int = 1024


#: By compute capability, 80 for 8.0.
LIMITS: Mapping[int, Limits] = {
    75: Limits(16, 1024, 64 << 10, 64 << 10, 64, reserved_bytes=0),
    80: Limits(32, 2048, 164 << 10, 163 << 10, 64),
    86: Limits(16, 1536, 100 << 10, 99 << 10, 128),
    87: Limits(16, 1536, 164 << 10, 163 << 10, 128),
    89: Limits(24, 1536, 100 << 10, 99 << 10, 128),
    90: Limits(32, 2048, 228 << 10, 227 << 10, 128),
    100: Limits(32, 2048, 228 << 10, 227 << 10, 128),
    120: Limits(24, 1536, 100 << 10, 99 << 10, 128),
}


def limits(capability: int) -> Limits:
    """Those of ``capability``, or of the newest one before it: a later GPU has not held less so far."""
    known = [each for each in LIMITS if each <= capability]
    require(
        len(known) > 0, f"compute capability must be at least 7.5, got {capability // 10}.{capability % 10}: too old"
    )
    return LIMITS[max(known)]


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        clock_ghz: boost, at which the peaks hold.
        fp32, tf32, fp16: dense TFLOP/s; tf32 and fp16 on tensor cores with float32 sums, 0 where there are none.
        gb_per_s: of its memory. l2_bytes: of its last cache.
        l2_bytes_per_clock: what a multiprocessor can read of it when all do.
        mma_share: how much of the tensor peak the instruction ``mma.sync`` reaches.
    """

    name: str
    capability: int
    multiprocessors: int
    clock_ghz: float
    fp32: float
    tf32: float
    fp16: float
    gb_per_s: float
    l2_bytes: int
    l2_bytes_per_clock: float
    mma_share: float = 1.0

    @property
    def limits(self) -> Limits:
        return limits(self.capability)

    @property
    def bf16(self) -> float:
        """As fast as float16, from compute capability 8.0 on."""
        return self.fp16 if self.capability >= 80 else 0.0


#: l2_bytes_per_clock and mma_share are not the vendor's: reads of L2 as microbenchmarks found them (A100 about 47 at
#: best, 40 in a kernel; the others in proportion), and mma.sync on Hopper at 62 to 63 % of wgmma (arXiv:2402.13499).
GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("T4", 75, 40, 1.59, 8.1, 0.0, 65.0, 320.0, 4 << 20, 32.0),
        Gpu("A100", 80, 108, 1.41, 19.5, 156.0, 312.0, 1555.0, 40 << 20, 40.0),  # 40 GB
        Gpu("L4", 89, 58, 2.04, 30.3, 60.5, 121.0, 300.0, 48 << 20, 32.0),
        Gpu("4090", 89, 128, 2.52, 82.6, 82.6, 165.2, 1008.0, 72 << 20, 24.0),
        Gpu("H100", 90, 132, 1.83, 66.9, 494.7, 989.4, 3350.0, 50 << 20, 28.0, mma_share=0.63),  # SXM
        Gpu("H200", 90, 132, 1.83, 66.9, 494.7, 989.4, 4800.0, 50 << 20, 28.0, mma_share=0.63),
    )
}


def gpu_named(name: str) -> Gpu:
    """One of :data:`GPUS`. Raises RuntimeError with their names for any other."""
    found = GPUS.get(name.upper())
    if found is None:
        raise RuntimeError(f"gpu must be one of {', '.join(GPUS)}, got '{name}'")
    return found


def known_gpu(device_name: str, multiprocessors: int) -> Gpu | None:
    """The one of :data:`GPUS` that a driver calls ``device_name`` ("NVIDIA H100 80GB HBM3"); None for others.

    Parts of other sizes go by the same name (an H100 PCIe, a slice of an A100): their multiprocessors differ.
    """
    words = device_name.upper().replace("-", " ").split()
    found = next((gpu for name, gpu in GPUS.items() if name in words), None)
    return found if found is not None and found.multiprocessors == multiprocessors else None


@dataclass(frozen=True)
class LaunchPlan:
    """How an algorithm launches: ``repvgg::LaunchPlan`` of csrc/core/conv_algo.h, where the fields are explained."""

    blocks: int
    threads: int
    shared_bytes: int
    tile_k: int
    tile_p: int
    tile_q: int
    images: int
    split: int
    blocks_per_sm: int
    converts: int = 0  # tensors that are converted between NCHW and channels_last around the launch

    def resident(self, capability: int) -> int:
        """How many of its blocks a multiprocessor holds at a time: threads, shared memory and registers allow it."""
        at_most = limits(capability)
        shared = self.shared_bytes + at_most.reserved_bytes
        return min(
            at_most.blocks,
            at_most.threads // self.threads,
            at_most.shared_bytes // shared if shared else at_most.blocks,
            self.blocks_per_sm,
        )

    def waves(self, capability: int, multiprocessors: int) -> int:
        """How many times the GPU is filled with blocks; the last time maybe in part."""
        return math.ceil(self.blocks / (multiprocessors * self.resident(capability)))

    def __str__(self) -> str:
        """``1568 blocks of 128 threads, tile 16x8x32`` (channels, rows, columns)"""
        text = f"{self.blocks} blocks of {self.threads} threads, tile {self.tile_k}x{self.tile_p}x{self.tile_q}"
        text += f" over {self.images} images" if self.images > 1 else ""
        text += f", {self.split} blocks per sum" if self.split > 1 else ""
        return text + {0: "", 1: ", y converted from channels_last"}.get(
            self.converts, ", x converted to channels_last, y from it"
        )
