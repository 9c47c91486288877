# SPDX-License-Identifier: MIT
"""What the compiled CUDA code is: every architecture is there, nothing spills. Needs no GPU.

Run by `make cuda-build` on the module it built, else on the installed one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from repvgg_cuda import _ext


def module_path() -> Path:
    gate = os.environ.get("REPVGG_CUDA_GATE")
    if gate:
        return next(Path(gate).glob("repvgg_cuda/_C*"))
    if _ext.module is None or not _ext.has_cuda_kernels():
        pytest.skip("this build has no CUDA kernels")
    assert _ext.module.__file__ is not None
    return Path(_ext.module.__file__)


def cuobjdump(*arguments: str) -> str:
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    tool = shutil.which("cuobjdump") or (str(packaged[-1]) if packaged else None)
    if tool is None:
        pytest.skip("cuobjdump is not installed: pip install nvidia-cuda-cuobjdump")
    command = [tool, *arguments, str(module_path())]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_every_architecture_is_in_the_binary() -> None:
    archs = {f"sm_{arch}" for arch in re.findall(r"\.sm_(\d+[a-z]?)\.cubin", cuobjdump("--list-elf"))}
    ptx = {f"sm_{arch}" for arch in re.findall(r"\.sm_(\d+[a-z]?)\.ptx", cuobjdump("--list-ptx"))}
    if os.environ.get("REPVGG_CUDA_GATE"):
        expected = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
        newest = {"sm_120"}
    else:
        built = _ext.build_info()["cuda_archs"]
        expected = {"sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in built}
        newest = {"sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in built if arch.endswith("+PTX")}
    assert archs == expected
    assert ptx == newest


def test_no_kernel_spills() -> None:
    """STACK and LOCAL hold spilled registers and arrays that are indexed at run time: there are none."""
    usage = cuobjdump("-res-usage")
    kernels = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage)
    for name in ("conv3x3_direct_kernel", "fuse_weights_kernel"):
        assert any(name in mangled for mangled, _ in kernels), name
    for name, resources in kernels:
        values = dict(re.findall(r"(\w+):(\d+)", resources))
        assert values["LOCAL"] == values["STACK"] == "0", f"{name}: {resources}"
