# SPDX-License-Identifier: MIT
"""A closed-form model of how long a 3x3 layer takes on a GPU: ours, and what it is compared with. Nothing is measured.

What the compiled table says (row, tile, blocks, threads, shared memory) is asked of the compiled table. The rest is
arithmetic: a multiprocessor works off its share of the blocks at the speed of its slowest pipe, and a launch has a
latency. All kernels, ours and the rivals', are given a main loop without a gap, the best tile, and boost clocks: so
ratios mean more than times. ``make gpu-check`` puts measurements beside these numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from repvgg_cuda import _ext
from repvgg_cuda.gpus import Gpu, LaunchPlan
from repvgg_cuda.models import create_model
from repvgg_cuda.modules import RepConv3x3
from repvgg_cuda.testing import Case

#: One kernel, launched from a CUDA graph. Reports lie between 0.6 and 2.5 us (github.com/ahrefs/ocannl issue 488: 0.58
#: us a node on a 5070 Ti). An assumption.
LAUNCH_US = 2.2

#: From the start of a kernel until its first products, and from its last until its end: two trips to memory of about
#: 600 cycles, and the barriers. Every further wave overlaps but for a part. Assumptions.
FILL_CYCLES, WAVE_CYCLES = 1500, 200

#: What a sum that is shared by several blocks adds to a kernel: the last one waits for a counter and reads the others'
#: parts. An assumption. Ours take a launch more for it, to clear the counters or to add the parts.
SPLIT_CYCLES = 600

#: How much faster than memory the last cache is for what one kernel leaves there for the next. An assumption; A100's
#: whitepaper says 2.3 times V100's bandwidth, near 4 TB/s.
L2_OVER_MEMORY = 2.5

#: Of a multiprocessor: 32 banks of 4 bytes (CUDA C++ Programming Guide, "Shared Memory").
SHARED_BYTES_PER_CLOCK = 128

#: A pixel fragment of the tensor-core rows serves the three vertical taps: 10 input rows make 24 products' rows with
#: stride 1, 17 do with stride 2.
TAP_REUSE = {1: 24 / 10, 2: 24 / 17}

#: cuDNN's kernels for Hopper use wgmma, and reach this share of the peak; others have their whole peak. An assumption
#: in their favour: cuBLAS was seen at 0.80 (798 of 989 TFLOP/s, bfloat16, 8192^3).
HOPPER_RIVAL_SHARE = 0.93

#: And two of their blocks form a cluster that fetches what both need once. An assumption in their favour.
HOPPER_CLUSTER = 2

#: Tiles of an implicit GEMM (pixels x channels), as CUTLASS and cuDNN name theirs, and how they split long sums.
GEMM_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (256, 64), (64, 64), (128, 32))
GEMM_SPLITS = (1, 2, 4, 8)
GEMM_CHUNK = 32  # of the sum, staged together
#: To which multiple a tap's channels are padded: the depth of one matrix instruction, or less where there are few.
GEMM_GRANULE, GEMM_FEW = 16, 4

#: Fewer products by Winograd's F(2x2, 3x3) in one kernel, which then reach 93 % of the peak (Yan et al., PPoPP 2020),
#: and by F(4x4, 3x3) in three, between which 36 values for every 16 pass through memory.
FUSED_WINOGRAD_GAIN, FUSED_WINOGRAD_SHARE = 2.25, 0.93
WINOGRAD_GAIN, WINOGRAD_GROWTH, WINOGRAD_KERNELS = 4.0, 36 / 16, 3


class Mode(NamedTuple):
    """In which precision factors are multiplied: the dtype of the tensors, and which of a GPU's peaks counts."""

    name: str
    dtype: torch.dtype

    @property
    def element_bytes(self) -> int:
        return self.dtype.itemsize

    def peak(self, gpu: Gpu) -> float:
        """TFLOP/s; 0 where the GPU cannot."""
        return float(getattr(gpu, self.name))


