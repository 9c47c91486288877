# SPDX-License-Identifier: MIT
"""A second opinion on synchronisation: sentryward proves the PTX of small launches free of races and deadlocks."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import sass
import sync

TIMEOUT = 600.0  # of one proof, in seconds; they take seconds on an idle machine


@dataclass(frozen=True)
class Launch:
    """What capture.cpp is asked for, and the kernels that it launches: how their names begin, in order.

    Two chunks of channels at least, the second one not full, so that every buffer is used again.
    """

    name: str
    arguments: str
    kernels: tuple[str, ...]
    slow: bool = False


FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = range(4)  # csrc/core/dtype.h
NCHW, NHWC = range(2)


def problem(shape: str, dtype: int, layout: int = NHWC, stride: int = 1, groups: int = 1) -> str:
    """`shape` is "N C H W K"; with ReLU."""
    return f"{shape} {stride} {groups} {dtype} {layout} 1 {sync.ARCH}"


def tile(numbers: str) -> tuple[str]:
    """The float16 kernel of a tile."""
    return (f"conv3x3_mma_kernel<Conv3x3MmaTraits<(MmaType)0, {numbers}",)


DIRECT, MMA = ("conv3x3_direct_kernel",), ("conv3x3_mma_kernel",)
#: A block each, or two: proofs take seconds then. Out of reach of a static proof: blocks that share a sum wait for a
#: counter in memory (direct_split); rounding to 16 bits branches on values (fuse_weights); `direct` stores 16 bytes at
#: a time where the address of y allows it, which is unknown, and not asked where extents are no multiples of 4.
LAUNCHES = (
    Launch("direct", "conv direct " + problem("1 3 3 5 9", FLOAT32, NCHW), DIRECT),
    Launch("direct-nhwc-stride2", "conv direct " + problem("1 3 3 5 9", FLOAT32, stride=2), DIRECT, slow=True),
    Launch("direct-groups", "conv direct " + problem("1 6 3 5 10", FLOAT32, groups=2), DIRECT, slow=True),
    Launch("mma", "conv mma " + problem("1 24 3 5 8", FLOAT16), MMA),
    Launch("mma-bf16-stride2", "conv mma " + problem("1 24 3 5 40", BFLOAT16, stride=2), MMA, slow=True),
    Launch("mma-tf32", "conv mma_tf32 " + problem("1 12 3 5 8", FLOAT32), MMA, slow=True),
    Launch("mma-128x8x16", "tile 0 1 " + problem("1 24 3 5 128", FLOAT16), tile("4, 2, 8, 1, 2, 1"), slow=True),
    Launch("mma-96x7x16-joined", "tile 6 1 " + problem("2 24 2 14 96", FLOAT16), tile("3, 2, 7, 1, 2, 1"), slow=True),
    Launch(
        "mma-128x8x8-stride2",
        "tile 8 1 " + problem("1 24 3 5 128", FLOAT16, stride=2),
        tile("4, 2, 4, 2, 1, 2"),
        slow=True,
    ),
    Launch("mma-split", "tile 4 2 " + problem("1 48 3 5 32", FLOAT16), (*MMA, "conv3x3_mma_sum_kernel"), slow=True),
    Launch("stem", "conv stem " + problem("1 3 5 7 8", FLOAT16, NCHW, stride=2), ("conv3x3_stem_kernel",), slow=True),
    Launch("stem-nhwc", "conv stem " + problem("1 3 5 7 8", BFLOAT16, stride=2), ("conv3x3_stem_kernel",), slow=True),
    Launch("pack-stem", "pack stem " + problem("1 3 5 7 8", FLOAT16, stride=2), ("pack_stem_kernel",), slow=True),
    Launch("pack", "pack mma " + problem("1 24 3 5 8", FLOAT16), ("pack_weights_kernel",)),
    Launch("fuse", f"fuse 1 3 8 8 {FLOAT32}", ("fuse_weights_kernel",)),
    Launch("fuse-packed", f"fuse 1 3 8 8 {FLOAT32} 1", ("fuse_weights_kernel",), slow=True),
    Launch("fuse-two-blocks", f"fuse 2 3 4 8 {FLOAT32}", ("fuse_weights_kernel",), slow=True),
)


def marked(launches: tuple[Launch, ...]) -> list[object]:
    return [
        pytest.param(launch, id=launch.name, marks=[pytest.mark.slow] if launch.slow else []) for launch in launches
    ]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> sync.Program:
    if importlib.util.find_spec("sentryward") is None:
        pytest.skip("sentryward is not installed: pip install sentryward==0.1.1")
    try:
        sync.nvcc()
    except sass.ToolMissing as missing:
        pytest.skip(str(missing))
    gate = os.environ.get("REPVGG_CUDA_GATE")
    if not gate:
        pytest.skip("`make cuda-build` builds what this needs (REPVGG_CUDA_GATE is not set)")
    objects = sorted((Path(gate) / "objects").glob("cuda_*.cu.o"))
    return sync.build(tmp_path_factory.mktemp("sync"), objects)


@pytest.mark.parametrize("launch", marked(LAUNCHES))
def test_launch_is_free_of_races(program: sync.Program, launch: Launch) -> None:
    launched = program.launches(launch.arguments)
    assert len(launched) == len(launch.kernels), launched
    names = sass.demangle([one["kernel"] for one in launched])
    for one, kernel in zip(launched, launch.kernels, strict=True):
        assert names[one["kernel"]].startswith(kernel)
        report = sync.verify(program, one, TIMEOUT)
        assert report["result"] == "race_free", sync.witness(report)


def test_every_kernel_has_a_launch(program: sync.Program) -> None:
    named = {kernel.split("<")[0] for launch in LAUNCHES for kernel in launch.kernels}
    names = sass.demangle([line["kernel"] for line in program.run("list")]).values()
    unnamed = [name for name in names if name.split("<")[0] not in named]
    assert unnamed == [], "add launches of these kernels to LAUNCHES"


#: A header, the comment of a barrier in it, a launch that needs the barrier.
BARRIERS = [
    pytest.param("conv3x3_direct.cuh", "the chunk is complete", "direct", id="direct", marks=pytest.mark.slow),
    pytest.param("conv3x3_mma.cuh", "the next column is complete", "mma", id="mma", marks=pytest.mark.slow),
    pytest.param("pack_weights.cuh", "", "pack", id="pack"),
    pytest.param("fuse_weights.cuh", "what belongs", "fuse", id="fuse"),
    pytest.param("fuse_weights.cuh", "the taps", "fuse-packed", id="fuse-packed", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("header", "comment", "name"), BARRIERS)
def test_missing_barrier_is_found(program: sync.Program, tmp_path: Path, header: str, comment: str, name: str) -> None:
    csrc = Path(shutil.copytree(sync.CSRC, tmp_path / "csrc"))
    path = csrc / "cuda" / header
    text, count = re.subn(rf"__syncthreads\(\);(?=  // {re.escape(comment)})", "", path.read_text())
    assert count, f"{header} has no such barrier"
    path.write_text(text)
    mutant = dataclasses.replace(program, folder=tmp_path, csrc=csrc, entries={})
    launch = next(launch for launch in LAUNCHES if launch.name == name)
    (launched,) = mutant.launches(launch.arguments)
    assert sync.verify(mutant, launched, TIMEOUT)["result"] == "potential_race"
