# SPDX-License-Identifier: MIT
"""Finds and loads the compiled module ``_C``, and says why when it cannot. The only importer of ``_C``.

Loading registers the C++ and CUDA kernels as ``torch.ops.repvgg_cuda.*``. It never initialises CUDA. Without the module
the same operators are defined in pure PyTorch by :mod:`repvgg_cuda._registration`.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

#: The oldest PyTorch whose stable ABI has what csrc/ops uses: strings, lists and ``parallel_for`` (2.10).
MIN_TORCH = (2, 10)

#: Set to 1 to run without the compiled module, for example to rule it out when hunting a bug.
DISABLE_VARIABLE = "REPVGG_CUDA_DISABLE_EXTENSION"


def check_torch_version(version: str) -> None:
    """Raises ImportError, with the remedy, when PyTorch ``version`` is older than :data:`MIN_TORCH`."""
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) < MIN_TORCH:
        need = ".".join(map(str, MIN_TORCH))
        raise ImportError(
            f"repvgg_cuda needs torch >= {need}, found torch {version}: "
            f"upgrade it with `pip install -U 'torch>={need}'`"
        )


def _build_record() -> dict[str, Any]:
    """What setup.py decided when this copy was installed; empty if it was never installed."""
    path = Path(__file__).with_name("_build_info.json")
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _load() -> tuple[ModuleType | None, str]:
    """Returns ``(module, "")``, or ``(None, reason)``."""
    if os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0"):
        return None, f"disabled by {DISABLE_VARIABLE}"
    try:
        return importlib.import_module("repvgg_cuda._C"), ""
    except ImportError as error:
        record = _build_record()
        reason = str(record["reason"]) if record.get("build") == "python" else f"cannot be loaded ({error})"
        warnings.warn(
            f"repvgg_cuda runs in pure PyTorch: its compiled module {reason}. "
            "Rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps .`",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, reason


check_torch_version(torch.__version__)

#: The compiled module, or None. ``why_missing`` then says why.
module, why_missing = _load()


def build_info() -> dict[str, Any]:
    """How this copy was built: ``build`` ("cuda", "cpu" or "python"), the ``reason`` for that, compilers, archs."""
    if module is None:
        return {"build": "python", "reason": why_missing}
    return dict(json.loads(module.build_info()))


def has_cuda_kernels() -> bool:
    """True if the loaded module carries CUDA kernels. Says nothing about a GPU: see ``torch.cuda.is_available()``."""
    return bool(build_info()["build"] == "cuda")