MODES = {
    mode.name: mode
    for mode in (
        Mode("fp32", torch.float32),
        Mode("tf32", torch.float32),
        Mode("fp16", torch.float16),
        Mode("bf16", torch.bfloat16),
    )
}


@dataclass(frozen=True)
class Rival:
    """The fastest way of cuDNN that the model knows: ``kernel`` says which, ``us`` with bias and ReLU in it."""

    kernel: str
    us: float


@dataclass(frozen=True)
class Own:
    """This library's fastest row for the layer.

    ``chosen``: "auto" takes it, else another row. ``estimate_us``: what "auto" goes by, the row's own cost; None where
    it only runs if named. ``bound``: which pipe the model says is the slowest.
    """

    algorithm: str
    chosen: bool
    plan: LaunchPlan
    resident: int
    waves: int
    us: float
    bound: str
    estimate_us: float | None


@dataclass(frozen=True)
class Prediction:
    """One layer on one GPU, in microseconds. ``own`` is None where every row refuses.

    ``flop_us`` and ``byte_us``: the least time for a direct convolution's products, and for moving input, weights and
    output once each. ``compiled_us`` and ``eager_us``: the rival with one and with two more kernels, which
    torch.compile and eager PyTorch launch for bias and ReLU. ``auto_us``: what "auto" takes, which is exact in float32.
    """

    gpu: Gpu
    case: Case
    mode: Mode
    flop_us: float
    byte_us: float
    own: Own | None
    fused: Rival
    compiled_us: float
    eager_us: float
    auto_us: float

    @property
    def ours_us(self) -> float:
        """Our row, or F.conv2d and a ReLU where each refuses."""
        return self.eager_us if self.own is None else self.own.us

    @property
    def floor_us(self) -> float:
        return max(self.flop_us, self.byte_us)


def predict(gpu: Gpu, case: Case, mode: Mode) -> Prediction | None:
    """None where the GPU cannot compute in this mode."""
    if mode.peak(gpu) == 0:
        return None
    fused = min(rivals(gpu, case, mode), key=lambda rival: rival.us)
    pointwise = _pointwise_us(gpu, case, mode)
    ours = own(gpu, case, mode)
    taken = own(gpu, case, MODES["fp32"]) if mode.name == "tf32" else ours
    return Prediction(
        gpu,
        case,
        mode,
        case.flops / mode.peak(gpu) / 1e6,
        _moved_bytes(case, mode) / gpu.gb_per_s / 1e3,
        ours,
        fused,
        fused.us + pointwise,
        fused.us + 2 * pointwise,
        taken.us if taken is not None and taken.chosen else fused.us + 2 * pointwise,
    )


@functools.cache
def network(name: str) -> tuple[Case, ...]:
    """The 3x3 layers of a network of the family at batch 1, in order, at the size that it is meant for."""
    with torch.device("meta"):
        model = create_model(name, deploy=True)
    size, layers = 320 if name.endswith("se") else 224, []
    for i, conv in enumerate(each for each in model.modules() if isinstance(each, RepConv3x3)):
        outputs, inputs = conv.weight.shape[:2]
        layers.append(Case(f"layer{i}", 1, inputs * conv.groups, size, size, outputs, conv.stride, conv.groups))
        size = (size - 1) // conv.stride + 1
    return tuple(layers)


def distinct(layers: tuple[Case, ...], batch: int) -> Iterator[tuple[Case, int]]:
    """The layers that differ, at this batch, each with how often it is there."""
    counts: dict[Case, int] = {}
    for layer in layers:
        case = replace(layer, name="layer", N=batch)
        counts[case] = counts.get(case, 0) + 1
    yield from counts.items()


# --------------------------------------------------------------------------------------------------------------- ours


