# SPDX-License-Identifier: MIT
"""Builds repvgg_cuda._C: every .cpp with the host compiler, every .cu with nvcc, linked into one module, by ninja.

The sources use torch's stable ABI, so any torch >= 2.10 will do here, the CPU build too, and the result runs in every
later torch, CPU or CUDA. Environment variables:

REPVGG_CUDA_BUILD     auto (default): CUDA kernels if nvcc is found; cuda: they are required; cpu: without them.
TORCH_CUDA_ARCH_LIST  as for torch, e.g. "8.0;9.0+PTX"; default: those of DEFAULT_ARCHS that nvcc knows, and PTX of the
                      newest.
CUDA_HOME, CXX        where the toolkit is; the host compiler.
MAX_JOBS              how many compilers run at a time; default: one per core.
REPVGG_CUDA_DEBUG     1: no optimisation, debug information, device assertions.
REPVGG_CUDA_LINEINFO  1: source lines in the CUDA code, for profilers.
REPVGG_CUDA_WERROR    1: a compiler warning, or a register spill in a CUDA kernel, fails the build.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
#: The oldest torch whose stable ABI has what csrc/ops uses; _ext.py checks the same at import.
TARGET_TORCH = (2, 10)


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Build:
    """What will be built, and why."""

    kind: str  # "cuda", "cpu", "python"
    reason: str
    cxx: str = ""
    nvcc: str = ""
    archs: list[str] = field(default_factory=list)  # "8.0", "12.0+PTX"

    @property
    def gencode(self) -> list[str]:
        flags = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags

    def record(self) -> dict[str, object]:
        """What `repvgg-cuda info` shows."""
        if self.kind == "python":
            return {"build": self.kind, "reason": self.reason}
        info: dict[str, object] = {
            "build": self.kind,
            "reason": self.reason,
            "torch": importlib.metadata.version("torch"),
            "min_torch": ".".join(map(str, TARGET_TORCH)),
            "compiler": run(self.cxx, "--version").splitlines()[0],
            "debug": flag("REPVGG_CUDA_DEBUG"),
            "lineinfo": flag("REPVGG_CUDA_LINEINFO"),
        }
        if self.nvcc:
            info["nvcc"] = re.search(r"release ([\d.]+)", run(self.nvcc, "--version"))[1]
            info["cuda_archs"] = self.archs
        return info


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME if that is set, else the one on the path, else the one in the usual folder."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def _in_cuda_home() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return f" in {home}/bin" if home else ""


def cuda_archs(nvcc: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, or the default, checked against what this nvcc can compile."""
    codes = re.findall(r"sm_(\d+[a-z]?)", run(nvcc, "--list-gpu-code"))
    known = [f"{code.rstrip('af')[:-1]}.{code.rstrip('af')[-1]}{code[len(code.rstrip('af')) :]}" for code in codes]
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    if not wanted:
        archs = [arch for arch in DEFAULT_ARCHS if arch in known]
        return [*archs[:-1], archs[-1] + "+PTX"]
    for arch in wanted:
        if arch.removesuffix("+PTX") not in known:
            raise SetupError(
                f"TORCH_CUDA_ARCH_LIST names {arch}, which {nvcc} cannot compile; it knows {' '.join(known)}"
            )
    return wanted


def decide() -> Build:
    mode = os.environ.get("REPVGG_CUDA_BUILD", "auto")
    if mode not in ("auto", "cuda", "cpu"):
        raise SetupError(f"REPVGG_CUDA_BUILD must be auto, cuda or cpu, got {mode!r}")
    nvcc = find_nvcc()
    if mode == "cuda" and nvcc is None:
        raise SetupError(
            f"REPVGG_CUDA_BUILD=cuda, but there is no nvcc{_in_cuda_home()}: install the CUDA toolkit and set "
            "CUDA_HOME to its folder, or build with REPVGG_CUDA_BUILD=cpu"
        )
    cxx = next(filter(None, map(shutil.which, filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]))), None)
    if cxx is None:
        if mode != "auto":
            raise SetupError(f"REPVGG_CUDA_BUILD={mode}, but there is no C++ compiler: install g++ or set CXX")
        return Build("python", "was not built: there is no C++ compiler (install g++ or set CXX)")
    if mode == "cpu":
        return Build("cpu", "REPVGG_CUDA_BUILD=cpu", cxx)
    if nvcc is None:
        return Build("cpu", f"no nvcc was found{_in_cuda_home()} (set CUDA_HOME to build the CUDA kernels)", cxx)
    reason = "REPVGG_CUDA_BUILD=cuda" if mode == "cuda" else "nvcc was found"
    return Build("cuda", reason, cxx, nvcc, cuda_archs(nvcc))


BUILD: Build  # set when this file runs as a script, as every build backend runs it


