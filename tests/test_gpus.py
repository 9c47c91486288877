# SPDX-License-Identifier: MIT
"""GPUs as data, and how the rows of the CUDA table would launch on them: asked of the compiled table, without a GPU."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import repvgg_cuda
from repvgg_cuda import _ext, cli, gpus, testing
from repvgg_cuda.gpus import GPUS, Gpu, LaunchPlan

needs_cuda_rows = pytest.mark.skipif(
    _ext.module is None or not _ext.has_cuda_kernels(), reason="this build has no CUDA rows"
)
EVERY_GPU = pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS.keys())

#: Batches that fill a GPU and that do not; the empty one has no blocks.
CASES = [
    *testing.EDGE_CASES,
    *(
        testing.Case(case.name, batch, case.C, case.H, case.W, case.K, case.stride, case.groups)
        for case in testing.REPVGG_LAYERS
        for batch in (1, 7, 32)
    ),
]


def plan_of(gpu: Gpu, algorithm: str, case: testing.Case, dtype: torch.dtype, channels_last: bool) -> LaunchPlan | None:
    assert _ext.module is not None
    found = _ext.module.launch_plan(
        algorithm, gpu.capability, gpu.multiprocessors, case.x_size, case.K, case.stride, case.groups,
        str(dtype)[6:], channels_last, "relu",
    )  # fmt: skip
    return None if found is None else LaunchPlan(**found)


def plans(gpu: Gpu) -> list[tuple[str, testing.Case, LaunchPlan]]:
    """Of every row, for every case that it takes."""
    rows = repvgg_cuda.algorithms("cuda")[:-1]
    found = [
        (name, case, plan_of(gpu, name, case, dtype, channels_last))
        for name, case, dtype, channels_last in itertools.product(rows, CASES, testing.DTYPES, (False, True))
    ]
    return [(name, case, plan) for name, case, plan in found if plan is not None]


def blocks_that_cover(case: testing.Case, plan: LaunchPlan) -> int:
    """How many tiles of the plan's size cover the output once, each with its share of blocks: by counting.

    Where images share a row, the batch is one long row of N * Q pixels.
    """
    P, Q = ((extent - 1) // case.stride + 1 for extent in (case.H, case.W))
    rows = len(range(0, P, plan.tile_p))
    channels = len(range(0, case.K // case.groups, plan.tile_k)) * case.groups
    if plan.images > 1:
        return rows * channels * plan.split * len(range(0, case.N * Q, plan.tile_q))
    return rows * channels * plan.split * len(range(0, Q, plan.tile_q)) * case.N


@needs_cuda_rows
@EVERY_GPU
def test_a_plan_covers_the_output_once_and_fits_the_gpu(gpu: Gpu) -> None:
    found = plans(gpu)
    too_new = {"mma_tf32"} if gpu.capability < 80 else set()
    assert {name for name, _, _ in found} == set(repvgg_cuda.algorithms("cuda")[:-1]) - too_new
    for name, case, plan in found:
        assert plan.blocks == blocks_that_cover(case, plan), (name, case, plan)
        assert plan.threads % 32 == 0, (name, plan)
        assert 0 < plan.threads <= gpus.THREADS_PER_BLOCK, (name, plan)
        assert plan.shared_bytes <= gpu.limits.shared_bytes_per_block, (name, case, plan)
        assert plan.resident(gpu.capability) >= 1, (name, case, plan)
        assert plan.blocks_per_sm * plan.threads * 32 <= gpus.REGISTERS_PER_SM, (name, plan)  # 32 registers are few
        assert 1 <= plan.split <= max(1, case.C // case.groups), (name, case, plan)
        waves = plan.waves(gpu.capability, gpu.multiprocessors)
        assert waves == math.ceil(plan.blocks / (gpu.multiprocessors * plan.resident(gpu.capability)))


@needs_cuda_rows
def test_a_refused_problem_has_no_plan() -> None:
    case = testing.REPVGG_LAYERS[3]
    assert plan_of(GPUS["A100"], "direct", case, torch.float32, False) is not None
    assert plan_of(GPUS["A100"], "direct", case, torch.float16, False) is None
    with pytest.raises(RuntimeError, match="no algorithm 'nothing' on cuda"):
        plan_of(GPUS["A100"], "nothing", case, torch.float32, False)


@EVERY_GPU
def test_the_peaks_are_what_the_lanes_and_the_clock_make(gpu: Gpu) -> None:
    """Within a tenth: boost clocks of the same GPU differ between data sheets."""
    made = 2e-3 * gpu.multiprocessors * gpu.limits.fp32_lanes * gpu.clock_ghz
    assert gpu.fp32 == pytest.approx(made, rel=0.1)
    assert gpu.bf16 in (0.0, gpu.fp16)


def test_resident_blocks_by_hand() -> None:
    """On an A100: 164 KiB of shared memory, of which each block takes 1 KiB more; 2048 threads, 32 blocks."""
    plan = LaunchPlan(1000, 128, 48384, 128, 8, 16, 1, 1, blocks_per_sm=2)
    assert plan.resident(80) == 2
    assert LaunchPlan(1000, 128, 48384, 128, 8, 16, 1, 1, blocks_per_sm=9).resident(80) == 3  # 3 * 49408 <= 167936
    assert LaunchPlan(1000, 128, 48384, 128, 8, 16, 1, 1, blocks_per_sm=9).resident(89) == 2  # of 102400
    assert LaunchPlan(1000, 1024, 0, 128, 8, 16, 1, 1, blocks_per_sm=9).resident(80) == 2
    assert LaunchPlan(1000, 32, 0, 128, 8, 16, 1, 1, blocks_per_sm=99).resident(80) == 32
    assert [LaunchPlan(n, 128, 48384, 128, 8, 16, 1, 1, 2).waves(80, 108) for n in (0, 1, 216, 217)] == [0, 1, 1, 2]


def test_gpus_by_name() -> None:
    assert gpus.gpu_named("a100") is GPUS["A100"]
    with pytest.raises(RuntimeError, match="gpu must be one of T4, A100, L4, 4090, H100, H200, got 'V100'"):
        gpus.gpu_named("V100")
    assert gpus.known_gpu("NVIDIA H100 80GB HBM3", 132) is GPUS["H100"]
    assert gpus.known_gpu("NVIDIA H100 PCIe", 114) is None
    assert gpus.known_gpu("NVIDIA A100-SXM4-40GB", 108) is GPUS["A100"]
    assert gpus.known_gpu("NVIDIA GeForce RTX 4090", 128) is GPUS["4090"]
    assert gpus.known_gpu("NVIDIA L40S", 142) is None
    assert gpus.limits(103) is gpus.LIMITS[100]
    with pytest.raises(RuntimeError, match="at least 7.5, got 7.0"):
        gpus.limits(70)


@needs_cuda_rows
def test_explain_for_a_gpu_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    x, weight, _ = testing.Case("layer", 8, 192, 14, 14, 192).tensors()
    told = repvgg_cuda.explain(x, weight, gpu="A100")
    plan = told["direct"].plan
    assert plan is not None
    assert plan == plan_of(GPUS["A100"], "direct", testing.Case("layer", 8, 192, 14, 14, 192), torch.float32, False)
    assert told["aten"].plan is None
    assert "float32 on A100, none at hand" in str(told)
    assert f"direct launches {plan.blocks} blocks of {plan.threads} threads" in str(told)
    assert all(candidate.plan is None for candidate in repvgg_cuda.explain(x, weight).candidates)
    with pytest.raises(RuntimeError, match="gpu must be one of"):
        repvgg_cuda.explain(x, weight, gpu="Voodoo")

    assert cli.main(["explain", "--layer", "8,192,14,14,192", "--gpu", "A100"]) == 0
    assert str(told) == capsys.readouterr().out.rstrip("\n")


def test_a_16_bit_layer_can_be_explained(capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[Any] = ["explain", "--layer", "1,8,9,9,8", "--dtype", "float16", "--channels-last"]
    assert cli.main(arguments) == 0
    assert "float16 on cpu" in capsys.readouterr().out