def own(gpu: Gpu, case: Case, mode: Mode) -> Own | None:
    """The row that the table's own estimate says is the fastest of ours in this mode; weights are packed already."""
    if _ext.module is None:
        return None
    problem = (case.x_size, case.K, case.stride, case.groups, str(mode.dtype)[6:], True, "relu")
    rows = _ext.module.explain(True, False, "cuda", -1, gpu.capability, gpu.multiprocessors, *problem)
    ours = [row for row in rows if row[1] is None and row[0] != "aten" and ("tf32" in row[0]) == (mode.name == "tf32")]
    if not ours:
        return None
    algorithm, _, seconds, _, chosen = min(ours, key=lambda row: row[2])
    plan = LaunchPlan(**_ext.module.launch_plan(algorithm, gpu.capability, gpu.multiprocessors, *problem))
    us, bound = plan_us(gpu, case, mode, plan)
    waves = plan.waves(gpu.capability, gpu.multiprocessors)
    estimate_us = None if math.isinf(seconds) else seconds * 1e6
    return Own(algorithm, chosen, plan, plan.resident(gpu.capability), waves, us, bound, estimate_us)


def plan_us(gpu: Gpu, case: Case, mode: Mode, plan: LaunchPlan) -> tuple[float, str]:
    """How long the launch takes, and what bounds it."""
    channels = math.ceil(case.C / case.groups / plan.split)
    pixels, products = plan.tile_p * plan.tile_q, plan.tile_k * plan.tile_p * plan.tile_q * channels * 9
    staged = (_halo(plan.tile_p, case) * _halo(plan.tile_q, case) + 9 * plan.tile_k) * channels * mode.element_bytes
    clocks = {
        "products": products / _products_per_clock(gpu, mode, gpu.mma_share if mode.name != "fp32" else 1.0),
        "L2": staged / gpu.l2_bytes_per_clock,
    }
    if mode.name != "fp32":  # the exact rows keep 64 sums a thread, and need far fewer reads than products
        reads = 1 / min(pixels, 64) + 1 / (min(plan.tile_k, 64) * TAP_REUSE[case.stride])  # of a warp's tile
        clocks["shared memory"] = (staged + products * mode.element_bytes * reads) / SHARED_BYTES_PER_CLOCK
    bound = max(clocks, key=lambda name: clocks[name])
    waves = plan.waves(gpu.capability, gpu.multiprocessors)
    busy = math.ceil(plan.blocks / gpu.multiprocessors) * clocks[bound] + FILL_CYCLES
    busy += max(0, waves - 1) * WAVE_CYCLES + (SPLIT_CYCLES if plan.split > 1 else 0)
    us = busy / gpu.clock_ghz / 1e3 + _partial_sums_us(gpu, case, plan.split)
    byte_us = _moved_bytes(case, mode) / gpu.gb_per_s / 1e3
    if byte_us > us:
        us, bound = byte_us, "memory"
    elif FILL_CYCLES > busy / 2:
        bound = "latency"
    return us + LAUNCH_US * (2 if plan.split > 1 else 1), bound


def _halo(outputs: int, case: Case) -> int:
    """Inputs, along one axis, that so many neighbouring outputs read."""
    return (outputs - 1) * case.stride + 3


def _products_per_clock(gpu: Gpu, mode: Mode, share: float) -> float:
    """Of one multiprocessor."""
    return mode.peak(gpu) * share / (2e-3 * gpu.multiprocessors * gpu.clock_ghz)


def _partial_sums_us(gpu: Gpu, case: Case, split: int) -> float:
    """For writing and reading float32 sums of blocks that share them, through the last cache."""
    if split == 1:
        return 0.0
    return split * _outputs(case) * 8 / (gpu.gb_per_s * L2_OVER_MEMORY) / 1e3


# ------------------------------------------------------------------------------------------------------------- rivals


def rivals(gpu: Gpu, case: Case, mode: Mode) -> Iterator[Rival]:
    """What cuDNN may run, with bias and ReLU in its last kernel: torch.cudnn_convolution_relu at its best."""
    yield implicit_gemm(gpu, case, mode)
    if mode.name == "fp32" and case.stride == 1:
        yield from winograd(gpu, case, mode)


