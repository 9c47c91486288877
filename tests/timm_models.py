# SPDX-License-Identifier: MIT
"""timm's models with BatchNorm statistics as training leaves them; skips, with the reason, where there is no timm."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from repvgg_cuda import testing

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def coverage() -> Any:
    """The module benchmarks/timm_coverage.py."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module("timm_coverage")


def import_timm() -> Any:
    try:
        return coverage().import_timm()
    except ImportError as error:
        pytest.skip(f"timm is not installed: {error}")


def create(name: str) -> nn.Module:
    """``name`` without pretrained weights, in eval mode, every BatchNorm randomised."""
    model: nn.Module = import_timm().create_model(name, pretrained=False)
    return randomised(model)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            bn = testing.random_batchnorm(module.num_features, generator)
            values = {"weight": bn.weight, "bias": bn.bias, "running_mean": bn.mean, "running_var": bn.var}
            module.load_state_dict({"num_batches_tracked": torch.tensor(1), **values})
    return model.eval()
