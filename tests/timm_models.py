# SPDX-License-Identifier: MIT
"""timm's models with BatchNorm statistics as training leaves them; skips, with the reason, where there is no timm.

timm needs torchvision, for names alone. A torchvision built for another torch does not load its operators, and then
fails to import; defining the two that it asks for by name is all that timm's models need of it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from repvgg_cuda import testing

_MISSING = ("nms", "qnms")
_libraries: list[Any] = []


def import_timm() -> Any:
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        pytest.skip(f"timm needs torchvision: {error}")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")  # noqa: TOR901
        for name in _MISSING:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)  # dropping it would undo the definitions
    return pytest.importorskip("timm")


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
