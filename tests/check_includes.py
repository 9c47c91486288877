# SPDX-License-Identifier: MIT
"""Who may include and import whom. Run by `make lint`: arrows never turn back."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: For each folder of csrc/: the folders whose headers it may include, and the angle-bracket headers it must not.
CSRC = {
    "core": (("core",), r"torch/|cuda|pybind11|immintrin|arm_neon"),
    "cpu": (("core", "cpu"), r"torch/|cuda|pybind11|thread|omp"),
    "cuda": (("core", "cuda"), r"torch/|pybind11"),
    "ops": (("core", "cpu", "cuda", "ops", "build_info.h"), r"cuda"),
}
#: What ops/ may see of the kernels: the tables and entry points, never a kernel.
OPS_SEES = {"cpu/algos.h", "cpu/chain.h", "cpu/fuse_weights.h", "cuda/algos.h"}

#: Layers of the Python package, lowest first. A module imports from lower layers or its own.
LAYERS = [
    {
        "_version",
        "branches",
        "packed",
        "_ext",
        "intervals",
        "gpus",
        "zoo",
        "recognition",
        "renaming",
        "tensor_files",
        "files",
    },
    {
        "reference",
        "explanation",
        "_fold_rules",
        "_registration",
        "structure",
        "signatures",
        "proxies",
        "affine",
        "report",
    },
    {"ops", "testing", "tracing", "layers", "blocks"},
    {"timing", "environment", "devices", "comparison"},
    {"tables", "ceilings", "records", "regression", "tuning_cache"},
    {"modules", "tuning", "prepared", "rewriting", "block_folds", "folding", "proving"},
    {"models", "preparation", "runs", "convert", "baselines", "engines"},
    {"verification", "layer_errors", "state_dict", "checkpoint", "digits", "gpu_model", "deployment", "unfusion"},
    {"checks", "networks", "folds", "suites"},
    {"runner", "charts", "page"},
    {"benchmarking"},
    {"gpu_stages", "gpu_report"},
    {"gpu_check"},
    {"info", "picture", "bench", "console", "conversion"},
    {"demo", "export"},
    {"cli"},
    {"__main__", "__init__"},
]

#: What knows the device: kernels include the first, which includes the others.
SEAM = {"device.cuh", "device_copies.cuh", "device_mma.cuh"}


def check_csrc() -> list[str]:
    problems = []
    for path in sorted((ROOT / "csrc").glob("*/*")):
        folder = path.parent.name
        allowed, forbidden = CSRC[folder]
        for line, text in enumerate(path.read_text().splitlines(), 1):
            match = re.match(r'\s*#include\s+([<"])([^">]+)[">]', text)
            if not match:
                continue
            angle, header = match[1] == "<", match[2]
            where = f"{path.relative_to(ROOT)}:{line}: {header}"
            if angle and re.match(forbidden, header) and path.name not in SEAM:
                problems.append(f"{where}: {folder}/ must not include it")
            if not angle and header.split("/")[0] not in allowed:
                problems.append(f"{where}: {folder}/ includes only {', '.join(allowed)}")
            if folder == "ops" and header.split("/")[0] in ("cpu", "cuda") and header not in OPS_SEES:
                problems.append(f"{where}: ops/ sees only {', '.join(sorted(OPS_SEES))}")
            kernel = path.suffix == ".cuh" and path.name not in SEAM
            if kernel and header.endswith(".cuh") and header != "cuda/device.cuh":
                problems.append(f"{where}: no kernel includes another kernel")
    return problems


def imported_modules(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("repvgg_cuda.")}


def check_python() -> list[str]:
    problems = []
    layer_of = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in sorted((ROOT / "repvgg_cuda").glob("*.py")):
        where = path.relative_to(ROOT)
        if path.stem not in layer_of:
            problems.append(f"{where}: has no layer in tests/check_includes.py")
            continue
        source = path.read_text()
        for name in imported_modules(ast.parse(source)) & layer_of.keys():
            if layer_of[name] > layer_of[path.stem]:
                problems.append(f"{where}: imports {name}, which lies above it")
        if "torch.ops." in re.sub(r'""".*?"""|#[^\n]*', "", source, flags=re.S) and path.stem not in (
            "ops",
            "_registration",
        ):
            problems.append(f"{where}: only ops.py and _registration.py use torch.ops")
    return problems


if __name__ == "__main__":
    found = check_csrc() + check_python()
    print("\n".join(found) or "includes and imports: in order")
    sys.exit(bool(found))
