# SPDX-License-Identifier: MIT
"""What setup.py decides to build, and that it says so. The build itself is what all the other tests run on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SETUP = Path(__file__).resolve().parent.parent / "setup.py"
VARIABLES = ("REPVGG_CUDA_BUILD", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CXX")


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with none of its variables set."""
    pytest.importorskip("setuptools", "77", reason="the build needs setuptools >= 77")
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("repvgg_cuda_setup", SETUP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda_home(tmp_path: Path) -> Path:
    """A toolkit whose nvcc knows 7.5, 8.0, 9.0, 9.0a and 12.0."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho sm_75 sm_80 sm_90 sm_90a sm_120 release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    return tmp_path / "cuda"


def no_compiler(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_py.shutil, "which", lambda name: None)


def test_auto_uses_nvcc_if_found(setup_py: ModuleType, cuda_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    build = setup_py.decide()
    assert (build.kind, build.reason) == ("cuda", "nvcc was found")
    assert build.nvcc == f"{cuda_home}/bin/nvcc"
    assert build.archs == ["7.5", "8.0", "9.0", "12.0+PTX"]
    assert build.gencode == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_auto_without_nvcc_is_a_cpu_build(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    build = setup_py.decide()
    assert build.kind == "cpu"
    assert build.reason == f"no nvcc was found in {tmp_path}/bin (set CUDA_HOME to build the CUDA kernels)"


def test_cpu_is_obeyed_beside_nvcc(setup_py: ModuleType, cuda_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    monkeypatch.setenv("REPVGG_CUDA_BUILD", "cpu")
    assert setup_py.decide().kind == "cpu"


def test_cuda_without_nvcc_fails(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("REPVGG_CUDA_BUILD", "cuda")
    with pytest.raises(setup_py.SetupError) as error:
        setup_py.decide()
    assert str(error.value) == (
        f"REPVGG_CUDA_BUILD=cuda, but there is no nvcc in {tmp_path}/bin: install the CUDA toolkit and set CUDA_HOME "
        "to its folder, or build with REPVGG_CUDA_BUILD=cpu"
    )


def test_unknown_mode_fails(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPVGG_CUDA_BUILD", "yes")
    with pytest.raises(setup_py.SetupError, match="^REPVGG_CUDA_BUILD must be auto, cuda or cpu, got 'yes'$"):
        setup_py.decide()


def test_no_compiler(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    no_compiler(setup_py, monkeypatch)
    build = setup_py.decide()
    assert build.kind == "python"
    assert build.record() == {
        "build": "python",
        "reason": "was not built: there is no C++ compiler (install g++ or set CXX)",
    }
    monkeypatch.setenv("REPVGG_CUDA_BUILD", "cpu")
    with pytest.raises(setup_py.SetupError, match="^REPVGG_CUDA_BUILD=cpu, but there is no C\\+\\+ compiler: install"):
        setup_py.decide()


@pytest.mark.parametrize("text", ["8.0;9.0a+PTX", "8.0 9.0a+PTX", "8.0, 9.0a+PTX"])
def test_arch_list_is_honoured(
    setup_py: ModuleType, cuda_home: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    build = setup_py.decide()
    assert build.archs == ["8.0", "9.0a+PTX"]
    assert build.gencode[-2:] == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


def test_an_arch_nvcc_does_not_know_fails(
    setup_py: ModuleType, cuda_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "5.0;8.0")
    with pytest.raises(setup_py.SetupError) as error:
        setup_py.decide()
    assert str(error.value) == (
        f"TORCH_CUDA_ARCH_LIST names 5.0, which {cuda_home}/bin/nvcc cannot compile; it knows 7.5 8.0 9.0 9.0a 12.0"
    )


def test_the_oldest_torch_is_the_same_at_build_and_import(setup_py: ModuleType) -> None:
    from repvgg_cuda import _ext

    assert setup_py.TARGET_TORCH == _ext.MIN_TORCH