class BuildExtension(build_ext):
    """Writes a build.ninja for the module and runs it; untouched files are not compiled again."""

    def build_extension(self, ext: Extension) -> None:
        torch = importlib.util.find_spec("torch")
        if torch is None or not torch.submodule_search_locations:
            raise SetupError(
                "building repvgg_cuda needs torch's headers: `pip install torch`, then "
                "`pip install --no-build-isolation .`"
            )
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        record = json.dumps(BUILD.record())
        header = temp / "build_info.h"
        text = f'#pragma once\n#define RVG_BUILD_INFO R"json({record})json"\n'
        if not header.is_file() or header.read_text() != text:
            header.write_text(text)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        ninja_file = temp / "build.ninja"
        ninja_file.write_text(self._ninja(Path(torch.submodule_search_locations[0]), temp, output))
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([_ninja_binary(), "-f", str(ninja_file), *(["-j", jobs] if jobs else [])], check=True)

    def _ninja(self, torch: Path, temp: Path, output: Path) -> str:
        import pybind11

        debug, lineinfo = flag("REPVGG_CUDA_DEBUG"), flag("REPVGG_CUDA_LINEINFO")
        includes = [f"-I{ROOT / 'csrc'}", f"-I{temp}"]
        includes += [
            f"-isystem {path}" for path in (pybind11.get_include(), torch / "include", sysconfig.get_path("include"))
        ]
        target = TARGET_TORCH[0] << 56 | TARGET_TORCH[1] << 48  # as torch/headeronly/version.h packs it
        cxx_flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", f"-DTORCH_TARGET_VERSION={target}ull"]
        cxx_flags += ["-O0", "-g"] if debug else ["-O3", *(["-g"] if lineinfo else [])]
        nvcc_flags = ["-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", *BUILD.gencode]
        nvcc_flags += ["-O0", "-g", "-G"] if debug else ["-O3", *(["-lineinfo"] if lineinfo else [])]
        if flag("REPVGG_CUDA_WERROR"):
            # g++ 12 sees dangers in std::string and std::optional that are not there (its bugs 105329, 80635).
            cxx_flags += ["-Werror", "-Wno-error=restrict", "-Wno-error=maybe-uninitialized"]
            nvcc_flags += ["-Werror=all-warnings", "-Xptxas=-warn-spills,-Werror"]
        libraries = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
        if BUILD.kind == "cuda":
            cxx_flags.append("-DRVG_WITH_CUDA")
            # nvcc links, because it knows where its own static runtime is.
            link = f"{BUILD.nvcc} -shared -cudart static -ccbin {BUILD.cxx} $in -o $out "
            link += " ".join("-Xlinker=" + lib[4:] if lib.startswith("-Wl,") else lib for lib in libraries)
        else:
            link = f"{BUILD.cxx} -shared $in -o $out {' '.join(libraries)}"

        # The CUDA sources take longest, so they start first: the others fill the cores at the end.
        sources = sorted((ROOT / "csrc/cuda").glob("*.cu")) if BUILD.kind == "cuda" else []
        sources += sorted((ROOT / "csrc").glob("*/*.cpp"))
        objects = {source: temp / f"{source.parent.name}_{source.name}.o" for source in sources}
        lines = [
            f"ninja_required_version = 1.5\nbuilddir = {temp}",
            f"rule cxx\n  command = {BUILD.cxx} {' '.join(cxx_flags + includes)} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = c++ $in",
            f"rule nvcc\n  command = {BUILD.nvcc} {' '.join(nvcc_flags)} -ccbin {BUILD.cxx} {includes[0]} "
            "-MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = nvcc $in",
            f"rule link\n  command = {link}\n  description = link $out",
        ]
        for source, target_file in objects.items():
            lines.append(f"build {target_file}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {source}")
        lines.append(f"build {output}: link {' '.join(map(str, objects.values()))}\n")
        return "\n".join(lines)


def _ninja_binary() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SetupError("building repvgg_cuda needs ninja: `pip install ninja pybind11`") from None
        return found


class BuildPython(build_py):
    """Leaves the reason in the package where no module could be built, for `repvgg-cuda info`."""

    def run(self) -> None:
        super().run()
        if BUILD.kind == "python" and not self.editable_mode:
            path = Path(self.build_lib) / "repvgg_cuda" / "_build_info.json"
            path.write_text(json.dumps(BUILD.record()))


if __name__ == "__main__":
    BUILD = decide()
    if not {"sdist", "egg_info", "dist_info", "--version", "--name"} & set(sys.argv):
        archs = f", archs {' '.join(BUILD.archs)}" if BUILD.archs else ""
        print(f"repvgg_cuda: {BUILD.kind} build: {BUILD.reason}{archs}", file=sys.stderr)
    setup(
        ext_modules=[] if BUILD.kind == "python" else [Extension("repvgg_cuda._C", sources=[])],
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
    )
