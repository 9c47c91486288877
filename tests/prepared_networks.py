# SPDX-License-Identifier: MIT
"""What the tests of prepare() share: a layer, a small deployed network, and which operators a call reaches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import repvgg_cuda
from repvgg_cuda import RepConv3x3, testing
from repvgg_cuda.models import RepVGG, RepVGGplus
from repvgg_cuda.networks import randomise_

LAYER = testing.Case("layer", 2, 16, 15, 14, 24)
X = LAYER.tensors()[0]


def layer(case: testing.Case = LAYER, **kwargs: Any) -> RepConv3x3:
    conv = RepConv3x3(case.C, case.K, stride=case.stride, groups=case.groups, activation="relu", **kwargs)
    return conv.eval()


def images(batch: int = 2, height: int = 33, width: int = 17, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def network(kind: type[RepVGG] | type[RepVGGplus] = RepVGG, **kwargs: Any) -> Any:
    """A small deployed network with the numbers of a trained one: eight blocks."""
    options: dict[str, Any] = {"num_classes": 7, "width_multiplier": [0.25, 0.25, 0.125, 0.125], **kwargs}
    trained = randomise_(kind([1, 2, 3, 1], **options)).eval()
    return repvgg_cuda.reparameterize(trained, inplace=True, strict=True).model


def repconvs(model: nn.Module) -> list[RepConv3x3]:
    return [module for module in model.modules() if isinstance(module, RepConv3x3)]


class Calls(TorchDispatchMode):
    """The convolutions that reach the dispatcher: "conv3x3", or how many layers a chain has; and packings."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []
        self.packings = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.repvgg_cuda.conv3x3.default:
            self.seen.append("conv3x3")
        elif func is torch.ops.repvgg_cuda.conv3x3_chain.default:
            self.seen.append(len(args[1]))
        self.packings += func is torch.ops.repvgg_cuda.prepack.default
        return func(*args, **(kwargs or {}))


def calls(model: Callable[..., Any], x: Tensor) -> list[object]:
    with torch.no_grad(), Calls() as recorded:
        model(x)
    return recorded.seen


def repackings(model: Callable[..., Any], x: Tensor) -> int:
    with torch.no_grad(), Calls() as recorded:
        model(x)
    return recorded.packings


def one_by_one(model: nn.Module, x: Tensor) -> Any:
    """The output of ``model`` with a hook on every layer, so that each runs by itself."""
    handles = [each.register_forward_hook(lambda *args: None) for each in model.modules()]
    try:
        seen = calls(model, x)
        assert set(seen) <= {"conv3x3"}
        with torch.no_grad():
            return model(x)
    finally:
        for handle in handles:
            handle.remove()
