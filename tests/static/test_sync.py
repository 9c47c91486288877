# SPDX-License-Identifier: MIT
"""A second opinion on synchronisation: sentryward proves the PTX of small launches free of races and deadlocks."""

from __future__ import annotations

import importlib.util
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
    """What capture.cpp is asked for, and the kernels that it launches: a part of each mangled name, in order.

    Two chunks of channels at least, the second one not full, so that every buffer is used again.
    """

    name: str
    arguments: str
    kernels: tuple[str, ...]
    slow: bool = False


def conv(row: str, shape: str, dtype: int, layout: int, stride: int = 1, groups: int = 1) -> str:
    """`shape` is "N C H W K"."""
    return f"conv {row} {shape} {stride} {groups} {dtype} {layout} 1 {sync.ARCH}"


FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = range(4)  # csrc/core/dtype.h
NCHW, NHWC = range(2)
LAUNCHES = (
    Launch("direct", conv("direct", "1 9 3 5 9", FLOAT32, NCHW), ("conv3x3_direct_kernel",)),
    Launch("direct-nhwc", conv("direct", "1 9 3 5 9", FLOAT32, NHWC), ("conv3x3_direct_kernel",), slow=True),
    Launch(
        "direct-stride2", conv("direct", "1 5 3 5 9", FLOAT32, NCHW, stride=2), ("conv3x3_direct_kernel",), slow=True
    ),
    Launch(
        "direct-groups", conv("direct", "1 18 3 5 18", FLOAT32, NHWC, groups=2), ("conv3x3_direct_kernel",), slow=True
    ),
    Launch("fuse", "fuse 3 8 8 1", ("fuse_weights_kernel",)),
    Launch("fuse-half", "fuse 4 8 8 2", ("fuse_weights_kernel",), slow=True),
)


def marked(launches: tuple[Launch, ...]) -> list[object]:
    return [
        pytest.param(launch, id=launch.name, marks=[pytest.mark.slow] if launch.slow else []) for launch in launches
    ]


def need_tools() -> None:
    if importlib.util.find_spec("sentryward") is None:
        pytest.skip("sentryward is not installed: pip install sentryward==0.1.1")
    try:
        sync.nvcc()
    except sass.ToolMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> sync.Program:
    need_tools()
    return sync.build(tmp_path_factory.mktemp("sync"))


@pytest.mark.parametrize("launch", marked(LAUNCHES))
def test_launch_is_free_of_races(program: sync.Program, launch: Launch) -> None:
    launched = program.launches(launch.arguments)
    assert len(launched) == len(launch.kernels), launched
    for one, kernel in zip(launched, launch.kernels, strict=True):
        assert kernel in one["kernel"]
        report = sync.verify(program, one, TIMEOUT)
        assert report["result"] == "race_free", sync.witness(report)


def test_every_kernel_has_a_launch(program: sync.Program) -> None:
    named = {kernel for launch in LAUNCHES for kernel in launch.kernels}
    unnamed = [name for name in program.entries if not any(kernel in name for kernel in named)]
    assert unnamed == [], "add launches of these kernels to LAUNCHES"


@pytest.mark.slow
def test_missing_barrier_is_found(tmp_path: Path) -> None:
    need_tools()
    csrc = Path(shutil.copytree(sync.CSRC, tmp_path / "csrc"))
    path = csrc / "cuda" / "fuse_weights.cuh"
    text, count = re.subn(r"__syncthreads\(\);", "", path.read_text())
    assert count
    path.write_text(text)
    program = sync.build(tmp_path / "sync", csrc)
    (launch,) = program.launches("fuse 3 8 8 1")
    assert sync.verify(program, launch, TIMEOUT)["result"] == "potential_race"