@functools.cache
def implicit_gemm(gpu: Gpu, case: Case, mode: Mode) -> Rival:
    """[N P Q, 9 C] times [9 C, K], in the best of :data:`GEMM_TILES` and :data:`GEMM_SPLITS`."""
    best = Rival("", math.inf)
    rows, tensor_cores = _outputs(case) // case.K, mode.name != "fp32"
    hopper = tensor_cores and gpu.capability == 90
    share, cluster = (HOPPER_RIVAL_SHARE, HOPPER_CLUSTER) if hopper else (1.0, 1)
    channels = case.C // case.groups
    granule = GEMM_GRANULE if channels >= GEMM_GRANULE else GEMM_FEW
    chunks = math.ceil(9 * math.ceil(channels / granule) * granule / GEMM_CHUNK)
    for tile_m, tile_n in GEMM_TILES:
        for split in GEMM_SPLITS:
            if split > chunks:
                continue
            length = math.ceil(chunks / split)
            blocks = math.ceil(rows / tile_m) * math.ceil(case.K / case.groups / tile_n) * case.groups * split
            products = length * tile_m * tile_n * GEMM_CHUNK
            staged = length * (tile_m + tile_n) * GEMM_CHUNK * mode.element_bytes
            clocks = max(products / _products_per_clock(gpu, mode, share), staged / cluster / gpu.l2_bytes_per_clock)
            if tensor_cores and not hopper:  # wgmma reads its operands beside the other work
                reads = staged + products * mode.element_bytes * 2 / 64
                clocks = max(clocks, reads / SHARED_BYTES_PER_CLOCK)
            busy = math.ceil(blocks / gpu.multiprocessors) * clocks + FILL_CYCLES + (SPLIT_CYCLES if split > 1 else 0)
            us = busy / gpu.clock_ghz / 1e3 + _partial_sums_us(gpu, case, split)
            us = max(us, _moved_bytes(case, mode) / gpu.gb_per_s / 1e3) + LAUNCH_US
            if us < best.us:
                best = Rival(f"implicit GEMM {tile_m}x{tile_n}" + (f", split {split}" if split > 1 else ""), us)
    return best


def winograd(gpu: Gpu, case: Case, mode: Mode) -> Iterator[Rival]:
    """Both forms of it in float32."""
    fill = FILL_CYCLES / gpu.clock_ghz / 1e3
    direct_us = case.flops / mode.peak(gpu) / 1e6
    byte_us = _moved_bytes(case, mode) / gpu.gb_per_s / 1e3
    fused = max(direct_us / FUSED_WINOGRAD_GAIN / FUSED_WINOGRAD_SHARE, byte_us)
    yield Rival("Winograd F(2x2), one kernel", fused + fill + LAUNCH_US)
    between = 2 * 4 * WINOGRAD_GROWTH * (case.N * case.C * case.H * case.W + _outputs(case))  # written and read
    rate = gpu.gb_per_s * (L2_OVER_MEMORY if between < gpu.l2_bytes else 1.0)
    us = direct_us / WINOGRAD_GAIN + byte_us + between / rate / 1e3
    yield Rival("Winograd F(4x4), three kernels", us + WINOGRAD_KERNELS * (fill + LAUNCH_US))


def _pointwise_us(gpu: Gpu, case: Case, mode: Mode) -> float:
    """A kernel that reads and writes the output once."""
    size = _outputs(case) * mode.element_bytes
    rate = gpu.gb_per_s * (L2_OVER_MEMORY if size < gpu.l2_bytes / 2 else 1.0)
    return LAUNCH_US + 2 * size / rate / 1e3


def _outputs(case: Case) -> int:
    return case.flops // (2 * case.terms)


def _moved_bytes(case: Case, mode: Mode) -> int:
    inputs, weights = case.N * case.C * case.H * case.W, case.K * case.terms
    return mode.element_bytes * (inputs + weights + _outputs(case))
