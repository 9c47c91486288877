# SPDX-License-Identifier: MIT
"""Without the compiled module everything works the same, said once; and the rules of loading it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import repvgg_cuda
from repvgg_cuda import _ext, testing

COMPUTE = """
import sys, torch, repvgg_cuda
from repvgg_cuda import testing
assert not repvgg_cuda.has_cuda_kernels()
assert repvgg_cuda.build_info() == {"build": "python", "reason": "disabled by REPVGG_CUDA_DISABLE_EXTENSION"}
results = {}
for case in testing.EDGE_CASES:
    for dtype in testing.DTYPES:
        x, weight, bias = case.tensors(dtype)
        results[f"{case}-{dtype}"] = repvgg_cuda.conv3x3(
            x, weight, bias, stride=case.stride, groups=case.groups, activation="relu")
for dtype in testing.DTYPES:
    block = testing.random_branches(8, 8, 2, bias=True, post_bn=True)
    results[f"fold-{dtype}"] = repvgg_cuda.fuse_weights(block, dtype=dtype)
torch.save(results, sys.argv[1])
"""


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd="/",  # not the source folder: it would come first on the path
        env={**os.environ, **environment},
    )


def test_same_results_without_the_extension(tmp_path: Path) -> None:
    file = tmp_path / "results.pt"
    done = run_python(COMPUTE, str(file), REPVGG_CUDA_DISABLE_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    results = torch.load(file)
    for case in testing.EDGE_CASES:
        for dtype in testing.DTYPES:
            x, weight, bias = case.tensors(dtype)
            y = repvgg_cuda.conv3x3(
                x, weight, bias, stride=case.stride, groups=case.groups, activation="relu", algorithm="aten"
            )
            assert torch.equal(y, results[f"{case}-{dtype}"]), case
    for dtype in testing.DTYPES:
        block = testing.random_branches(8, 8, 2, bias=True, post_bn=True)
        bounds = testing.fold_bound(block, dtype)
        mine = repvgg_cuda.fuse_weights(block, dtype=dtype)
        for a, b, bound in zip(mine, results[f"fold-{dtype}"], bounds, strict=True):
            assert ((a.double() - b.double()).abs() <= 2 * bound).all()


def test_the_fallback_passes_opcheck_and_differentiates() -> None:
    code = """
import torch
from repvgg_cuda import testing
x, weight, bias = testing.EDGE_CASES[3].tensors(torch.float64)
arguments = [t.requires_grad_() for t in (x, weight, bias)]
torch.library.opcheck(torch.ops.repvgg_cuda.conv3x3.default, (*arguments, 1, 1, "relu", "auto"))
small = x[:, :, :4, :4].detach().requires_grad_()
assert torch.autograd.gradcheck(torch.ops.repvgg_cuda.conv3x3, (small, weight, bias))
block = testing.random_branches(4, 4)
torch.library.opcheck(torch.ops.repvgg_cuda.fuse_weights.default, (*block.op_args(), None, None))
tensors, *geometry = block.op_args()
tensors = [t.requires_grad_(t.numel() > 0) for t in tensors]
lists = ([len(tensors)], geometry[0], *([each] for each in geometry[1:]))
for more in ((None, None, [1, 4, 8, 8], [1]), (None, None, [1, 4, 8, 8], [1], "aten", "low")):
    torch.library.opcheck(torch.ops.repvgg_cuda.fuse_and_prepack.default, (tensors, *lists, *more))
"""
    done = run_python(code, REPVGG_CUDA_DISABLE_EXTENSION="1")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package's Python files, whose compiled module the test provides."""
    package = tmp_path / "repvgg_cuda"
    package.mkdir()
    for file in Path(_ext.__file__).parent.glob("*.py"):
        (package / file.name).write_text(file.read_text())
    return package


def test_a_module_that_cannot_be_loaded_is_said_once(package: Path) -> None:
    """A binary that is damaged, for another platform, or lacks a library."""
    (package / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"not an object file")
    code = "import repvgg_cuda, repvgg_cuda.ops; print(repvgg_cuda.build_info()['reason'])"
    done = run_python(code, PYTHONPATH=str(package.parent), PYTHONWARNINGS="default")
    assert done.returncode == 0, done.stderr
    assert "cannot be loaded" in done.stdout
    assert done.stderr.count("RuntimeWarning: repvgg_cuda runs in pure PyTorch") == 1
    assert "pip install --no-build-isolation" in done.stderr


def test_the_reason_of_a_build_without_compiler_is_kept(package: Path) -> None:
    record = {"build": "python", "reason": "was not built: there is no C++ compiler"}
    (package / "_build_info.json").write_text(json.dumps(record))
    (package / "_C.py").write_text("raise ImportError('no module')")  # hides the one of an editable installation
    done = run_python("import repvgg_cuda; print(repvgg_cuda.build_info())", PYTHONPATH=str(package.parent))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(record)
    assert "its compiled module was not built: there is no C++ compiler" in done.stderr


def test_an_old_torch_is_refused_with_the_remedy() -> None:
    with pytest.raises(ImportError) as error:
        _ext.check_torch_version("2.9.1+cpu")
    assert str(error.value) == (
        "repvgg_cuda needs torch >= 2.10, found torch 2.9.1+cpu: upgrade it with `pip install -U 'torch>=2.10'`"
    )
    for version in ("2.10.0", "2.14.1+cu130", "3.0.0a0"):
        _ext.check_torch_version(version)


def test_import_does_not_initialise_cuda() -> None:
    done = run_python("import torch, repvgg_cuda; assert not torch.cuda.is_initialized()")
    assert done.returncode == 0, done.stderr
